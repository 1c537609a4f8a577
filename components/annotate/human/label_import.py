"""Files of labels -> the batch's labels. All is checked before anything is written: an import is all or none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from components.annotate.human.batch_store import BatchStore
from components.annotate.human.label_parsing import Label, parse_row
from components.foundation.errors import DataError
from components.foundation.preference import MAX_FILE_BYTES, MAX_LINE_BYTES, BadRow, jsonl_rows

MAX_LABELS = 500_000
MAX_PROBLEMS = 10_000
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class LabelProblem:
    """Why a row of a file is refused; row 0 is the file as a whole."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class ImportReport:
    """What an import did. With problems, it wrote nothing. `known` labels were imported before."""

    new: list[Label] = field(default_factory=list)
    known: int = 0
    problems: list[LabelProblem] = field(default_factory=list)


@dataclass(frozen=True)
class FoundLabel:
    """A label with its place."""

    label: Label
    file: str
    row: int


def import_labels(batch: BatchStore, files: Sequence[Path]) -> ImportReport:
    """Check the files' labels and store those that are new, as one import.

    Raises:
        DataError: a file cannot be read, or the round has gone on without these labels.
    """
    items = {item.item_id for item in batch.items()}
    found, problems = read_labels(files, items)
    while True:
        imports = batch.imports()
        report = compare(found, [label for labels in imports for label in labels], problems)
        if report.problems or not report.new:
            return report
        if batch.has_preferences():
            raise DataError(f"round {batch.round} has gone on with the labels it had: more cannot be added to it")
        if batch.append(len(imports) + 1, report.new):
            return report


def read_labels(files: Sequence[Path], items: set[str]) -> tuple[list[FoundLabel], list[LabelProblem]]:
    """All labels of the files, and every row that is refused; after MAX_PROBLEMS of those no more is read.

    Raises:
        DataError: a file cannot be read, or there are more than MAX_LABELS labels.
    """
    found: list[FoundLabel] = []
    problems: list[LabelProblem] = []
    for path in files:
        for number, row in _rows(path):
            if len(problems) >= MAX_PROBLEMS:
                return found, problems
            if len(found) > MAX_LABELS:
                raise DataError(f"{path} brings the labels to more than {MAX_LABELS}: import them in parts")
            if isinstance(row, BadRow):
                problems.append(LabelProblem(str(path), number, row.reason))
                continue
            for label in parse_row(row, items):
                if isinstance(label, str):
                    problems.append(LabelProblem(str(path), number, label))
                else:
                    found.append(FoundLabel(label, str(path), number))
    return found, problems


def compare(
    found: Sequence[FoundLabel], stored: Sequence[Label], problems: Sequence[LabelProblem] = ()
) -> ImportReport:
    """Found labels against each other and against those that are stored: an annotator labels an item once."""
    before = {(label.item_id, label.annotator): label for label in stored}
    first: dict[tuple[str, str], FoundLabel] = {}
    new, known, bad = list[Label](), 0, list(problems)
    for item in found:
        key = item.label.item_id, item.label.annotator
        who = f"annotator {item.label.annotator} labels item {item.label.item_id}"
        if key in first:
            where = f"row {first[key].row} of {first[key].file}"
            bad.append(LabelProblem(item.file, item.row, f"{who} a second time, after {where}"))
        elif key not in before:
            new.append(item.label)
        elif before[key] == item.label:
            known += 1
        else:
            bad.append(LabelProblem(item.file, item.row, f"{who} otherwise than in an earlier import, which stands"))
        first.setdefault(key, item)
    return ImportReport([], 0, bad) if bad else ImportReport(new, known)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(1-based row, decoded row or BadRow) of JSON Lines, or of one JSON array, which tools export."""
    try:
        with path.open("rb") as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not start.startswith(b"["):
            yield from ((number, row) for number, _, row in jsonl_rows(path))
        elif path.stat().st_size > MAX_FILE_BYTES:
            yield 0, BadRow(0, f"the file is over {MAX_FILE_BYTES} bytes: export it in parts", "")
        else:
            with path.open(encoding="utf-8-sig") as text:
                yield from enumerate(_array_items(text), start=1)
    except UnicodeDecodeError:
        yield 0, BadRow(0, "the file is not UTF-8", "")
    except RecursionError:
        yield 0, BadRow(0, "the file is nested too deeply", "")
    except ValueError as error:
        yield 0, BadRow(0, f"the file is not JSON: {error}", "")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _array_items(file: TextIO) -> Iterator[Any]:
    """The items of a JSON array, which begins with its bracket; one at a time is in memory.

    Raises:
        ValueError: the file is no such array, or an item is over MAX_LINE_BYTES.
    """
    text = _TextAhead(file)
    text.take("[")
    number = 0
    while text.mark() != "]":
        if number and not text.take(","):
            raise ValueError(f"there is no , or ] after item {number}")
        number += 1
        yield text.item(number)
    text.take("]")
    if text.mark():
        raise ValueError(f"there is more after the array of {number} items")


class _TextAhead:
    """A file's text, of which MAX_LINE_BYTES characters ahead are in memory, and hardly more."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._place = 0

    def mark(self) -> str:
        """The next character that is no space; empty at the end."""
        while self._fill():
            match = _SPACE.match(self._text, self._place)
            self._place = match.end() if match else self._place
            if self._place < len(self._text):
                self._fill()
                return self._text[self._place]
        return ""

    def take(self, mark: str) -> bool:
        """Go on after the next mark, if it is this one."""
        there = self.mark() == mark
        self._place += there
        return there

    def item(self, number: int) -> Any:
        """The next JSON value."""
        self.mark()
        try:
            value, end = json.JSONDecoder().raw_decode(self._text, self._place)
        except json.JSONDecodeError as error:
            raise ValueError(f"item {number} is broken, or over {MAX_LINE_BYTES} characters: {error.msg}") from error
        if end - self._place > MAX_LINE_BYTES:
            raise ValueError(f"item {number} is over {MAX_LINE_BYTES} characters")
        self._place = end
        return value

    def _fill(self) -> bool:
        """Whether there is more."""
        if len(self._text) - self._place <= MAX_LINE_BYTES:
            self._text, self._place = self._text[self._place :] + self._file.read(MAX_LINE_BYTES), 0
        return self._place < len(self._text)
