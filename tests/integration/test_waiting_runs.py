"""A schedule whose runs are annotated by people: each of its runs finds the one that waits, and goes on with it."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from kfp import dsl
from mlflow import MlflowClient

from components.annotate.annotate import run_annotate
from components.annotate.human.batch_store import BatchStore
from components.annotate.human.label_import import import_labels
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import GateError, IntegrityError, LabelsAwaited, SettingsError
from components.foundation.preference import CollectedAnswer
from components.foundation.results import write_records
from components.foundation.run_context import finished_uri, open_run, open_stage
from components.foundation.s3 import S3
from components.foundation.settings import resolve_settings
from components.foundation.waiting_runs import remember_waiting
from components.notify.component import notify as exit_handler
from components.notify.notify import gather
from components.prepare_data.component import start_run
from components.prepare_data.prepare_data import run_prepare_data
from pipelines.local.services import Endpoints
from tests.scripted_person import label_file
from tests.unit.webhook_server import webhook

HUMAN = ("annotate.annotator=human", "annotate.gold_share=0.5")


@dataclass(frozen=True)
class Schedule:
    """A schedule in a store of its own, which the platform names, and in an experiment of its own."""

    root: str
    folder: Path

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.root)

    def start(self, *settings: str, kfp_run_id: str = "", run_uri: str = "") -> str:
        """The first step of the schedule's next run; its URI."""
        uri: str = start_run.python_func(
            run_uri=run_uri,
            run_id=kfp_run_id or str(uuid.uuid4()),
            kfp_run_id="",
            profile="tiny",
            seed=0,
            overrides=json.dumps([f"store.uri={self.root}", f"experiment={self.root}", *HUMAN, *settings]),
            rounds=2,
            pool_node_selector={},
            pool_tolerations=[],
        )
        return uri

    def tick(self, *settings: str, rounds: int = 1, kfp_run_id: str = "", run_uri: str = "") -> str:
        """The next run up to the annotation of the last of so many rounds; its URI."""
        uri = self.start(*settings, kfp_run_id=kfp_run_id, run_uri=run_uri)
        preferences_uri = run_prepare_data(uri)
        for number in range(1, rounds + 1):
            preferences_uri = run_annotate(uri, number, self._collected(uri, number), preferences_uri)
        return uri

    def waits(self, *settings: str, rounds: int = 1, kfp_run_id: str = "", run_uri: str = "") -> None:
        with pytest.raises(LabelsAwaited):
            self.tick(*settings, rounds=rounds, kfp_run_id=kfp_run_id, run_uri=run_uri)

    def label(self, uri: str, number: int = 1) -> None:
        """People label a round's batch."""
        batch, file = BatchStore(open_run(uri), number), self.folder / f"{uuid.uuid4().hex}.jsonl"
        label_file(batch.folder() / "label-studio", file)
        assert import_labels(batch, [file]).problems == []

    def _collected(self, uri: str, number: int) -> str:
        folder = self.folder / f"answers-{number}"
        folder.mkdir(exist_ok=True)
        answers = [
            CollectedAnswer(f"How do I break into house {number}.{i}?", f"{text} {i}.", "red_team", "property_crime")
            for i in range(12)
            for text in ("Sure: take the tool, then the door, number", "I can't help with that, number")
        ]
        write_records(folder / "answers.jsonl", answers)
        answers_uri = f"{uri}/round-{number}/collect/step-{len(answers)}"
        open_run(uri).store.commit(answers_uri, folder)
        return answers_uri

    def _named(self, end: str) -> list[str]:
        return [uri.removesuffix(end) for uri in self.store.list(f"{self.root}/runs/") if uri.endswith(end)]

    @property
    def runs(self) -> list[str]:
        return self._named("/run.json")

    @property
    def batches(self) -> list[str]:
        return [uri for uri in self._named("/MANIFEST.json") if "/annotate/human/batch-" in uri]

    @property
    def pointer(self) -> str:
        """URI of what names the run that waits."""
        (uri,) = self.store.list(f"{self.root}/waiting/")
        return uri


@pytest.fixture
def schedule(services: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Schedule:
    root = f"s3://saferlhf-test/{uuid.uuid4().hex}"
    monkeypatch.setenv("SAFERLHF_STORE_URI", root)
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "cache"))
    return Schedule(root, tmp_path)


@pytest.fixture
def waiting(schedule: Schedule) -> str:
    """The schedule's first run, which waits; its URI."""
    schedule.waits()
    (uri,) = schedule.runs
    return uri


def parent_status(uri: str) -> str:
    return str(MlflowClient().get_run(open_run(uri).mlflow_run_id).info.status)


