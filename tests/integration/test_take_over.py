"""A run that starts at a round of an earlier one: what lies before is taken over, and lineage goes back through it."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ConflictError, IntegrityError, SettingsError, StoreError
from components.foundation.lineage import ancestors
from components.foundation.run_context import ROUND_STAGES, RunContext, finished_uri, standing_commit
from components.prepare_data.prepare_data import run_prepare_data
from tests.integration.stand_in_stages import commit, record_as_another_version, start


@pytest.fixture(scope="module")
def root(s3: object) -> str:
    """A store that the tests share; MLflow has one name for a run, so each run's id is used once."""
    return f"s3://saferlhf-test/{uuid.uuid4().hex}"


def finish(context: RunContext, rounds: int) -> None:
    """Data, SFT and rounds, each stage made from the one before."""
    last = run_prepare_data(context.run_uri)
    stages = [("sft", 0), ("evaluate", 0)]
    for name, number in stages + [(name, k) for k in range(1, rounds + 1) for name in ROUND_STAGES]:
        last = commit(context, name, number, [last])


@pytest.fixture(scope="module")
def earlier(root: str) -> RunContext:
    """It stopped in its second round."""
    run = start(root, "earlier")
    finish(run, rounds=1)
    commit(run, "collect", 2, [finished_uri(run, "evaluate", 1)])
    return run


def latest(context: RunContext, name: str, round_number: int) -> str | None:
    return context.store.latest(context.stage_uri(name, round_number))


def test_what_is_before_the_round_is_taken_over_and_nothing_else(root: str, earlier: RunContext) -> None:
    run = start(root, "again", "start.from_run=earlier", "start.from_round=2", "ppo.steps=3", "gate.min_win_rate=0.1")
    taken = [("prepare_data", 0), ("sft", 0), ("evaluate", 0), *((name, 1) for name in ROUND_STAGES)]
    for name, number in taken:
        assert latest(run, name, number) == finished_uri(earlier, name, number)
    assert [latest(run, name, 2) for name in ROUND_STAGES] == [None] * len(ROUND_STAGES)
    assert run_prepare_data(run.run_uri) == finished_uri(earlier, "prepare_data", 0)  # had nothing left to do

    policy = commit(run, "collect", 2, [finished_uri(run, "evaluate", 1)])
    origin = [ancestor.manifest.labels for ancestor in ancestors(run.store, policy)]
    assert (origin[0]["run_id"], origin[-1]["run_id"]) == ("again", "earlier")
    assert origin[-1]["stage"] == "prepare_data"
    again = start(root, "again", "start.from_run=earlier", "start.from_round=2", "ppo.steps=3", "gate.min_win_rate=0.1")
    assert latest(again, "collect", 2) == policy  # the run was resumed, and kept its own


def test_a_run_that_took_over_can_be_taken_over_from_and_have_more_rounds(root: str) -> None:
    first = start(root, "first", rounds=1)
    finish(first, rounds=1)
    second = start(root, "second", "start.from_run=first", "start.from_round=1", rounds=1)
    for name in ROUND_STAGES:
        commit(second, name, 1, [finished_uri(second, "sft", 0)])
    third = start(root, "third", "start.from_run=second", "start.from_round=2", rounds=2)
    assert latest(third, "sft", 0) == finished_uri(first, "sft", 0)
    assert latest(third, "ppo_lagrangian", 1) == finished_uri(second, "ppo_lagrangian", 1)
    assert finished_uri(third, "ppo_lagrangian", 1).startswith(f"{root}/runs/second/")


