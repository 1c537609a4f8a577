"""How a run on this machine ends, as the webhook is told; the pipeline itself is a stand-in."""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from pathlib import Path

import psutil
import pytest

from components.foundation.errors import SettingsError, TrainingError
from components.foundation.run_context import create_run
from components.foundation.settings import resolve_settings
from pipelines.local import run as local
from pipelines.local.run import LocalRun, run_here
from pipelines.local.services import Endpoints
from tests.unit.webhook_server import webhook


@pytest.mark.fault
@pytest.mark.parametrize(
    ("error", "seen", "status"),
    [
        (ValueError, ValueError, "failed"),
        (RuntimeError, TrainingError, "failed"),
        (KeyboardInterrupt, KeyboardInterrupt, "cancelled"),
    ],
)
def test_only_an_interrupted_run_is_told_as_cancelled(
    services: Endpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    seen: type[BaseException],
    status: str,
) -> None:
    """A RuntimeError is how KFP's runner says that a step failed; another error is a bug of ours."""

    def breaks(rounds: int) -> None:
        raise error

    monkeypatch.setattr("pipelines.safe_rlhf.build_pipeline", breaks)
    monkeypatch.setattr(local, "preforked_python", lambda: contextlib.nullcontext("python"))
    settings = resolve_settings("tiny", 0, [f"store.uri=s3://saferlhf/{uuid.uuid4().hex}"])
    with webhook([204]) as (url, told), pytest.raises(seen):
        monkeypatch.setenv("SAFERLHF_WEBHOOK_URL", url)
        run_here(LocalRun(settings, (), tmp_path, "r1"))
    assert [body["status"] for body in told] == [status]


@pytest.mark.fault
def test_a_resumption_that_is_refused_leaves_the_run_as_it_was(
    services: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "preforked_python", lambda: contextlib.nullcontext("python"))
    store, run_id = f"store.uri=s3://saferlhf/{uuid.uuid4().hex}", f"r-{uuid.uuid4().hex}"
    settings, others = (resolve_settings("tiny", seed, [store]) for seed in (0, 1))
    run = LocalRun(settings, (), tmp_path, run_id, resumed=True)
    context = create_run(run.run_uri, run_id, settings)
    context.tracker.finish_pipeline_run(context.mlflow_run_id, "FINISHED")
    with webhook([204]) as (url, told), pytest.raises(SettingsError, match=r"other settings \(seed"):
        monkeypatch.setenv("SAFERLHF_WEBHOOK_URL", url)
        run_here(LocalRun(others, (), tmp_path, run_id, resumed=True))
    assert told == []
    assert context.tracker.end_of_pipeline_run(context.mlflow_run_id)[0] == "FINISHED"


@pytest.mark.fault
def test_what_a_step_has_started_is_killed_with_it() -> None:
    """Ranks are in sessions of their own, and outlive the step that started them."""
    program = "setsid sleep 600 & echo started; wait"
    with subprocess.Popen(["/bin/sh", "-c", program], stdout=subprocess.PIPE, text=True) as step:
        assert step.stdout is not None and step.stdout.readline() == "started\n"
        ranks = psutil.Process(step.pid).children(recursive=True)
        local._kill([psutil.Process(step.pid)])
    assert len(ranks) == 1
    gone, alive = psutil.wait_procs(ranks, timeout=10)
    assert (gone, alive) == (ranks, [])
