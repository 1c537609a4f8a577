"""One progress line for every stage.

A stage runs as its own process, on a laptop and in a cluster, so progress is a line of text:

    progress ppo 3/16 steps 0.21/s 61 s left

`saferlhf run` turns these lines into a bar on a terminal; a cluster's log shows them as they are. Where the log is JSON
(`logs.py`), the line is the message of an event.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass

from components.foundation import distributed, logs

_LINE = re.compile(r"^progress (\S+) (\d+)/(\d+) (\S+) (\d+(?:\.\d+)?)/s (\d+(?:\.\d+)?) s left$")
_SECONDS_BETWEEN_LINES = 1.0

log = logging.getLogger("saferlhf")


@dataclass(frozen=True)
class ProgressLine:
    """A parsed progress line; `rate` is units a second."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float
    seconds_left: float


def parse_progress(line: str) -> ProgressLine | None:
    """A line of a stage's output -> progress, or None where it is something else."""
    match = _LINE.match(line.strip())
    if match is None:
        return None
    stage, done, total, unit, rate, left = match.groups()
    return ProgressLine(stage, int(done), int(total), unit, float(rate), float(left))


class Progress:
    """Prints progress lines, at most one a second, and always the last one; of several ranks only the first does."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._started = time.monotonic()
        self._printed = float("-inf")
        self._before: int | None = None

    def update(self, done: int) -> None:
        if not distributed.world().is_main:
            return
        now = time.monotonic()
        if self._before is None:  # a stage that goes on does not count what an earlier attempt did
            self._before = max(done - 1, 0) if done < self._total else 0
        if done < self._total and now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        rate = (done - self._before) / max(now - self._started, 1e-6)
        left = (self._total - done) / rate if rate > 0 else 0.0
        line = f"progress {self._stage} {done}/{self._total} {self._unit} {rate:.2f}/s {left:.0f} s left"
        if logs.is_json():
            log.info("%s", line)
        else:
            print(line, flush=True)
