"""Kubeflow's cron expressions: six fields, seconds first, as its scheduler reads them (robfig/cron, version 1)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from components.foundation.errors import SettingsError

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_PART = re.compile(r"(?:[*?]|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>\w+))?", re.ASCII)


@dataclass(frozen=True)
class _Field:
    """What one place of the expression may hold; `names` stand for numbers from `lowest` on."""

    title: str
    lowest: int
    highest: int
    names: tuple[str, ...] = ()

    def number(self, text: str) -> int | None:
        if text.lower() in self.names:
            return self.lowest + self.names.index(text.lower())
        return int(text) if text.isdecimal() and self.lowest <= int(text) <= self.highest else None

    def accepts(self, part: str) -> bool:
        """One of the parts between commas: `*`, `3`, `1-5`, `*/10`, `mon-fri`."""
        match = _PART.fullmatch(part)
        if match is None or (match["step"] and not (match["step"].isdecimal() and int(match["step"]) > 0)):
            return False
        numbers = [self.number(text) for text in (match["first"], match["last"]) if text]
        return all(number is not None for number in numbers) and (len(numbers) < 2 or numbers[0] <= numbers[1])  # type: ignore[operator]


_FIELDS = (
    _Field("second", 0, 59),
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 6, _DAYS),
)


def check_cron(cron: str) -> None:
    """Raises: SettingsError unless KFP can read the expression; a usual crontab has five fields."""
    fields = cron.split()
    if len(fields) == len(_FIELDS) - 1:
        raise SettingsError(f"cron {cron!r} has 5 fields, and KFP wants 6, seconds first: write '0 {' '.join(fields)}'")
    if len(fields) != len(_FIELDS):
        raise SettingsError(
            f"cron {cron!r} has {len(fields)} fields, and KFP wants 6, seconds first: '0 0 2 * * 1' is Mondays at two"
        )
    for field, text in zip(_FIELDS, fields, strict=True):
        if not all(field.accepts(part) for part in text.split(",")):
            span = f"{field.lowest} to {field.highest}" + (f" or {field.names[0]}..." if field.names else "")
            raise SettingsError(f"cron {cron!r}: {text!r} is no {field.title}: write {span}, *, a range or a step")
