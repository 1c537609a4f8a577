"""`saferlhf lineage`: from a version or a run's id back to data, labels, base model and settings, on real servers."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from components.foundation.champion_log import POLICY_MODEL
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.default_model import SMOL_SHA256
from components.foundation.errors import SettingsError
from components.foundation.lineage import lineage_text
from components.foundation.preference import LABELS_FILE
from components.foundation.results import to_json
from components.foundation.run_context import RunContext, finished_uri, open_earlier_run, open_run, read_run
from components.foundation.settings import read_settings
from components.prepare_data.prepare_data import run_prepare_data
from pipelines.cli import app
from tests.integration.stand_in_stages import commit, record_as_another_version, start

IMAGE = f"sha256:{'5' * 64}"


def lineage(what: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["lineage", what])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def registered(context: RunContext, policy_uri: str) -> str:
    tags = {"run_id": context.run_id}
    return context.tracker.register_model(POLICY_MODEL, f"{policy_uri}/model", context.mlflow_run_id, tags)


@pytest.fixture
def run(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> RunContext:
    """People labelled its one round. Its images and its code are those that the steps' environment names."""
    monkeypatch.setenv("SAFERLHF_IMAGE_DIGEST", IMAGE)
    monkeypatch.setenv("SAFERLHF_GIT_SHA", "5f2c9a1e77b0" + "0" * 28)
    context = start(store.root_uri, f"lineage-{uuid.uuid4().hex[:8]}", "annotate.annotator=human", rounds=1)
    last = commit(context, "sft", 0, [run_prepare_data(context.run_uri)])
    for stage, file in (("collect", "answers.jsonl"), ("annotate", LABELS_FILE), ("ppo_lagrangian", "trace.json")):
        last = commit(context, stage, 1, [last], file)
    return context


def changed(context: RunContext, **update: object) -> None:
    """The run's record says something else of its settings."""
    description, settings = read_run(context.store, context.run_uri, read_settings)
    text = to_json(replace(description, settings_json=settings.model_copy(update=update).model_dump_json()))
    context.store.write_text(f"{context.run_uri}/run.json", text, overwrite=True)


def test_a_run_id_leads_to_data_labels_base_model_and_every_setting(run: RunContext) -> None:
    policy = finished_uri(run, "ppo_lagrangian", 1)
    version = registered(run, policy)
    status, said = lineage(run.run_id)
    assert (status, said) == lineage(version)
    lines = said.splitlines()
    assert (status, lines[0]) == (0, policy)
    made_by = [line.strip() for line in lines if line.lstrip().startswith("settings ") and ", git " in line]
    assert len(made_by) == 5  # commits
    assert {line.partition(", ")[2] for line in made_by} == {f"git 5f2c9a1e77b0, image {IMAGE}"}
    for stage, round_number in (("prepare_data", 0), ("annotate", 1)):
        manifest = run.store.manifest(finished_uri(run, stage, round_number))
        for file in manifest.files:
            assert [line.split() for line in lines].count([file.sha256, file.path]) == 1
    assert f"{run.run_uri}: settings {run.settings.digest()[:12]}" in lines
    assert "  base model tiny: no digest is known" in lines
    heads = [lines.index(f"  {how} profile tiny has it:") for how in ("other than", "as")]
    assert set(lines[heads[0] + 1 : heads[1]]) == {
        f"    {key}={run.settings.flat()[key]}" for key in ("annotate.annotator", "rounds", "store.uri")
    }
    settings = [line for line in lines if line.startswith("    ") and "=" in line]
    assert sorted(settings) == sorted(f"    {key}={value}" for key, value in run.settings.flat().items())


def test_of_a_run_that_it_started_from_only_other_settings_are_told(run: RunContext) -> None:
    for stage in ("reward_model", "cost_model", "evaluate"):
        commit(run, stage, 1, [finished_uri(run, "annotate", 1)])
    commit(run, "evaluate", 0, [finished_uri(run, "sft", 0)])
    name = f"{run.run_id}-b"
    where = ("annotate.annotator=human", f"start.from_run={run.run_id}", "start.from_round=2")
    later = start(run.store.root_uri, name, *where, "ppo.steps=3", rounds=2)
    registered(later, commit(later, "ppo_lagrangian", 2, [finished_uri(later, "ppo_lagrangian", 1)]))
    _, said = lineage(name)
    assert "    ppo.steps=3\n" in said
    assert said.splitlines()[-7:] == [
        f"{run.run_uri}: settings {run.settings.digest()[:12]}",
        "  base model tiny: no digest is known",
        f"  other than in {later.run_uri}:",
        "    rounds=1",
        "    start.from_run=",
        "    start.from_round=0",
        "    ppo.steps=2",
    ]


@pytest.mark.fault
def test_row_09_a_run_of_another_version_is_told_as_it_was_and_read_but_not_gone_on_with(
    run: RunContext, caplog: pytest.LogCaptureFixture
) -> None:
    policy = finished_uri(run, "ppo_lagrangian", 1)
    same = lineage_text(run.store, policy)
    record_as_another_version(run, "collect", "warmth", 0.5)
    told = lineage_text(run.store, policy)
    assert "    collect.warmth=0.5\n" in told and "warmth" not in same
    assert told.count("settings ") == same.count("settings ")
    assert f"{run.run_uri}: settings {run.settings.digest()[:12]}" not in told
    assert open_earlier_run(run.run_uri).settings == run.settings
    assert "settings of another version are left out: 'collect.warmth'" in caplog.text
    with pytest.raises(SettingsError, match=r"run.json cannot be used: unknown setting 'collect.warmth'"):
        open_run(run.run_uri)


def test_what_names_no_version_and_no_run_is_refused(run: RunContext) -> None:
    registered(run, finished_uri(run, "ppo_lagrangian", 1))
    status, said = lineage("no-such-run")
    assert status == 1
    assert "has no version or alias 'no-such-run'" in said


def test_the_default_base_model_is_told_by_its_digest(run: RunContext) -> None:
    changed(run, base_model="smollm2-135m-instruct")
    assert f"  base model smollm2-135m-instruct: {SMOL_SHA256}  " in lineage_text(
        run.store, finished_uri(run, "ppo_lagrangian", 1)
    )


def test_a_base_model_that_is_a_commit_is_followed_once(run: RunContext) -> None:
    """Here it is the run's own SFT model, as no run can have it: the end is found all the same."""
    base = finished_uri(run, "sft", 0)
    changed(run, base_model=f"{base}/")
    lines = lineage_text(run.store, finished_uri(run, "ppo_lagrangian", 1)).splitlines()
    assert lines.count(base) == 1
    assert f"  base model {base}/: a commit, see above" in lines


@pytest.mark.fault
def test_settings_from_outside_are_shown_in_bounds_and_without_passwords(run: RunContext) -> None:
    annotate = run.settings.annotate.model_copy(update={"judge_url": "http://me:hidden@judge/v1"})
    changed(run, experiment="\x1b[2J\nline " + "x" * 100_000, annotate=annotate, profile="gone")
    said = lineage_text(run.store, finished_uri(run, "ppo_lagrangian", 1))
    assert all(line.isprintable() for line in said.splitlines())
    assert "hidden" not in said and "    annotate.judge_url=http://judge/v1\n" in said
    assert "... (100010 characters)\n" in said and len(said) < 20_000
    assert "  other than profile gone has it:\n    profile=gone\n" in said
