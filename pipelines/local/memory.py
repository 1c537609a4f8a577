"""How much memory a run takes: the highest sum over all of its processes, the servers and the current step included."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from types import TracebackType

import psutil

_SECONDS_BETWEEN_LOOKS = 1.0
_LOOKS_BETWEEN_WALKS = 60  # at most; pages that forked processes share count as private ones of each
_GROWTH = 1.005


class PeakMemory:
    """Within the block, looks once a second at this process and all that it started.

    Shared pages are counted once (the proportional set size), so the sum is what the machine really needs. To read it,
    the kernel walks all pages of a process and holds up what that does meanwhile, so it is read only when more private
    memory is resident than ever before, which is cheap to know, and once a minute in any case.

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
        highest_private = 0
        for look in itertools.count():
            private = private_in_tree(os.getpid())
            if private > _GROWTH * highest_private or look % _LOOKS_BETWEEN_WALKS == 0:
                highest_private = max(highest_private, private)
                self.bytes = max(self.bytes, memory_of_tree(os.getpid()))
            if self._done.wait(_SECONDS_BETWEEN_LOOKS):
                return


def memory_of_tree(pid: int) -> int:
    """Bytes of a process and of everything below it; processes that end meanwhile count nothing."""
    return _sum_over_tree(pid, lambda process: process.memory_full_info().pss)


def private_in_tree(pid: int) -> int:
    """Resident bytes of the same processes that are neither files nor shared memory."""
    return _sum_over_tree(pid, lambda process: (memory := process.memory_info()).rss - memory.shared)


def _sum_over_tree(pid: int, bytes_of: Callable[[psutil.Process], int]) -> int:
    try:
        parent = psutil.Process(pid)
        return sum(_or_nothing(bytes_of, process) for process in (parent, *parent.children(recursive=True)))
    except psutil.Error:
        return 0


def _or_nothing(bytes_of: Callable[[psutil.Process], int], process: psutil.Process) -> int:
    try:
        return bytes_of(process)
    except psutil.Error:
        return 0
