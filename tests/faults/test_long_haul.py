"""Many training steps with a checkpoint after each: memory, open files and the store's objects do not grow.

Forty steps in the suite; `make long-haul` takes 200.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import pytest

from components.foundation.results import PpoTrace, read_record
from components.foundation.run_context import open_run
from pipelines.local.services import Endpoints
from tests.integration.s3_proxy import Forward, Reply, Request, proxied
from tests.stage_attempts import TrainingRun

pytestmark = [pytest.mark.fault, pytest.mark.xdist_group("resume")]

STEPS = int(os.environ.get("SAFERLHF_LONG_HAUL_STEPS", "40"))
STAGE = "ppo_lagrangian"


@dataclass(frozen=True)
class Sample:
    """When a checkpoint has become the newest: the process's memory in bytes and open files; the objects kept."""

    memory: int
    files: int
    objects: int


def test_memory_open_files_and_the_store_stay_flat_over_many_steps(
    services: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first half is the measure of the second: by then all that is made once has been made."""
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path))
    run = TrainingRun({**services.environment, "SAFERLHF_CACHE": str(tmp_path)}, f"ppo.steps={STEPS}")
    run.bring_to(STAGE)
    processes: list[psutil.Process] = []
    samples: list[Sample] = []

    def watch(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.method == "PUT" and request.path.partition("?")[0].endswith("checkpoints/LATEST"):
            (process,) = processes
            kept = len(run.checkpoints(STAGE))
            samples.append(Sample(process.memory_info().rss, process.num_fds(), kept))
        return reply

    with proxied(services.environment, watch) as environment:
        code = run.attempt(STAGE, environment=environment, started=lambda pid: processes.append(psutil.Process(pid)))
    assert code == 0
    assert len(samples) == STEPS - 1  # the last step ends with the commit itself
    early, late = samples[STEPS // 4 : STEPS // 2], samples[STEPS // 2 :]
    with capsys.disabled():
        print(f"\n{STEPS} steps: {samples[0]}, {early[-1]}, {late[-1]}")
    assert max(s.memory for s in late) <= 1.05 * max(s.memory for s in early)
    # One more at a sample is a connection just then in use, or a pool that has grown by one; a leak is one every step.
    assert median(s.files for s in late) < max(s.files for s in early) + len(late) / 10
    assert max(s.objects for s in late) <= max(s.objects for s in early) <= 8
    assert run.checkpoints(STAGE) == []
    trace = read_record(PpoTrace, open_run(run.uri).store.fetch(run.committed(STAGE) or "") / "trace.json")
    assert len(trace.multiplier) == STEPS
