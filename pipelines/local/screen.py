"""What the user sees of a local run: one progress bar a stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from components.foundation.exit_codes import NOTHING_NEW_LINE, WAITING_LINE
from components.foundation.logs import is_json_event
from components.foundation.progress import ProgressLine, parse_progress

_ERROR_LINE = re.compile(r"^components\.foundation\.errors\.\w+: (.*)$")
_OURS = re.compile(r"^\d\d:\d\d:\d\d ")
_TERMINAL_CODES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor, erasing
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # window title, links
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # control characters, a lone escape among them
)


class Screen(io.TextIOBase):
    """A text stream that the runner prints to.

    Lines of our log are shown, progress lines become a bar, the runner's own chatter is dropped. The last
    explained error is kept in `last_error`, and what a step that awaits labels says in `waiting`, and one
    after which the run has nothing to do in `nothing_new`.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._buffer = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._traceback: list[str] = []
        self.last_error = ""
        self.waiting = ""
        self.nothing_new = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._buffer += text
        while "\n" in self._buffer:
            line, self._buffer = self._buffer.split("\n", 1)
            self._receive(_TERMINAL_CODES.sub("", line).strip())
        return len(text)

    def line(self, text: str) -> None:
        """Show one line of our own."""
        self._console.print(text, markup=False, emoji=False)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # a terminal that was closed
                self._bar.stop()
            self._bar = None

    def _receive(self, line: str) -> None:
        progress = parse_progress(line)
        error = _ERROR_LINE.match(line)
        if progress is not None:
            self._show(progress, line)
        elif line.startswith(WAITING_LINE):
            self.waiting = line
        elif line.startswith(NOTHING_NEW_LINE):
            self.nothing_new = line
        elif error is not None:
            self.last_error = error.group(1)
        elif is_json_event(line) or (_OURS.match(line) and " - INFO - " not in line):
            self.line(line)
        elif re.match(r"^[\w.]*(Error|Exception)(: |$)", line):
            self.last_error = line

    def _show(self, progress: ProgressLine, line: str) -> None:
        if not self._console.is_terminal:
            self.line(line)
            return
        if self._bar is None or self._stage != progress.stage or progress.done <= 1:
            self.close()
            self._stage = progress.stage
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(progress.stage, total=progress.total, rate="")
        if self._task is not None:
            self._bar.update(self._task, completed=progress.done, rate=f"{progress.rate:.2f} {progress.unit}/s")
        if progress.done == progress.total:
            self.close()
