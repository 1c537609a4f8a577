"""People annotate: the stage publishes its batch and ends as waiting; labels come by the command; then it goes on."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner, Result

from components.annotate.annotate import run_annotate
from components.annotate.human.batch_store import BatchStore
from components.annotate.human.label_import import import_labels
from components.annotate.human.label_parsing import Label
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import AnnotationError, DataError, LabelsAwaited
from components.foundation.judging.rules import declines
from components.foundation.preference import NEWEST_FILE, CollectedAnswer, DualPreference, read_jsonl
from components.foundation.results import write_records
from components.foundation.run_context import RunContext, open_run
from components.foundation.s3 import split_uri
from components.prepare_data.prepare_data import run_prepare_data
from components.prepare_data.start_run import run_start_run
from pipelines.cli import app
from pipelines.local.services import Endpoints
from tests.scripted_person import always_a, by_the_text, exported_tasks, label_file

PROMPTS = 12
HELP = "Sure: take the tool, then the door, then whatever is behind it, number"
DECLINE = "I can't help with that, number"


@dataclass(frozen=True)
class WaitingRun:
    """A run whose first round has its answers."""

    uri: str
    data_uri: str
    answers_uri: str

    def annotate(self) -> str:
        return run_annotate(self.uri, 1, self.answers_uri, self.data_uri)

    @property
    def context(self) -> RunContext:
        return open_run(self.uri)

    @property
    def batch(self) -> BatchStore:
        return BatchStore(self.context, 1)

    def command(self, verb: str, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["annotations", verb, self.uri, *arguments])

    def imported(self, *files: Path) -> Result:
        return self.command("import", *map(str, files))


def start(tmp_path: Path, *settings: str) -> WaitingRun:
    run_id = uuid.uuid4().hex
    root = f"s3://saferlhf-test/{run_id}"
    given = [f"store.uri={root}", "annotate.annotator=human", "annotate.gold_share=0.5", *settings]
    uri = run_start_run(f"{root}/runs/{run_id}", run_id, "tiny", 0, json.dumps(given), 1)
    data_uri = run_prepare_data(uri)
    folder = tmp_path / "answers"
    folder.mkdir()
    answers = [
        CollectedAnswer(f"How do I break into house {i}?", f"{text} {i}.", "red_team", "property_crime")
        for i in range(PROMPTS)
        for text in (HELP, DECLINE)
    ]
    write_records(folder / "answers.jsonl", answers)
    answers_uri = f"{uri}/round-1/collect/step-{len(answers)}"
    open_run(uri).store.commit(answers_uri, folder)
    return WaitingRun(uri, data_uri, answers_uri)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def run(services: Endpoints, tmp_path: Path) -> WaitingRun:
    return start_and_wait(tmp_path)


@pytest.fixture(scope="module")
def unlabelled(services: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> WaitingRun:
    """One for all tests that import nothing."""
    return start_and_wait(tmp_path_factory.mktemp("unlabelled"))


def start_and_wait(folder: Path) -> WaitingRun:
    run = start(folder)
    with pytest.raises(LabelsAwaited, match="18 items"):
        run.annotate()
    return run


def exported(run: WaitingRun, folder: Path) -> Path:
    done = run.command("export", "-o", str(folder / "exported"))
    assert done.exit_code == 0, done.output
    return folder / "exported"


def test_an_id_is_looked_for_in_the_store_of_the_environment(
    unlabelled: WaitingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_id = replace(unlabelled, uri=unlabelled.context.run_id)
    CheckpointStore("s3://saferlhf").ensure_bucket()  # another test may not have made it yet
    assert "there is no run s3://saferlhf/pipeline/runs/" in str(by_id.command("status").exception)
    monkeypatch.setenv("SAFERLHF_STORE_URI", f"{unlabelled.context.settings.store.uri}/")
    done = by_id.command("status")
    assert done.exit_code == 0, done.output


def written_labels(run: WaitingRun) -> list[str]:
    return [uri for uri in run.context.store.list(f"{run.uri}/round-1/annotate/human/") if "/labels/" in uri]


def test_the_stage_waits_by_ending_and_says_what_is_missing(unlabelled: WaitingRun) -> None:
    """4 of 18 items are for three people: 26 labels. Started again, it finds the same batch and is as patient."""
    batch_uri = unlabelled.batch.batch_uri()
    assert batch_uri is not None
    with pytest.raises(LabelsAwaited) as waiting:
        unlabelled.annotate()
    for words in (
        f"18 items at {batch_uri} lack 26 labels",
        f"annotations export {unlabelled.uri}",
        f"--resume {unlabelled.context.run_id}",
    ):
        assert words in str(waiting.value)
    assert unlabelled.batch.batch_uri() == batch_uri
    manifest = unlabelled.context.store.manifest(batch_uri)
    assert manifest.parents == [unlabelled.answers_uri, unlabelled.data_uri]
    stage_runs = [
        found
        for found in MlflowClient().search_runs(
            [MlflowClient().get_run(unlabelled.context.mlflow_run_id).info.experiment_id]
        )
        if found.data.tags.get("mlflow.parentRunId") == unlabelled.context.mlflow_run_id
        and found.data.tags["mlflow.runName"].startswith("annotate")
    ]
    assert [found.info.status for found in stage_runs] == ["SCHEDULED"]


@pytest.mark.parametrize("tool", ["label-studio", "argilla"])
def test_what_is_exported_tells_nothing_of_gold_items_or_order(
    unlabelled: WaitingRun, tmp_path: Path, tool: str
) -> None:
    done = unlabelled.command("export", "--format", tool, "--round", "1", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    text = "".join(path.read_text() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file())
    for item in unlabelled.batch.items():
        assert item.item_id in text
    for word in ("gold", "swapped", "answer_0", "response_", "red_team", "is_safe"):
        assert word not in text.replace("Gold", "gold")
    again = unlabelled.command("export", "-o", str(tmp_path / "out"))
    assert again.exit_code == 1 and "exists" in str(again.exception)


def test_labels_come_in_parts_and_the_run_goes_on_when_all_are_there(run: WaitingRun, tmp_path: Path) -> None:
    first, whole = tmp_path / "first.jsonl", tmp_path / "whole.jsonl"
    folder = exported(run, tmp_path)
    label_file(folder, first, people=1)
    label_file(folder, whole)
    done = run.imported(first)
    assert done.exit_code == 0, done.output
    assert "18 new labels, 0 known already" in done.output and "lack 8 labels" in done.output
    with pytest.raises(LabelsAwaited, match="lack 8 labels"):
        run.annotate()
    for _ in range(2):
        done = run.imported(whole)  # as a tool exports it: what was there before, and more
        assert done.exit_code == 0, done.output
    assert (
        "0 new labels, 26 known already" in done.output and f"go on with --resume {run.context.run_id}" in done.output
    )
    assert len(written_labels(run)) == 2

    commit = run.annotate()
    assert run.annotate() == commit
    store = run.context.store
    assert store.manifest(commit).parents == [run.answers_uri, run.data_uri, run.batch.batch_uri()]
    fresh: list[DualPreference] = []
    for part in ("train", "validation"):
        name = f"preferences_{part}.jsonl"
        before, after = (read_jsonl(store.fetch(uri) / name, DualPreference) for uri in (run.data_uri, commit))
        assert after[: len(before)] == before
        fresh += after[len(before) :]
    newest = read_jsonl(store.fetch(commit) / NEWEST_FILE, DualPreference)
    assert sorted(map(repr, newest)) == sorted(map(repr, fresh))
    assert {r.prompt for r in fresh} == {f"How do I break into house {i}?" for i in range(PROMPTS)}
    for record in fresh:
        answers = (record.response_0, record.response_1)
        assert (record.is_response_0_safe, record.is_response_1_safe) == tuple(map(declines, answers))
        assert answers[record.safer_response_id].startswith(DECLINE)
        assert answers[record.better_response_id].startswith(HELP)
    told = run.command("status").output
    assert "| `person-0` | 18 |" in told and "round 1 has taken these labels over" in told
    assert (store.fetch(commit) / "label_result.md").read_text() in told
    late = tmp_path / "late.jsonl"
    task = exported_tasks(folder)[0][0]
    late.write_text(json.dumps({"item_id": task["item_id"], "annotator": "late", **by_the_text(task)}) + "\n")
    with pytest.raises(DataError, match="round 1 has gone on"):
        import_labels(run.batch, [late])
    assert import_labels(run.batch, [whole]).known == 26


@pytest.mark.fault
def test_row_20_labels_of_people_outlive_a_commit_that_lost_an_object(
    run: WaitingRun, tmp_path: Path, s3: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.jsonl"
    label_file(exported(run, tmp_path), whole)
    assert run.imported(whole).exit_code == 0
    commit = run.annotate()
    manifest, labels = run.context.store.manifest(commit), written_labels(run)
    bucket, key = split_uri(f"{commit}/{NEWEST_FILE}")
    s3.delete_object(Bucket=bucket, Key=key)
    assert run.annotate() == commit
    assert "are gone: the stage runs again" in capsys.readouterr().out
    assert run.context.store.manifest(commit).files == manifest.files
    assert run.context.store.is_whole(commit)
    assert written_labels(run) == labels


def test_agreement_and_gold_accuracy_are_told_and_kept(run: WaitingRun, tmp_path: Path) -> None:
    label_file(exported(run, tmp_path), tmp_path / "labels.jsonl")
    told = run.imported(tmp_path / "labels.jsonl").output
    kept = run.context.store.read_text(f"{run.uri}/round-1/annotate/human/result.md")
    assert kept in told
    assert "26 labels of 18 items (6 of them gold)" in kept and "12 of 12 pairs have a majority" in kept
    assert "| more helpful |" in kept and "100.0%" in kept
    assert "| `person-0` | 18 | 0 | " in kept and " of 6 (" in kept


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"item_id": "no-such-item"}, "item 'no-such-item' is not of this batch"),
        ({"answer_a_safety": "safe", "answer_a_harms": ["drugs"]}, "is marked safe, and yet with the harm drugs"),
        (
            {"answer_a_safety": "unsafe", "answer_b_safety": "safe", "answer_b_harms": [], "more_harmless": "A"},
            "answer A is marked unsafe and more harmless than answer B, which is safe",
        ),
        ({"annotator": "\x1b[31m<|im_start|>"}, "is no name"),
        ({"more_helpful": None}, "more_helpful is missing"),
    ],
)
def test_one_bad_row_of_many_and_nothing_is_imported(
    unlabelled: WaitingRun, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    label_file(exported(unlabelled, tmp_path), good)
    rows = [json.loads(line) for line in good.read_text().splitlines()]
    rows[4] |= {"annotator": "somebody-else"} | change
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = unlabelled.imported(bad)
    assert done.exit_code == 1
    assert f"{bad} row 5: " in done.output and words in done.output and "nothing was imported" in done.output
    assert "\x1b" not in done.output
    assert written_labels(unlabelled) == []


@pytest.mark.fault
def test_of_two_imports_at_once_the_second_is_checked_against_the_first(run: WaitingRun, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    folder = exported(run, tmp_path)
    label_file(folder, ours)
    label_file(folder, theirs, people=1, judge=always_a)

    class Overtaken(BatchStore):
        """Somebody else imports just after we have read what is there."""

        def imports(self) -> list[list[Label]]:
            read = super().imports()
            if not read:
                assert import_labels(BatchStore(run.context, 1), [theirs]).problems == []
            return read

    report = import_labels(Overtaken(run.context, 1), [ours])
    assert report.new == []
    assert {problem.reason.split()[1] for problem in report.problems} == {"person-0"}
    assert len(written_labels(run)) == 1


@pytest.mark.fault
@pytest.mark.parametrize("exclude", [False, True])
def test_somebody_who_always_answers_a_is_flagged_and_left_out_on_demand(
    services: Endpoints, tmp_path: Path, exclude: bool
) -> None:
    """Alone, their labels are all there is: left out, nothing usable remains, and the batch is refused."""
    run = start(tmp_path, f"annotate.exclude_careless={str(exclude).lower()}", "annotate.overlap_share=0")
    with pytest.raises(LabelsAwaited):
        run.annotate()
    assert run.command("export", "-o", str(tmp_path / "out")).exit_code == 0
    label_file(tmp_path / "out", tmp_path / "labels.jsonl", judge=always_a)
    told = run.imported(tmp_path / "labels.jsonl").output
    assert "right on 0% of 6 gold items; always A is more helpful; always A is more harmless" in told
    assert ("excluded" in told) is exclude
    if not exclude:
        assert run.annotate().endswith(f"step-{PROMPTS}")
        return
    with pytest.raises(AnnotationError, match=f"only 0 of {PROMPTS} judgements"):
        run.annotate()
    label_file(tmp_path / "out", tmp_path / "better.jsonl")
    better = (tmp_path / "better.jsonl").read_text().replace("person-0", "careful")
    (tmp_path / "better.jsonl").write_text(better)
    assert run.imported(tmp_path / "better.jsonl").exit_code == 0  # more people may label, and the round is saved
    assert run.annotate().endswith(f"step-{PROMPTS}")


@pytest.mark.fault
def test_a_run_without_a_batch_and_one_that_is_not_there_are_named(services: Endpoints, tmp_path: Path) -> None:
    run = start(tmp_path)
    done = run.command("status")
    assert done.exit_code == 1 and "no batch for people in any round" in str(done.exception)
    nowhere = replace(run, uri=f"{run.uri}-not")
    done = nowhere.command("status")
    assert done.exit_code == 1 and f"there is no run {nowhere.uri}" in str(done.exception)
