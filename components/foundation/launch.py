"""Runs a training stage on as many ranks as the settings say.

With one process the stage runs here. With several, `torchrun` starts this module once a rank on this machine:

    torchrun --standalone --nproc-per-node N -m components.foundation.launch MODULE:FUNCTION '[RUN_URI, ...]'

Ranks end together: when one fails, torchrun ends the others, and the error of the first is raised here.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from components.foundation import distributed, errors
from components.foundation.errors import SaferlhfError, TrainingError
from components.foundation.run_context import open_run

_OUTCOME = "SAFERLHF_OUTCOME"
"""Environment variable: the file in which the first rank that ends otherwise than well says how."""


def launch(stage: str, *arguments: str | int) -> str:
    """Run a stage, given as `module:function`, and return the URI that it returns; the first argument is its run's URI.

    Raises:
        SaferlhfError: the error that ended the stage, also when it ran on ranks of their own.
        SystemExit: the stage was asked to stop and has saved its state.
    """
    settings = open_run(str(arguments[0])).settings
    if settings.distributed.processes == 1:
        uri: str = _function(stage)(*arguments)
        return uri
    with tempfile.TemporaryDirectory(prefix="saferlhf-launch-") as folder:
        outcome = Path(folder) / "outcome.json"
        code = _run_torchrun(settings.distributed.processes, stage, arguments, outcome)
        told = json.loads(outcome.read_text(encoding="utf-8")) if outcome.is_file() else {}
    if "exit" in told:
        raise SystemExit(told["exit"])
    if "error" in told:
        raise getattr(errors, told["error"], TrainingError)(told["message"])
    if code or "uri" not in told:
        raise TrainingError(
            f"a rank of {stage} died (torchrun ended with status {code}): its last words are above; the stage goes on "
            "from its last checkpoint when it is started again"
        )
    return str(told["uri"])


def run_rank(stage: str, arguments: Sequence[str | int]) -> None:
    """One rank of a stage: join the others, make sure that all were asked for the same, run."""
    settings = open_run(str(arguments[0])).settings
    try:
        with distributed.started(settings.distributed.zero_stage):
            distributed.check_same(stage=stage, inputs=json.dumps(list(arguments)), settings=settings.model_dump_json())
            uri = _function(stage)(*arguments)
            is_main = distributed.world().is_main
    except SaferlhfError as error:
        _tell({"error": type(error).__name__, "message": str(error)})
        raise
    except SystemExit as end:
        _tell({"exit": end.code})
        raise
    if is_main:
        _tell({"uri": uri})


def _run_torchrun(processes: int, stage: str, arguments: Sequence[str | int], outcome: Path) -> int:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *("-m", "components.foundation.launch", stage, json.dumps(list(arguments))),
    ]
    with subprocess.Popen(command, env=os.environ | {_OUTCOME: str(outcome)}) as torchrun, _passing_on(torchrun.pid):
        return torchrun.wait()


@contextmanager
def _passing_on(torchrun: int) -> Iterator[None]:
    """Within the block SIGTERM goes on to the ranks: torchrun itself would kill them while a checkpoint is saved."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(torchrun).children():
                rank.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(outcome: dict[str, Any]) -> None:
    """Leave word for `launch`, unless another rank was first."""
    path = os.environ.get(_OUTCOME)
    if path is None:
        return
    with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(outcome, file)


def _function(stage: str) -> Callable[..., str]:
    module, _, name = stage.partition(":")
    function: Callable[..., str] = getattr(importlib.import_module(module), name)
    return function


if __name__ == "__main__":
    run_rank(sys.argv[1], json.loads(sys.argv[2]))
