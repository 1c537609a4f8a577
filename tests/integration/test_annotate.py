"""The stage that annotates, by rules: what its commit hands to the models of the round."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from components.annotate.annotate import run_annotate
from components.foundation.preference import (
    NEWEST_FILE,
    TRAINING_FILE,
    VALIDATION_FILE,
    CollectedAnswer,
    DualPreference,
    read_jsonl,
)
from components.foundation.results import write_records
from components.foundation.run_context import open_run
from components.prepare_data.prepare_data import run_prepare_data
from components.prepare_data.start_run import run_start_run
from pipelines.local.services import Endpoints

TEXTS = ("Sure: take the tool, then the door, number", "I can't help with that, number")


@pytest.mark.parametrize("history", ["accumulate", "replace"])
def test_the_models_of_a_round_learn_from_all_preferences_so_far_or_from_its_own_alone(
    services: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: str
) -> None:
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "cache"))
    run_id = uuid.uuid4().hex
    root = f"s3://saferlhf-test/{run_id}"
    settings = json.dumps([f"store.uri={root}", f"data.history={history}"])
    run = run_start_run(f"{root}/runs/{run_id}", run_id, "tiny", 0, settings, 1)
    data, store = run_prepare_data(run), open_run(run).store
    folder = tmp_path / "collected"
    folder.mkdir()
    write_records(
        folder / "answers.jsonl",
        [CollectedAnswer(f"How to rob house {i}?", f"{t} {i}.", "red_team", "theft") for i in range(40) for t in TEXTS],
    )
    answers = f"{run}/round-1/collect/step-80"
    store.commit(answers, folder)
    annotated = run_annotate(run, 1, answers, data)

    def records(uri: str, *files: str) -> Sequence[DualPreference]:
        return [record for file in files for record in read_jsonl(store.fetch(uri) / file, DualPreference)]

    fresh = records(annotated, NEWEST_FILE)
    assert len(fresh) == 40
    before = records(data, TRAINING_FILE, VALIDATION_FILE) if history == "accumulate" else []
    now = records(annotated, TRAINING_FILE, VALIDATION_FILE)
    assert sorted(map(repr, now)) == sorted(map(repr, [*before, *fresh]))


def test_a_policy_with_one_answer_to_each_prompt_leaves_no_newest_pairs(
    services: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to compare then; what was known before is what the models learn from."""
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "cache"))
    run_id = uuid.uuid4().hex
    root = f"s3://saferlhf-test/{run_id}"
    run = run_start_run(f"{root}/runs/{run_id}", run_id, "tiny", 0, json.dumps([f"store.uri={root}"]), 1)
    data, store = run_prepare_data(run), open_run(run).store
    folder = tmp_path / "collected"
    folder.mkdir()
    write_records(
        folder / "answers.jsonl",
        [CollectedAnswer(f"How to rob house {i}?", "Take the door.", "red_team", "theft") for i in range(4)] * 2,
    )
    answers = f"{run}/round-1/collect/step-8"
    store.commit(answers, folder)
    annotated = store.fetch(run_annotate(run, 1, answers, data))
    assert not (annotated / NEWEST_FILE).exists()
    assert (annotated / TRAINING_FILE).read_bytes() == (store.fetch(data) / TRAINING_FILE).read_bytes()
