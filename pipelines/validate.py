"""`saferlhf data validate`: which rows of a file can be used, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from typing import Any

from components.foundation.preference import (
    Demonstration,
    DualPreference,
    LoadResult,
    PromptRecord,
    RegressionPrompt,
    load_records,
)

_SHOWN = 10


def validate_file(source: str, max_bad_share: float) -> tuple[str, bool]:
    """(table to print, whether the file may be used).

    Raises:
        DataError: the file cannot be opened.
    """
    kinds: tuple[Any, ...] = (DualPreference, Demonstration, RegressionPrompt, PromptRecord)
    results: list[LoadResult[Any]] = [load_records(source, kind) for kind in kinds]
    # the kind is told by the columns, not by which rows are good: a bad pair still has a valid prompt
    best = next((i for i, result in enumerate(results) if 2 * _lacking(result) <= _rows(result)), len(kinds) - 1)
    result = results[best]
    reasons = Counter(bad.reason for bad in result.bad)
    lines = [
        f"{source}: {kinds[best].__name__} records",
        f"  usable rows {len(result.records):>8}",
        f"  bad rows    {len(result.bad):>8}  ({result.bad_share:.1%}, allowed {max_bad_share:.1%})",
        f"  sha256      {result.digest}",
    ]
    lines += [f"  {count:>6} x {reason}" for reason, count in reasons.most_common(_SHOWN)]
    lines += [f"  row {bad.row}: {bad.reason}" for bad in result.bad[:_SHOWN]]
    return "\n".join(lines), bool(result.records) and result.bad_share <= max_bad_share


def _rows(result: LoadResult[Any]) -> int:
    return len(result.records) + len(result.bad)


def _lacking(result: LoadResult[Any]) -> int:
    """Rows without a column that the kind needs."""
    return sum(bad.reason.endswith("is missing") for bad in result.bad)
