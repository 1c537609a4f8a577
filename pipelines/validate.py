"""`saferlhf data validate`: which rows of a file can be used, why the others cannot, and how long the texts are.

Without `--as` the kind of records is told from the columns. Rows that fit none of the kinds well are refused: nearly
every row is a prompt with columns that nobody reads, so a misspelt column would otherwise pass.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from enum import StrEnum
from statistics import median
from typing import Any

from components.foundation.errors import DataError
from components.foundation.preference import (
    Demonstration,
    DualPreference,
    LoadResult,
    PromptRecord,
    RegressionPrompt,
    load_records,
    required_columns,
)
from components.foundation.untrusted import shown
from components.prepare_data.prepare_data import missing_kinds

_SHOWN = 10


class RecordKind(StrEnum):
    """What a file is for, by the name of its setting: `data.<name>`, or `gate.regressions`."""

    preferences = "preferences"
    demonstrations = "demonstrations"
    prompts = "prompts"
    held_out = "held_out"
    regressions = "regressions"

    @property
    def record(self) -> Any:
        """The class of its records."""
        return _RECORDS[self]

    @property
    def telling_columns(self) -> set[str]:
        """The columns that its records need, and that do not belong to every kind."""
        return set(required_columns(self.record)) - set(required_columns(PromptRecord))


_RECORDS = {
    RecordKind.preferences: DualPreference,
    RecordKind.demonstrations: Demonstration,
    RecordKind.prompts: PromptRecord,
    RecordKind.held_out: PromptRecord,
    RecordKind.regressions: RegressionPrompt,
}
_ANSWERS = {RecordKind.preferences: ("response_0", "response_1"), RecordKind.demonstrations: ("response",)}
_GUESSED = (RecordKind.preferences, RecordKind.demonstrations, RecordKind.regressions, RecordKind.prompts)
"""Held-out prompts look like prompts."""


def validate_file(source: str, max_bad_share: float, asked: RecordKind | None = None) -> tuple[str, bool]:
    """(table to print, whether the file may be used).

    Raises:
        DataError: the file cannot be opened, or nobody has said what it is for and the columns do not tell.
    """
    kind = asked or RecordKind.prompts  # any kind shows the columns
    result: LoadResult[Any] = load_records(source, kind.record)
    if asked is None and (guess := _guess(result)) is not kind:
        kind, result = guess, load_records(source, guess.record)
    allowed = 0.0 if kind is RecordKind.regressions else max_bad_share  # as a run has it
    reasons = Counter(bad.reason for bad in result.bad)
    lines = [
        f"{source}: {kind} ({kind.record.__name__} records)",
        f"  usable rows {len(result.records):>8}",
        f"  bad rows    {len(result.bad):>8}  ({result.bad_share:.1%}, allowed {allowed:.1%})",
        f"  sha256      {result.digest}",
    ]
    lines += [f"  {count:>6} x {reason}" for reason, count in reasons.most_common(_SHOWN)]
    lines += [f"  row {bad.row}: {bad.reason}" for bad in result.bad[:_SHOWN]]
    if unknown := _unknown_columns(result, kind):
        lines.append(f"  ignored columns: {unknown}")
    if kind is RecordKind.held_out and (missing := missing_kinds(result.records)):
        lines.append(f"  no prompt of kind {' or '.join(missing)}: with these the gate cannot measure a policy")
    if result.records:
        lines += _lengths(result.records, _ANSWERS.get(kind, ()))
    return "\n".join(lines), bool(result.records) and result.bad_share <= allowed


def _guess(result: LoadResult[Any]) -> RecordKind:
    """The kind whose columns are in most rows; whether rows are good does not matter: a bad pair has a valid prompt.

    Raises:
        DataError: the rows have more in common with a kind that they do not fit, or columns that no prompt has.
    """
    common = {name for name, rows in result.columns.items() if 2 * rows >= result.objects}
    fitting = next((each for each in _GUESSED if common >= set(required_columns(each.record))), RecordKind.prompts)
    nearest = max((fitting, *_GUESSED), key=lambda each: len(common & each.telling_columns))
    if nearest is fitting and not (fitting is RecordKind.prompts and _unknown_columns(result, fitting)):
        return fitting
    if common >= {"chosen", "rejected"}:
        raise DataError(
            f"{result.source} looks like pairs of a chosen and a rejected answer, which say nothing about safety "
            f"({_lacking(result, RecordKind.preferences)}): write the dual preferences of PKU-SafeRLHF, with the "
            f"columns {', '.join(required_columns(DualPreference))}"
        )
    unknown = _unknown_columns(result, nearest)
    wrong = [_lacking(result, nearest), f"it has the unknown columns {unknown}" if unknown else ""]
    if nearest is RecordKind.prompts:
        needs = "; ".join(f"{each}: {', '.join(required_columns(each.record))}" for each in _GUESSED)
        advice = f"name the columns as the records do ({needs}), or ignore the unknown ones with --as prompts"
    else:
        advice = "rename or add what is missing, or say with --as what the rows are"
    raise DataError(f"{result.source} looks like {nearest}, but {' and '.join(filter(None, wrong))}: {advice}")


def _lacking(result: LoadResult[Any], kind: RecordKind) -> str:
    """Which columns are missing in how many rows; empty where none is."""
    names: dict[int, list[str]] = {}
    for name in required_columns(kind.record):
        names.setdefault(result.objects - result.columns.get(name, 0), []).append(name)
    told = [f"{', '.join(names[rows])} in {rows} of {result.objects} rows" for rows in sorted(names) if rows]
    return f"it lacks {' and '.join(told)}" if told else ""


def _unknown_columns(result: LoadResult[Any], kind: RecordKind) -> str:
    """Those that the kind's records do not have, with the number of rows that do; empty where there is none."""
    known = {item.name for item in dataclasses.fields(kind.record)}
    unknown = [(name, rows) for name, rows in result.columns.items() if name not in known]
    told = [f"{shown(name)} ({rows} of {result.objects} rows)" for name, rows in unknown[:_SHOWN]]
    return ", ".join(told) + (" and more" if len(unknown) > _SHOWN else "")


def _lengths(records: Sequence[Any], answers: Sequence[str]) -> list[str]:
    """How many words the texts have, for the settings that cut them."""
    prompts = {record.prompt for record in records}
    lines = [f"  prompts     {len(prompts):>8}  distinct, {_words(prompts)}"]
    if texts := [getattr(record, name) for record in records for name in answers]:
        lines.append(f"  answers     {len(texts):>8}  {_words(texts)}")
    return lines


def _words(texts: Collection[str]) -> str:
    counts = [len(text.split()) for text in texts]
    return f"words: {median(counts):g} in the median, {max(counts)} in the longest"
