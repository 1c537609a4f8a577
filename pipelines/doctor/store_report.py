"""What `saferlhf doctor --store` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from components.foundation.store_conformance import Outcome, conforms


def store_table(uri: str, outcomes: Sequence[Outcome]) -> str:
    """Three lines for a check: what was asked, what the store did, and behind an arrow what follows for saferlhf.

    The last line says whether the store will do.
    """
    rows = [
        ("check", "need", "result", "what was asked, and what the store did"),
        *(_row(outcome) for outcome in outcomes),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    margin = " " * (sum(widths) + 2 * len(widths))
    below = [[], *([outcome.did, *_consequence(outcome)] for outcome in outcomes)]
    lines = []
    for row, more in zip(rows, below, strict=True):
        lines.append("".join(f"{cell:<{width + 2}}" for cell, width in zip(row, widths, strict=False)) + row[3])
        lines += [f"{margin}{line}" for line in more]
    return "\n".join([*lines, _verdict(uri, outcomes)])


def store_json(outcomes: Sequence[Outcome]) -> str:
    """The outcomes for a program: a list of objects with check, required, result, asked, did, follows."""
    return json.dumps([asdict(outcome) for outcome in outcomes], indent=2, ensure_ascii=False)


def _row(outcome: Outcome) -> tuple[str, str, str, str]:
    result = "FAILED" if outcome.result == "failed" else outcome.result
    return outcome.check, "required" if outcome.required else "recommended", result, outcome.asked


def _consequence(outcome: Outcome) -> list[str]:
    return [f"-> {outcome.follows}"] if outcome.follows else []


def _verdict(uri: str, outcomes: Sequence[Outcome]) -> str:
    failed = [outcome for outcome in outcomes if outcome.result == "failed"]
    required = [outcome.check for outcome in failed if outcome.required]
    if not conforms(outcomes):
        return f"{uri} is no store for saferlhf: {', '.join(required)}"
    recommended = f", but lacks {', '.join(outcome.check for outcome in failed)}" if failed else ""
    return f"{uri} has all that saferlhf needs{recommended}"
