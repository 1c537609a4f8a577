"""Peak memory of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from pipelines.local.memory import PeakMemory, memory_of_tree, resident_in_tree

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


def test_the_peak_is_the_highest_of_all_looks_and_pages_are_walked_only_when_more_is_resident_than_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, walks, seen = iter((10, 50, 20, 50, 60)), iter((1, 5, 4)), threading.Event()

    def look(pid: int) -> int:
        found = next(looks, None)
        if found is None:
            seen.set()
        return found or 10

    monkeypatch.setattr("pipelines.local.memory._SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr("pipelines.local.memory.resident_in_tree", look)
    monkeypatch.setattr("pipelines.local.memory.memory_of_tree", lambda pid: next(walks))  # a fourth walk would fail
    with PeakMemory() as memory:
        assert seen.wait(30)
    assert memory.bytes == 5
    assert next(walks, None) is None


def test_a_process_that_is_gone_takes_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert memory_of_tree(child.pid) == 0
    assert resident_in_tree(child.pid) == 0