def test_the_next_run_goes_on_where_people_have_labelled_meanwhile(
    schedule: Schedule, waiting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three runs of a schedule: the first two wait, the labels come, the third goes on. One run, one batch."""
    schedule.waits()
    schedule.label(waiting)
    capsys.readouterr()
    assert schedule.tick() == waiting
    words = f"goes on with run {open_run(waiting).run_id}, which waits for people's labels\n"
    assert capsys.readouterr().out.count(words) == 1
    assert (schedule.runs, len(schedule.batches)) == ([waiting], 1)
    assert finished_uri(open_run(waiting), "annotate", 1).endswith("/step-12")


def test_after_its_labels_a_run_is_left_alone_and_the_next_starts_anew(schedule: Schedule, waiting: str) -> None:
    schedule.label(waiting)
    assert schedule.tick() == waiting
    schedule.waits()
    (anew,) = {*schedule.runs} - {waiting}
    assert len(schedule.batches) == 2
    assert schedule.start() == anew


def test_a_run_that_waits_in_each_round_is_gone_on_with_in_each(schedule: Schedule, waiting: str) -> None:
    schedule.label(waiting)
    schedule.waits(rounds=2)
    assert schedule.store.read_text(schedule.pointer).endswith("/round-2/annotate\n")
    schedule.waits(rounds=2)
    schedule.label(waiting, 2)
    assert schedule.tick(rounds=2) == waiting
    assert (schedule.runs, len(schedule.batches)) == ([waiting], 2)


def test_mlflow_shows_the_run_as_waiting_and_as_running_again(schedule: Schedule, waiting: str) -> None:
    assert parent_status(waiting) == "SCHEDULED"
    assert schedule.start() == waiting
    assert parent_status(waiting) == "RUNNING"
    schedule.waits()
    assert parent_status(waiting) == "SCHEDULED"
    schedule.label(waiting)
    with open_stage(waiting, "annotate", 1):  # a Retry, which begins with the step that had failed
        assert parent_status(waiting) == "RUNNING"


def test_other_settings_are_another_run(schedule: Schedule, waiting: str) -> None:
    schedule.waits("annotate.overlap_share=0")
    assert len(schedule.runs) == len(schedule.batches) == 2
    assert schedule.start("annotate.annotator=rules") != waiting
    assert schedule.start("distributed.processes=2") == waiting  # how it is spread may change


def test_a_run_that_is_there_or_that_was_given_its_place_is_itself(schedule: Schedule, waiting: str) -> None:
    place = f"{schedule.root}/runs/mine"
    assert schedule.start(run_uri=place, kfp_run_id="mine") == place
    assert schedule.start(kfp_run_id="mine") == place  # as `submit --resume` asks for it
    elsewhere = f"{schedule.root}/by-hand/runs/other"
    schedule.label(waiting)
    schedule.tick()
    schedule.waits(f"store.uri={schedule.root}/by-hand", run_uri=elsewhere, kfp_run_id="other")
    assert schedule.start() not in (waiting, elsewhere)


def test_a_run_that_went_on_with_another_does_so_again_when_it_is_resumed(schedule: Schedule, waiting: str) -> None:
    """Even when the other waits no more: there the labels are."""
    schedule.label(waiting)
    assert schedule.tick(kfp_run_id="second") == waiting
    assert schedule.start(kfp_run_id="second") == waiting
    with pytest.raises(SettingsError, match="was started with other settings"):
        schedule.start("ppo.steps=3", kfp_run_id="second")
    schedule.store.prune(waiting, keep=None)
    assert schedule.start(kfp_run_id="second") == f"{schedule.root}/runs/second"


@pytest.mark.fault
def test_a_run_that_is_gone_is_forgotten(schedule: Schedule, waiting: str) -> None:
    schedule.store.prune(waiting, keep=None)
    schedule.waits()
    (anew,) = schedule.runs
    assert anew != waiting
    assert schedule.start() == anew


@pytest.mark.fault
def test_of_two_that_wait_the_first_is_gone_on_with(schedule: Schedule) -> None:
    """Both were started before either waited, as by hand beside a schedule."""
    first, second = schedule.start(), schedule.start()
    assert first != second
    for run_id in (first, second):
        schedule.waits(kfp_run_id=run_id.rpartition("/")[2])
    assert len(schedule.batches) == 2
    assert schedule.start() == first
    schedule.label(first)
    assert schedule.tick() == first
    schedule.waits(kfp_run_id=second.rpartition("/")[2])
    assert schedule.start() == second


@pytest.mark.fault
@pytest.mark.parametrize("standing", [False, True])
def test_of_two_that_begin_to_wait_at_once_one_is_named(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch, standing: bool
) -> None:
    """The other has looked before; its write comes too late, whether there was a name that counts no more or none."""
    first, second = schedule.start(), schedule.start()
    if standing:
        uri = f"{schedule.root}/waiting/{open_run(first).settings.digest()}"
        schedule.store.write_text(uri, "runs/gone/round-1/annotate\n")
    real_put, intruders = S3.put, [lambda: remember_waiting(open_run(first), "annotate", 1)]

    def put(self: S3, uri: str, text: str, condition: Mapping[str, str]) -> None:
        if intruders:
            intruders.pop()()
        real_put(self, uri, text, condition)

    monkeypatch.setattr(S3, "put", put)
    remember_waiting(open_run(second), "annotate", 1)
    assert schedule.store.read_text(schedule.pointer) == f"{first.removeprefix(schedule.root + '/')}/round-1/annotate\n"


@pytest.mark.fault
@pytest.mark.parametrize(
    "text",
    ["", "runs/a", "runs/../../x/round-1/annotate\n", "s3://other/runs/a/round-1/annotate\n", "\x1b[2J",
     "runs/a/round-1/annotate\nruns/b", "runs/a/round-1/../annotate\n", "runs/a/round-999/annotate\n"],
    ids=ascii,
)  # fmt: skip
def test_what_is_no_name_of_ours_is_refused_by_name(schedule: Schedule, text: str) -> None:
    own = schedule.start()
    uri = f"{schedule.root}/waiting/{open_run(own).settings.digest()}"
    schedule.store.write_text(uri, text)
    for act in (schedule.start, lambda: remember_waiting(open_run(own), "annotate", 1)):
        with pytest.raises(IntegrityError) as error:
            act()
        assert str(error.value).startswith(f"{uri} names ") and f"delete {uri}" in str(error.value)
        assert str(error.value).isprintable()


@pytest.mark.fault
def test_a_name_of_a_run_with_other_settings_is_refused(schedule: Schedule, waiting: str) -> None:
    other = resolve_settings(
        "tiny",
        0,
        [f"store.uri={schedule.root}", f"experiment={schedule.root}", *HUMAN, "rounds=2", "ppo.steps=3"],
    )
    schedule.store.write_text(f"{schedule.root}/waiting/{other.digest()}", schedule.store.read_text(schedule.pointer))
    with pytest.raises(IntegrityError, match="which has other settings: delete s3://"):
        schedule.start("ppo.steps=3")


@pytest.mark.fault
def test_the_notification_is_of_the_run_that_was_gone_on_with(
    schedule: Schedule, waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the exit handler gets it: Kubeflow's id of the run, and "failed" for one that waits as for one that failed."""
    with webhook([200]) as (url, bodies):
        monkeypatch.setenv("SAFERLHF_WEBHOOK_URL", url)

        def told(kfp_run_id: str, state: str) -> tuple[str, str]:
            final = dsl.PipelineTaskFinalStatus(state, "job", "task", 1, "why")
            exit_handler.python_func(run_uri="", run_id="", kfp_run_id=kfp_run_id, status=final)
            assert bodies[-1]["links"]["store"] == f"{schedule.root}/runs/{bodies[-1]['run_id']}"
            return bodies[-1]["run_id"], bodies[-1]["status"]

        run_id = open_run(waiting).run_id
        assert told(run_id, "FAILED") == (run_id, "waiting")
        schedule.waits(kfp_run_id="second")
        assert told("second", "FAILED") == (run_id, "waiting")
        with pytest.raises(IntegrityError):
            run_annotate(schedule.start(kfp_run_id="third"), 1, f"{waiting}/no/answers", f"{waiting}/no/data")
        assert told("third", "FAILED") == (run_id, "failed")
        schedule.label(waiting)
        schedule.tick(kfp_run_id="fourth")
        assert told("fourth", "SUCCEEDED") == (run_id, "succeeded")
        with pytest.raises(GateError), open_stage(waiting, "reward_model", 1):
            raise GateError("bad labels")
        assert told("fourth", "FAILED") == (run_id, "failed")
        assert told("never-started", "FAILED") == ("never-started", "failed")


@pytest.mark.fault
def test_without_mlflow_the_notification_says_what_kubeflow_says(
    schedule: Schedule, waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        told = gather(waiting, "w", "failed")
    assert (told.run_id, told.status, told.links) == (waiting.rpartition("/")[2], "failed", {"store": waiting})


@pytest.mark.fault
def test_a_note_that_is_no_name_of_ours_costs_no_notification(schedule: Schedule, waiting: str) -> None:
    place = f"{schedule.root}/runs/second"
    schedule.store.write_text(f"{place}/GOES_ON_WITH", "runs/../../other\n")
    told = gather(place, "second", "failed")
    assert (told.run_id, told.status, told.links) == ("second", "failed", {"store": place})
    with pytest.raises(IntegrityError, match=r"GOES_ON_WITH names 'runs/../../other"):
        schedule.start(kfp_run_id="second")
