"""Peak memory of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from pipelines.local.memory import PeakMemory, memory_of_tree, private_in_tree

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


def test_the_peak_is_the_highest_of_all_walks_which_follow_growth_and_else_are_rare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    private, walks, seen = (10, 50, 20, 50, 60, 60, 10), {0: 1, 1: 5, 3: 4, 4: 3}, threading.Event()
    walked: list[bool] = []

    def look(pid: int) -> int:
        walked.append(False)
        number = len(walked) - 1
        if number == len(private):
            seen.set()
        return private[number] if number < len(private) else 10

    def walk(pid: int) -> int:
        walked[-1] = True
        return walks.get(len(walked) - 1, 2)

    monkeypatch.setattr("pipelines.local.memory._SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr("pipelines.local.memory._LOOKS_BETWEEN_WALKS", 3)
    monkeypatch.setattr("pipelines.local.memory.private_in_tree", look)
    monkeypatch.setattr("pipelines.local.memory.memory_of_tree", walk)
    with PeakMemory() as memory:
        assert seen.wait(30)
    assert walked[:6] == [True, True, False, True, True, False]  # more, more, less, the third in any case, more, same
    assert memory.bytes == 5


def test_a_process_that_is_gone_takes_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert memory_of_tree(child.pid) == 0
    assert private_in_tree(child.pid) == 0
