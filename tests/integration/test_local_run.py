"""How a run on this machine ends, as the webhook is told; the pipeline itself is a stand-in."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

import pytest

from components.foundation.errors import TrainingError
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
