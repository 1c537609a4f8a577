"""Runs a training stage on as many ranks and nodes as the platform or the settings say.

| environment | where the stage runs |
|---|---|
| `SAFERLHF_TRAIN_JOB` | on the nodes of a TrainJob, which this process submits and follows |
| `SAFERLHF_PROCESSES`, else `distributed.processes`: 1 | here, in this process |
| the same, above 1 | here, in so many ranks that torchrun starts |

torchrun, here or on each node, starts this module once a rank:

    python -m components.foundation.torchrun ... -m components.foundation.launch MODULE:FUNCTION '[RUN_URI, ...]'

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

from components.foundation import distributed, errors
from components.foundation.errors import SaferlhfError, SettingsError, TrainingError
from components.foundation.exit_codes import PREEMPTED_EXIT_CODE, ends_when_memory_is_out
from components.foundation.run_context import RunContext, finished_uri, open_run, standing_commit

_OUTCOME = "SAFERLHF_OUTCOME"
"""Environment variable: the file in which the first rank that ends otherwise than well says how."""


def launch(stage: str, *arguments: str | int) -> str:
    """Run a stage, given as `module:function`, and return the URI that it returns; the first argument is its run's URI.

    Raises:
        SaferlhfError: the error that ended the stage, also when it ran on ranks of their own; of a TrainJob, a
            ClusterError with the last words of its nodes.
        SystemExit: the stage was asked to stop and has saved its state, or its memory did not suffice.
    """
    with ends_when_memory_is_out():
        return _launch(stage, arguments)


def _launch(stage: str, arguments: Sequence[str | int]) -> str:
    context = open_run(str(arguments[0]))
    if train_job := os.environ.get("SAFERLHF_TRAIN_JOB"):
        return _run_on_nodes(context, train_job, stage, arguments)
    processes = _processes(context)
    if processes == 1:
        uri: str = _function(stage)(*arguments)
        return uri
    return _run_on_ranks(processes, stage, arguments)


def stage_and_round(stage: str, arguments: Sequence[str | int]) -> tuple[str, int]:
    """`module:function` and its arguments -> the name and the round under which the stage commits.

    A stage's module has the stage's name. Its second argument is the round, if there is a number; without one the
    stage happens once in a run, which is round 0.
    """
    name = stage.partition(":")[0].rpartition(".")[2]
    round_number = arguments[1] if len(arguments) > 1 else 0
    return name, round_number if isinstance(round_number, int) else 0


def _run_on_nodes(context: RunContext, description: str, stage: str, arguments: Sequence[str | int]) -> str:
    from components.foundation.train_job import read_spec, run_train_job, train_job_command  # ranks need no Kubernetes

    name, round_number = stage_and_round(stage, arguments)
    if standing_commit(context, name, round_number) is None:  # or a retry would queue for nodes in vain
        command = train_job_command(stage, arguments)
        run_train_job(read_spec(description, context.run_id, name, round_number, command))
    return finished_uri(context, name, round_number)


def _processes(context: RunContext) -> int:
    """How many ranks on this machine: a platform's pool has the last word, for it knows how many GPUs there are."""
    told = os.environ.get("SAFERLHF_PROCESSES")
    if not told:
        return context.settings.distributed.processes
    if not told.isascii() or not told.isdigit() or int(told) < 1:
        raise SettingsError(f"SAFERLHF_PROCESSES={told!r} is no number of processes: set it to 1 or more, or unset it")
    return int(told)


def _run_on_ranks(processes: int, stage: str, arguments: Sequence[str | int]) -> str:
    with tempfile.TemporaryDirectory(prefix="saferlhf-launch-") as folder:
        outcome = Path(folder) / "outcome.json"
        code = _run_torchrun(processes, stage, arguments, outcome)
        told = json.loads(outcome.read_text(encoding="utf-8")) if outcome.is_file() else {}
    if "exit" in told:
        raise SystemExit(told["exit"])
    if "error" in told:
        raise getattr(errors, told["error"], TrainingError)(told["message"])
    if code in (PREEMPTED_EXIT_CODE, -signal.SIGTERM):  # stopped before a rank, or torchrun, could listen
        raise SystemExit(PREEMPTED_EXIT_CODE)
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
        *(sys.executable, "-m", "components.foundation.torchrun", "--standalone", "--nproc-per-node", str(processes)),
        *("-m", "components.foundation.launch", stage, json.dumps(list(arguments))),
    ]
    with subprocess.Popen(command, env=os.environ | {_OUTCOME: str(outcome)}) as torchrun, _passing_on(torchrun):
        return torchrun.wait()


@contextmanager
def _passing_on(torchrun: subprocess.Popen[bytes]) -> Iterator[None]:
    """Within the block SIGTERM goes on to torchrun, and by it to the ranks, which save their state and end."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        torchrun.send_signal(number)

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
