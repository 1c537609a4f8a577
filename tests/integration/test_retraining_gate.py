"""Scheduled retraining: a run whose data hold too little that the champion's lack ends before SFT."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from kfp import dsl

from components.foundation.champion_log import POLICY_MODEL, ChampionEntry, ChampionLog
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import IntegrityError, NothingNew, StoreError
from components.foundation.exit_codes import NOTHING_NEW
from components.foundation.run_context import finished_uri, open_run
from components.notify.notify import gather
from components.prepare_data.component import prepare_data
from components.prepare_data.prepare_data import BUILTIN_FOLDER, run_prepare_data
from components.prepare_data.start_run import run_start_run
from pipelines.local.summary import RunFacts, write_summary

LINES = (BUILTIN_FOLDER / "preferences.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
pytestmark = pytest.mark.xdist_group("promotion")  # another group's champion would be in the same MLflow

Start = Callable[..., str]


def starter(root: str, folder: Path) -> Start:
    """What opens a run on the first so many shipped pairs; its id is used once in MLflow."""

    def start(pairs: int, *settings: str, run_id: str = "") -> str:
        file = folder / f"{pairs}.jsonl"
        file.write_text("".join(LINES[:pairs]), encoding="utf-8")
        overrides = [f"store.uri={root}", f"data.preferences={file}", "data.max_preferences=0", *settings]
        run_id = run_id or uuid.uuid4().hex
        return run_start_run(f"{root}/runs/{run_id}", run_id, "tiny", 0, json.dumps(overrides), 1)

    return start


@pytest.fixture
def start_alone(store: CheckpointStore, tmp_path: Path) -> Start:
    """In a store without a champion."""
    return starter(store.root_uri, tmp_path)


@pytest.fixture(scope="module")
def start(s3: object, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """In a store that all tests of the champion share."""
    return starter(f"s3://saferlhf-test/{uuid.uuid4().hex}", tmp_path_factory.mktemp("pairs"))


def crown(run_uri: str, folder: Path, parents: list[str]) -> None:
    """Let a policy that was made from those commits be champion."""
    context = open_run(run_uri)
    folder.mkdir()
    (folder / "weights").write_text("policy")
    uri = context.stage_uri("ppo_lagrangian", 1) + "/step-1"
    context.store.commit(uri, folder, parents=parents, labels={"stage": "ppo_lagrangian"})
    version = context.tracker.register_model(POLICY_MODEL, f"{uri}/model", context.mlflow_run_id, {})
    entry = ChampionEntry(1, version, "", "promote", [], context.run_id, "2026-01-01T00:00:00+00:00")
    ChampionLog(context.store, POLICY_MODEL).append(entry)


@pytest.fixture(scope="module")
def champion(start: Start, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made from 40 pairs; the version."""
    run = start(40)
    crown(run, tmp_path_factory.mktemp("champion") / "policy", [run_prepare_data(run)])
    entry = ChampionLog(open_run(run).store, POLICY_MODEL).latest()
    assert entry is not None
    return entry.version


def test_without_a_champion_every_run_goes_on(start_alone: Start) -> None:
    run = start_alone(40, "data.min_new_pairs=1000", "data.min_new_share=1")
    assert run_prepare_data(run) == finished_uri(open_run(run), "prepare_data", 0)


@pytest.mark.usefixtures("champion")
@pytest.mark.parametrize(
    ("pairs", "limits"),
    [(43, ["data.min_new_pairs=3"]), (50, ["data.min_new_share=0.2"]), (40, [])],
    ids=["as many as are needed", "the share that is needed", "no limit"],
)
def test_a_run_with_enough_new_pairs_goes_on(start: Start, pairs: int, limits: list[str]) -> None:
    run = start(pairs, *limits)
    assert run_prepare_data(run) == finished_uri(open_run(run), "prepare_data", 0)


@pytest.mark.parametrize(
    ("pairs", "limits", "words"),
    [
        (43, ["data.min_new_pairs=4"], "3 new preference pairs since champion v{} (needs 4)"),
        (50, ["data.min_new_share=0.21"], "10 new preference pairs since champion v{} (needs 11)"),
        (30, ["data.min_new_pairs=1"], "0 new preference pairs since champion v{} (needs 1)"),
    ],
)
def test_row_32_a_run_with_too_few_ends_there_and_says_so(
    start: Start,
    champion: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pairs: int,
    limits: list[str],
    words: str,
) -> None:
    """By the word for which the pipeline skips the rest; nothing is committed that a later stage could start from."""
    run = start(pairs, *limits)
    said, page = f"nothing new: {words.format(champion)}: the run ends here", dsl.Markdown(uri=str(tmp_path / "page"))
    assert prepare_data.python_func(run_uri=run, table=page) == NOTHING_NEW
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert (tmp_path / "page").read_text() == f"{said}\n"
    context = open_run(run)
    with pytest.raises(StoreError, match="holds no finished prepare_data"):
        finished_uri(context, "prepare_data", 0)
    ended = context.tracker._client.get_run(context.mlflow_run_id)
    assert (ended.info.status, ended.data.tags["saferlhf.ended"]) == ("FINISHED", "nothing new")
    (stage,) = context.tracker._search(
        {"saferlhf.stage": "prepare_data", "saferlhf.run_id": context.run_id}, "attributes.start_time ASC"
    )
    assert stage.info.status == "FINISHED"
    assert stage.data.metrics["data/new_pairs"] == float(words.split()[0])
    assert {gather(run, context.run_id, kubeflows).status for kubeflows in ("failed", "succeeded")} == {"nothing new"}


@pytest.mark.usefixtures("champion")
def test_a_run_with_enough_returns_its_data_and_shows_their_table(start: Start, tmp_path: Path) -> None:
    run = start(43, "data.min_new_pairs=3")
    uri = prepare_data.python_func(run_uri=run, table=dsl.Markdown(uri=str(tmp_path / "page")))
    assert uri == finished_uri(open_run(run), "prepare_data", 0)
    assert "| preferences | " in (tmp_path / "page").read_text()


@pytest.mark.fault
def test_a_run_that_skipped_its_training_without_that_word_has_not_succeeded(
    start_alone: Start, tmp_path: Path
) -> None:
    """KFP's local runner takes a condition that it cannot evaluate for false, and ends well."""
    run = start_alone(40)
    run_prepare_data(run)
    with pytest.raises(StoreError, match="holds no finished report"):
        write_summary(tmp_path, RunFacts(run, wall_seconds=1, peak_memory_bytes=1, tracking_uri=""))
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.usefixtures("champion")
def test_a_run_that_goes_on_after_all_has_not_ended_early(start: Start) -> None:
    run = start(40, "data.min_new_pairs=1", run_id=(run_id := uuid.uuid4().hex))
    with pytest.raises(NothingNew):
        run_prepare_data(run)
    start(40, "data.min_new_pairs=1", run_id=run_id)
    context = open_run(run)
    again = context.tracker._client.get_run(context.mlflow_run_id)
    assert again.info.status == "RUNNING" and "saferlhf.ended" not in again.data.tags


@pytest.mark.fault
def test_a_champion_of_unknown_data_is_an_error_that_says_how_to_go_on(start_alone: Start, tmp_path: Path) -> None:
    crown(start_alone(40), tmp_path / "policy", [])
    with pytest.raises(IntegrityError, match=r"was made from no prepared data: set data.min_new_pairs=0"):
        run_prepare_data(start_alone(40, "data.min_new_pairs=1"))
