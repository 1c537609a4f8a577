"""What every stage of one pipeline run shares: its settings, its store, its MLflow run.

The first step writes `<run>/run.json`; every other step gets the run's URI and reads it there, so a step takes few
parameters and none of them can disagree with another step's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from components.foundation import distributed, logs
from components.foundation.checkpoint_store import CheckpointStore, git_sha
from components.foundation.errors import ConflictError, IntegrityError, OutOfMemoryError, SettingsError, StoreError
from components.foundation.metrics import Gauges, served_gauges
from components.foundation.outages import wait_out
from components.foundation.results import from_json, to_json
from components.foundation.settings import Settings, read_settings, read_settings_of_any_version
from components.foundation.tracking import SilentRun, StageRun, Tracker

ROUND_STAGES = ("collect", "annotate", "reward_model", "cost_model", "ppo_lagrangian", "evaluate")
"""Stages of every round, in their order; round 0 holds what happens once."""

RUN_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""What can name a run in the store, in MLflow and in a cluster."""

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")

log = logging.getLogger("saferlhf")

T = TypeVar("T")


@dataclass(frozen=True)
class RunDescription:
    """Content of run.json."""

    run_id: str
    mlflow_run_id: str
    settings_json: str


@dataclass(frozen=True)
class RunContext:
    """A pipeline run, opened."""

    run_id: str
    run_uri: str
    mlflow_run_id: str
    settings: Settings
    store: CheckpointStore
    tracker: Tracker

    def stage_uri(self, stage: str, round_number: int) -> str:
        """Where a stage's steps and its LATEST pointer are."""
        return f"{self.run_uri}/round-{round_number}/{stage}"

    def seed(self, stage: str, round_number: int) -> int:
        """Seed of a stage: a function of the run's seed, the stage and the round, and of nothing else."""
        digest = hashlib.sha256(f"{self.settings.seed}/{stage}/{round_number}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Stage:
    """One stage of one round while it runs.

    Attributes:
        folder: scratch folder; what `commit` is given usually lies in it.
        mlflow: the nested MLflow run; of several ranks only the first writes to it.
        gauges: what Prometheus may read.
        seed: seed of all its random choices.
    """

    context: RunContext
    name: str
    round: int
    folder: Path
    mlflow: StageRun | SilentRun
    gauges: Gauges
    seed: int
    started: float

    @property
    def checkpoints_uri(self) -> str:
        """Where the stage keeps its state while it trains."""
        return f"{self.context.stage_uri(self.name, self.round)}/checkpoints"

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """What training step `step` measured, counted from 1: to MLflow, to Prometheus, and the log says the step."""
        self.mlflow.log_metrics(metrics, step)
        self.gauges.set({**metrics, "step": step})
        logs.set_step(step)

    def finished(self) -> str | None:
        """URI of this stage's commit where an earlier attempt made it already: then there is nothing left to do."""
        done = distributed.from_main(lambda: standing_commit(self.context, self.name, self.round))
        if done is not None:
            self._discard_checkpoints()  # that attempt may have ended just before it did
        return done

    def commit(self, folder: Path, *, step: int, parents: Sequence[str]) -> str:
        """Commit a folder as `step-<n>`, point LATEST at it, and return its URI. All ranks call, rank 0 commits.

        A store that is away is waited for: with the process would go what it trained since its last checkpoint.
        """
        uri = f"{self.context.stage_uri(self.name, self.round)}/step-{step}"
        distributed.by_main(lambda: wait_out(lambda: self._commit(uri, folder, parents)))
        return uri

    def _commit(self, uri: str, folder: Path, parents: Sequence[str]) -> None:
        labels = {
            "stage": self.name,
            "round": str(self.round),
            "run_id": self.context.run_id,
            "seconds": f"{time.monotonic() - self.started:.3f}",
        }
        store, settings_digest = self.context.store, self.context.settings.digest()
        try:
            store.commit(uri, folder, parents=parents, labels=labels, settings_digest=settings_digest)
        except ConflictError:
            if not self._was_left_unnamed(uri, parents, settings_digest):
                raise
            log.warning("%s: what an earlier attempt committed counts, though this one made other files", uri)
        store.set_latest(self.context.stage_uri(self.name, self.round), uri)
        self._discard_checkpoints()

    def _was_left_unnamed(self, uri: str, parents: Sequence[str], settings_digest: str) -> bool:
        """Whether an attempt at the same work committed and was gone before LATEST said so.

        Its files may be others: on GPUs, or with a language model as judge, a repetition is not the same bits.
        """
        store = self.context.store
        if store.latest(self.context.stage_uri(self.name, self.round)) is not None or not store.is_whole(uri):
            return False
        standing = store.manifest(uri)
        return (list(standing.parents), standing.settings_digest) == (list(parents), settings_digest)

    def _discard_checkpoints(self) -> None:
        if distributed.world().is_main:
            self.context.store.prune(self.checkpoints_uri, keep=None)


def usual_uri(settings: Settings, run_id: str) -> str:
    """Where a run lies that was given no place of its own."""
    return f"{settings.store.uri.rstrip('/')}/runs/{run_id}"


def store_root(uri: str) -> str:
    """Where the store begins that a run, or a commit of one, lies in; empty where it is neither's URI."""
    return uri.rpartition("/runs/")[0]


def create_run(run_uri: str, run_id: str, settings: Settings) -> RunContext:
    """First step: check both servers, start the MLflow parent run, write run.json (once).

    Raises:
        SettingsError: the run exists, with other settings (how it is spread over devices may change).
    """
    store = CheckpointStore(settings.store.uri)
    store.ensure_bucket()
    store.probe()
    if store.has_text(f"{run_uri}/run.json"):
        check_same_settings(run_uri, settings)
    tracker = _tracker(settings)
    tracker.check()
    spread = {key: value for key, value in settings.flat().items() if key.startswith("distributed.")}
    parameters = {key: value for key, value in settings.flat().items() if key not in spread}
    # tags, unlike parameters, may change when a run goes on
    tags = {"profile": settings.profile, "settings_digest": settings.digest(), "git_sha": git_sha(os.environ)} | spread
    mlflow_run_id = tracker.start_pipeline_run(run_id, run_id, parameters, tags)
    description = RunDescription(run_id, mlflow_run_id, settings.model_dump_json())
    store.write_text(f"{run_uri}/run.json", to_json(description), overwrite=True)
    return RunContext(run_id, run_uri, mlflow_run_id, settings, store, tracker)


def open_run(run_uri: str) -> RunContext:
    """Open a run that is to go on; S3 and MLflow are found by AWS_ENDPOINT_URL and MLFLOW_TRACKING_URI.

    Raises:
        MissingError: there is no such run.
        IntegrityError, SettingsError: its run.json was changed, or another version wrote it.
    """
    return _open(run_uri, read_settings)


def open_earlier_run(run_uri: str) -> RunContext:
    """Open a run to read what it made; settings that only another version has are left out, with a warning."""
    return _open(run_uri, read_settings_of_any_version)


def _open(run_uri: str, read: Callable[[str], Settings]) -> RunContext:
    store = CheckpointStore(store_root(run_uri))
    description, settings = read_run(store, run_uri, read)
    return RunContext(description.run_id, run_uri, description.mlflow_run_id, settings, store, _tracker(settings))


def read_run(store: CheckpointStore, run_uri: str, read: Callable[[str], T]) -> tuple[RunDescription, T]:
    """Content of run.json, and the settings in it by a reader that raises SettingsError.

    Raises:
        MissingError: there is no such run.
        IntegrityError, SettingsError: it was changed, or another version wrote it.
    """
    text = store.read_text(f"{run_uri}/run.json")
    try:
        description = from_json(RunDescription, text)
        return description, read(description.settings_json)
    except (IntegrityError, SettingsError) as error:
        raise type(error)(f"{run_uri}/run.json cannot be used: {error}") from error


def check_same_settings(run_uri: str, now: Settings) -> None:
    """Raises: SettingsError unless the run was started with these (how it is spread over devices may differ)."""
    earlier = open_run(run_uri)
    if earlier.settings.digest() != now.digest():
        differences = ", ".join(now.differences(earlier.settings).values())
        raise SettingsError(
            f"run {earlier.run_id} was started with other settings ({differences}): give it the same --profile, --seed "
            "and --set, or start a new run, with --from-run RUN_ID to keep its first rounds"
        )


@contextmanager
def open_stage(run_uri: str, name: str, round_number: int, *, is_repeated: bool = False) -> Iterator[Stage]:
    """Open a run for one stage: logging, scratch folder, nested MLflow run, metrics, start time.

    A stage that has nothing left to do opens no MLflow run, unless it `is_repeated`: does its work at every start.
    """
    logs.configure_logging()
    context = open_run(run_uri)
    logs.set_place(logs.Place(context.run_id, round_number, name))
    started = time.monotonic()
    label = f"round {round_number} {name}" if round_number else name
    log.info("%s: started", label)
    with (
        tempfile.TemporaryDirectory(prefix=f"saferlhf-{name}-") as folder,
        served_gauges(context.run_id, name, round_number) as gauges,
        _tracked(context, name, round_number, is_repeated) as mlflow,
        _failure_as_event(label),
        _memory_explained(label),
    ):
        seed = context.seed(name, round_number)
        yield Stage(context, name, round_number, Path(folder), mlflow, gauges, seed, started)
    log.info("%s: done in %.1f s", label, time.monotonic() - started)


@contextmanager
def _failure_as_event(label: str) -> Iterator[None]:
    """A log of JSON events has the error that ends a stage; in a plain one, Python's own traceback says it."""
    try:
        yield
    except Exception:
        if logs.is_json():
            log.exception("%s: failed", label)
        raise


@contextmanager
def _memory_explained(label: str) -> Iterator[None]:
    """torch has an error of its own for GPUs only; of main memory it says so in the text."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = (str(error).splitlines() or ["no memory"])[0]
        if not isinstance(error, MemoryError) and not any(words in said for words in _OUT_OF_MEMORY):
            raise
        raise OutOfMemoryError(
            f"{label}: out of memory ({said}): set distributed.activation_checkpointing=true, lower the stage's batch "
            "size or its lengths, spread it over more devices (distributed.processes, distributed.zero_stage), or "
            "give it a larger machine; started again as it is, it would end alike"
        ) from error


def _tracked(
    context: RunContext, name: str, round_number: int, is_repeated: bool
) -> AbstractContextManager[StageRun | SilentRun]:
    if distributed.world().is_main:
        is_done = not is_repeated and standing_commit(context, name, round_number) is not None
        return context.tracker.stage(context.mlflow_run_id, name, round_number, is_done=is_done)
    return nullcontext(SilentRun())


def standing_commit(context: RunContext, name: str, round_number: int) -> str | None:
    """URI of a stage's newest commit, if every object of it is there; None where the stage has to run.

    What is left of a commit that lost objects is deleted: the stage, run again, could not commit over it.
    """
    stage_uri = context.stage_uri(name, round_number)
    latest = context.store.latest(stage_uri)
    if latest is None or context.store.is_whole(latest):
        return latest
    log.warning("%s: objects of %s are gone: the stage runs again", name, latest)
    context.store.discard_latest(stage_uri)
    return None


def finished_uri(context: RunContext, name: str, round_number: int) -> str:
    """URI of a stage's newest commit.

    Raises:
        StoreError: the stage has committed nothing.
    """
    uri = context.store.latest(context.stage_uri(name, round_number))
    if uri is None:
        raise StoreError(f"{context.stage_uri(name, round_number)} holds no finished {name}: run that stage first")
    return uri


def _tracker(settings: Settings) -> Tracker:
    return Tracker(os.environ.get("MLFLOW_TRACKING_URI", ""), settings.experiment)