def test_a_run_of_another_version_is_taken_over_from(root: str) -> None:
    older = start(root, "older", rounds=1)
    finish(older, rounds=1)
    record_as_another_version(older, "collect", "warmth", 0.5)
    run = start(root, "newer", "start.from_run=older", "start.from_round=1", rounds=1)
    assert latest(run, "sft", 0) == finished_uri(older, "sft", 0)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["start.from_run=earlier", "start.from_round=1", "gate.regressions=s3://b/mine.jsonl"],
            "cannot be taken over from, for it was made with other settings: gate.regressions",
        ),
        (["start.from_run=nobody", "start.from_round=1"], "start.from_run=nobody is refused: there is no run s3://"),
        (["start.from_run=new", "start.from_round=1"], "is the run itself"),
        (["start.from_run=earlier", "start.from_round=4"], "from_round=4 is past the last round: the run has rounds=3"),
        (["start.from_run=earlier"], "from_run and from_round go together"),
        (["start.from_round=2"], "from_run and from_round go together"),
        (["start.from_run=earlier", "start.from_round=3"], "has not finished: round-2/annotate, round-2/reward_model"),
        (["start.from_run=earlier", "start.from_round=2", "seed=1"], r"other settings: seed \(0 there, 1 here\)"),
        (["start.from_run=earlier", "start.from_round=2", "lora.rank=3"], r"lora.rank \(\d+ there, 3 here\)"),
        (["start.from_run=earlier", "start.from_round=1", "sft.epochs=7"], r"sft.epochs \(\d+ there, 7 here\)"),
        (["start.from_run=earlier", "start.from_round=1", "data.max_held_out=3"], r"data.max_held_out \(16 there"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_before_the_run_exists(root: str, settings: list[str], words: str) -> None:
    earlier = start(root, "earlier")
    finish(earlier, rounds=1)
    commit(earlier, "collect", 2, [])
    with pytest.raises(SettingsError, match=words):
        start(root, "new", *settings)
    assert earlier.store.list(f"{root}/runs/new/") == []


@pytest.mark.fault
def test_a_branch_goes_on_after_a_stage_that_it_took_over_was_lost(root: str) -> None:
    lost = start(root, "lost", rounds=1)
    finish(lost, rounds=1)
    settings = ("start.from_run=lost", "start.from_round=1")
    branch = start(root, "branch", *settings, rounds=1)
    uri = finished_uri(lost, "sft", 0)
    lost.store._delete([f"{uri}/{file.path}" for file in lost.store.manifest(uri).files])
    assert standing_commit(branch, "sft", 0) is None
    own = commit(branch, "sft", 0, [])
    assert latest(start(root, "branch", *settings, rounds=1), "sft", 0) == own  # resumed


def test_what_made_nothing_that_is_taken_over_may_differ(root: str, earlier: RunContext) -> None:
    differing = ("data.min_new_pairs=5", "evaluate.scored_prompts=4")
    run = start(root, "fresh", "start.from_run=earlier", "start.from_round=1", *differing, rounds=1)
    assert latest(run, "sft", 0) == finished_uri(earlier, "sft", 0)


@pytest.mark.fault
def test_a_pointer_is_adopted_once_and_only_to_a_commit(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    one, other = (f"{store.root_uri}/runs/a/sft/step-{step}" for step in (1, 2))
    for uri in (one, other):
        store.commit(uri, tmp_path / "folder")
    stage = f"{store.root_uri}/runs/b/sft"
    with pytest.raises(StoreError, match="it is not committed"):
        store.adopt(stage, f"{store.root_uri}/runs/a/sft/step-3")
    store.adopt(stage, one)
    store.adopt(stage, one)
    with pytest.raises(ConflictError):
        store.adopt(stage, other)
    assert store.latest(stage) == one


@pytest.mark.fault
def test_a_pointer_out_of_the_store_is_refused(store: CheckpointStore) -> None:
    stage = f"{store.root_uri}/runs/b/sft"
    for text in (f"{store.root_uri}/../elsewhere/step-1", "s3://other/step-1"):
        store.write_text(f"{stage}/LATEST", text, overwrite=True)
        with pytest.raises(IntegrityError, match="could leave its folder"):
            store.latest(stage)
