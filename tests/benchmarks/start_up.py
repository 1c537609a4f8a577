"""What starting costs: the command, each stage's imports, and all that a run does outside of its stages.

    python -m tests.benchmarks.start_up

A run of profile tiny is made twice: with steps that are forked from a process that has made their imports
(`pipelines/local/prefork`), and with an interpreter for each step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.local.prefork.server import MODULES
from tests.benchmarks.machine import this_machine

REPEATS = 3  # of each import; eight minutes in all on two cores
COMMAND = "from pipelines.cli import main; main()"
WITHOUT_FORKS = """
import contextlib, sys
import pipelines.local.run
pipelines.local.run.preforked_python = lambda: contextlib.nullcontext(sys.executable)
"""


@dataclass(frozen=True)
class TinyRun:
    """Seconds of a run: as long as its user waits, and those of its stages' own work."""

    waited: float
    stages: float


def best(program: str, *arguments: str) -> float:
    """Seconds of a Python program, the least of some repetitions."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def tiny_run(preparation: str) -> TinyRun:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["run", "--profile", "tiny", "--workdir", folder]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", preparation + COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)
        waited = time.perf_counter() - started
        summary: Mapping[str, Mapping[str, float]] = json.loads((Path(folder) / "summary.json").read_text())
    return TinyRun(waited, sum(summary["stage_seconds"].values()))


def main() -> None:
    print(this_machine())
    print(f"{'saferlhf --help':45} {best(COMMAND, '--help'):6.1f} s")
    for module in MODULES:
        print(f"{'import ' + module:45} {best(f'import {module}'):6.1f} s")
    for name, preparation in (("forked steps", ""), ("an interpreter for each step", WITHOUT_FORKS)):
        run = tiny_run(preparation)
        print(f"{'tiny run, ' + name:45} {run.waited:6.1f} s, {run.waited - run.stages:.1f} s outside of its stages")


if __name__ == "__main__":
    main()
