"""How much memory a run takes: the highest sum over all of its processes, the servers and the current step included."""

from __future__ import annotations

import os
import threading
from types import TracebackType

import psutil

_SECONDS_BETWEEN_LOOKS = 1.0


class PeakMemory:
    """Within the block, looks once a second at this process and all that it started.

    Shared pages are counted once (the proportional set size), so the sum is what the machine really needs.

    Attributes:
        bytes: the highest sum seen so far.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, memory_of_tree(os.getpid()))
            if self._done.wait(_SECONDS_BETWEEN_LOOKS):
                return


def memory_of_tree(pid: int) -> int:
    """Bytes of a process and of everything below it; processes that end meanwhile count nothing."""
    try:
        parent = psutil.Process(pid)
        return sum(_memory(process) for process in (parent, *parent.children(recursive=True)))
    except psutil.Error:
        return 0


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
