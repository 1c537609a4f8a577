"""Commands of ours as whoever started us can type them."""

from __future__ import annotations

import shlex
import sys


def own_command(*arguments: str) -> str:
    """A command line that works where this one did: `make run` starts `.venv/bin/saferlhf`, which no PATH holds."""
    program = sys.argv[0] if sys.argv[0].endswith("/saferlhf") else "saferlhf"
    return shlex.join([program, *arguments])
