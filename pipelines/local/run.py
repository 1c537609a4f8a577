"""Runs the pipeline on this machine with KFP's own local runner, and sums the run up.

The runner executes each step as a subprocess; its output, and ours, goes through a `Screen`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from components.foundation.base_model import check_base_model
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import (
    LabelsAwaited,
    NothingNew,
    SettingsError,
    StoreError,
    TrackingError,
    TrainingError,
)
from components.foundation.rollout.vllm_server import find_vllm_python
from components.foundation.run_context import check_same_settings
from components.foundation.settings import Settings
from components.foundation.tracking import RunStatus, Tracker
from components.notify.notify import notify
from components.prepare_data.take_over import commits_to_take_over
from pipelines.local.memory import PeakMemory
from pipelines.local.prefork import as_sys_executable, is_forked_step, preforked_python
from pipelines.local.screen import Screen
from pipelines.local.services import local_services
from pipelines.local.summary import RunFacts, closing_words, write_summary

_STEP_PROGRAM = "kfp.dsl.executor_main"
_SAVING_SECONDS = 120
"""Patience with a step that was asked to stop: its rollout batch, and a checkpoint to S3."""
_WORDS: dict[RunStatus, str] = {
    "FINISHED": "succeeded",
    "FAILED": "failed",
    "KILLED": "cancelled",
    "SCHEDULED": "waiting",
}


@dataclass(frozen=True)
class LocalRun:
    """What the user asked for."""

    settings: Settings
    overrides: tuple[str, ...]
    work_dir: Path
    run_id: str
    resumed: bool = False
    go_on: str = ""  # the command that goes on with it when it has stopped

    @property
    def run_uri(self) -> str:
        return f"{self.settings.store.uri.rstrip('/')}/runs/{self.run_id}"


def run_here(run: LocalRun) -> Path:
    """Start the servers, run every step, write summary.json; returns its path.

    Raises:
        LabelsAwaited: people have to label first; the run goes on when it is resumed.
        NothingNew: there is too little new data; the run is over.
        SaferlhfError: the sentence that the failing step printed.
    """
    started = time.monotonic()
    if run.settings.ppo.engine == "vllm":
        find_vllm_python(run.settings.ppo.vllm_python)
    run.work_dir.mkdir(parents=True, exist_ok=True)
    with _environment(_for_steps(run)):
        check_base_model(run.settings.base_model)  # in the run's cache
    with (
        PeakMemory() as memory,
        _stop_steps_on_signals(),
        _environment(_for_steps(run)),
        preforked_python() as python,
        local_services(run.work_dir) as endpoints,
        _environment(endpoints.environment),
    ):
        screen = Screen()
        screen.line(f"S3 at {endpoints.s3_url}, MLflow at {endpoints.tracking_uri}, run {run.run_id}")
        CheckpointStore(run.settings.store.uri).ensure_bucket()
        if run.resumed:  # what is refused here leaves the run as it is, and tells nobody that it failed
            if not CheckpointStore(run.settings.store.uri).has_text(f"{run.run_uri}/run.json"):
                raise SettingsError(
                    f"there is no run {run.run_id} in {run.work_dir} to resume: leave --resume out to start one"
                )
            check_same_settings(run.run_uri, run.settings)
        commits_to_take_over(run.run_uri, run.settings)
        status: RunStatus = "KILLED"
        try:
            _run_pipeline(run, screen, python)
            facts = RunFacts(
                run_uri=run.run_uri,
                wall_seconds=time.monotonic() - started,
                peak_memory_bytes=memory.bytes,
                tracking_uri=endpoints.tracking_uri,
            )
            summary = write_summary(run.work_dir, facts)
            status = "FINISHED"
        except LabelsAwaited:
            status = "SCHEDULED"
            raise
        except NothingNew:
            status = "FINISHED"
            raise
        except Exception:
            status = "FAILED"
            _say_how_to_go_on(run, screen)
            raise
        finally:
            notify(run.run_uri, run.run_id, _WORDS[status])
            _close_tracking(endpoints.tracking_uri, run, status)
        screen.line(closing_words(run.work_dir))
    return summary


def _run_pipeline(run: LocalRun, screen: Screen, python: str) -> None:
    from kfp import local  # a second of imports, which the servers meanwhile need as well

    from pipelines.safe_rlhf import build_pipeline

    arguments = {
        "run_uri": run.run_uri,
        "run_id": run.run_id,
        "run_profile": run.settings.profile,
        "run_seed": run.settings.seed,
        "run_set": json.dumps(list(run.overrides)),
    }
    with (
        tempfile.TemporaryDirectory(prefix="saferlhf-kfp-") as root,
        contextlib.redirect_stdout(screen),
        as_sys_executable(python),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", module=r"kfp\.local")  # "display_name has no effect", for every step
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=root, raise_on_error=True)
        try:
            build_pipeline(run.settings.rounds)(**arguments)
        except RuntimeError as error:
            if screen.waiting:
                raise LabelsAwaited(screen.waiting) from None
            raise TrainingError(screen.last_error or f"the pipeline failed: {error}") from error
        finally:
            screen.close()
    if screen.nothing_new:
        raise NothingNew(screen.nothing_new)


def _say_how_to_go_on(run: LocalRun, screen: Screen) -> None:
    """Unless there is nothing to go on with, or nobody to ask: what went wrong is told after this."""
    with contextlib.suppress(StoreError):
        if run.go_on and CheckpointStore(run.settings.store.uri).has_text(f"{run.run_uri}/run.json"):
            screen.line(f"run {run.run_id} has failed; once the cause is mended, go on with: {run.go_on}")


def _close_tracking(tracking_uri: str, run: LocalRun, status: RunStatus) -> None:
    try:
        tracker = Tracker(tracking_uri, run.settings.experiment)
        mlflow_run = tracker.find_pipeline_run(run.run_id)
        if mlflow_run is not None:
            tracker.finish_pipeline_run(mlflow_run, status)
    except TrackingError:
        if status == "FINISHED":  # else what ended the run matters more
            raise


def _for_steps(run: LocalRun) -> dict[str, str]:
    """Environment variables of the steps, beside those that name the servers."""
    bin_folder = str(Path(sys.executable).parent)
    return {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        # threads that spin for long while they wait make a step many times slower as soon as another process wants a
        # core; threads that do not spin at all make every step a fifth slower
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "4000"),
        "SAFERLHF_CACHE": os.environ.get("SAFERLHF_CACHE") or str(run.work_dir.resolve() / "cache"),
    }


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Add to the environment; it is put back afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _stop_steps_on_signals() -> Iterator[None]:
    """The runner leaves its step running when it is told to end: take the step with us.

    A training step saves its state first, for which it needs the servers. A second signal does not wait for that; but
    a closed terminal sends several, and takes no more words.
    """
    stopping = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping and number == signal.SIGHUP:
            return
        steps = _steps_in_progress()
        if stopping:
            _kill(steps)
        elif steps:
            stopping = True
            with contextlib.suppress(OSError):
                print("saferlhf: stopping, once the step in progress is saved; again to stop now", file=sys.stderr)
            for step in steps:
                with contextlib.suppress(psutil.NoSuchProcess):
                    step.terminate()
            _kill(psutil.wait_procs(steps, timeout=_SAVING_SECONDS)[1])
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _steps_in_progress() -> list[psutil.Process]:
    """Steps of this run; none before there are servers for them."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    return [child for child in psutil.Process().children(recursive=True) if _is_step(child)]


def _kill(processes: Sequence[psutil.Process]) -> None:
    """Also what they have started: torchrun's ranks outlive it, and would go on writing."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


def _is_step(process: psutil.Process) -> bool:
    """Or KFP's shell around it, which a Ctrl-C has perhaps ended already."""
    with contextlib.suppress(psutil.Error):
        return is_forked_step(process) or any(_STEP_PROGRAM in part for part in process.cmdline())
    return False
