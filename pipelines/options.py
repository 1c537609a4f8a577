"""Options that several commands of `saferlhf` have."""

from __future__ import annotations

import json
import signal
from typing import Annotated

import typer

Profile = Annotated[str, typer.Option(help="smol: a real 135M language model; tiny: random weights, for tests")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated")]
Seed = Annotated[int, typer.Option(help="seed of every random choice")]
FromRun = Annotated[str, typer.Option(help="id of an earlier run to start from, with --from-round")]
FromRound = Annotated[int, typer.Option(help="first round to run anew; what is before it is taken over")]

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C."""


def with_start(overrides: list[str] | None, from_run: str, from_round: int) -> tuple[str, ...]:
    """The overrides, and --from-run and --from-round as the settings that they stand for."""
    start = {
        "start.from_run": json.dumps(from_run) if from_run else "",
        "start.from_round": from_round,
    }  # 2024 is an id
    return (*(overrides or ()), *(f"{key}={value}" for key, value in start.items() if value))
