"""Peak memory of a run."""

from __future__ import annotations

import os
import subprocess
import sys

from pipelines.local.memory import PeakMemory, memory_of_tree

HOLD_200_MB = "b = bytearray(200_000_000); print('holding', flush=True); input()"


def test_the_peak_holds_what_a_child_process_took_and_gave_back() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_200_MB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "holding\n"
        with PeakMemory() as memory:
            pass  # it looks at once, then every second
        child.communicate("\n")
    assert memory.bytes - memory_of_tree(os.getpid()) > 150_000_000


def test_a_process_that_is_gone_takes_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert memory_of_tree(child.pid) == 0
