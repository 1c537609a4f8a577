"""Options that several commands of `saferlhf` have."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

Profile = Annotated[str, typer.Option(help="smol: a real 135M language model; tiny: random weights, for tests")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated")]
Seed = Annotated[int, typer.Option(help="seed of every random choice")]

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C."""
