"""The stage that annotates, by rules: what its commit hands to the models of the round."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from components.annotate.annotate import run_annotate
from components.foundation.checkpoint_store import CheckpointStore
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
Prepared = Callable[..., tuple[str, str, CheckpointStore]]


@pytest.fixture
def prepared(services: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """Starts a run with settings and prepares its data: URI of the run, that of the data, and their store."""
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "cache"))

    def prepare(*settings: str) -> tuple[str, str, CheckpointStore]:
        run_id = uuid.uuid4().hex
        root = f"s3://saferlhf-test/{run_id}"
        run = run_start_run(f"{root}/runs/{run_id}", run_id, "tiny", 0, json.dumps([f"store.uri={root}", *settings]), 1)
        return run, run_prepare_data(run), open_run(run).store

    return prepare


def collected(run: str, store: CheckpointStore, folder: Path, answers: Sequence[CollectedAnswer]) -> str:
    """What the run's first round has sampled: its URI."""
    folder.mkdir()
    write_records(folder / "answers.jsonl", answers)
    uri = f"{run}/round-1/collect/step-{len(answers)}"
    store.commit(uri, folder)
    return uri


def about_theft(prompts: Iterable[str]) -> list[CollectedAnswer]:
    """An answer that goes along with each prompt, and one that declines."""
    return [CollectedAnswer(p, f"{text} {i}.", "red_team", "theft") for i, p in enumerate(prompts) for text in TEXTS]


@pytest.mark.parametrize("history", ["accumulate", "replace"])
def test_the_models_of_a_round_learn_from_all_preferences_so_far_or_from_its_own_alone(
    prepared: Prepared, tmp_path: Path, history: str
) -> None:
    run, data, store = prepared(f"data.history={history}")
    answers = about_theft(f"How to rob house {i}?" for i in range(40))
    annotated = run_annotate(run, 1, collected(run, store, tmp_path / "collected", answers), data)

    def records(uri: str, *files: str) -> Sequence[DualPreference]:
        return [record for file in files for record in read_jsonl(store.fetch(uri) / file, DualPreference)]

    fresh = records(annotated, NEWEST_FILE)
    assert len(fresh) == 40
    before = records(data, TRAINING_FILE, VALIDATION_FILE) if history == "accumulate" else []
    now = records(annotated, TRAINING_FILE, VALIDATION_FILE)
    assert sorted(map(repr, now)) == sorted(map(repr, [*before, *fresh]))


def test_a_prompt_that_is_answered_anew_stays_on_the_side_that_it_was_on(prepared: Prepared, tmp_path: Path) -> None:
    """Else a model would be measured on prompts that it was trained on."""
    run, data, store = prepared()

    def prompts(uri: str, file: str) -> set[str]:
        return {record.prompt for record in read_jsonl(store.fetch(uri) / file, DualPreference)}

    sides = [prompts(data, file) for file in (TRAINING_FILE, VALIDATION_FILE)]
    assert all(sides) and not sides[0] & sides[1]
    everything = sides[0] | sides[1]
    answers = collected(run, store, tmp_path / "collected", about_theft(sorted(everything)))
    annotated = run_annotate(run, 1, answers, data)
    assert prompts(annotated, NEWEST_FILE) == everything
    assert [prompts(annotated, file) for file in (TRAINING_FILE, VALIDATION_FILE)] == sides


def test_a_policy_with_one_answer_to_each_prompt_leaves_no_newest_pairs(prepared: Prepared, tmp_path: Path) -> None:
    """There is nothing to compare then; what was known before is what the models learn from."""
    run, data, store = prepared()
    answers = [CollectedAnswer(f"How to rob house {i}?", "Take the door.", "red_team", "theft") for i in range(4)] * 2
    annotated = store.fetch(run_annotate(run, 1, collected(run, store, tmp_path / "collected", answers), data))
    assert not (annotated / NEWEST_FILE).exists()
    assert (annotated / TRAINING_FILE).read_bytes() == (store.fetch(data) / TRAINING_FILE).read_bytes()
