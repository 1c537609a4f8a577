"""Runs a few lines in a process that may take only so much memory beyond what its imports took, and so much disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_LIMITED = """
import resource, sys
from components.foundation.errors import SaferlhfError
{imports}
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {more_bytes}, taken + {more_bytes}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes}))
try:
    print("returned", {expression})
except SaferlhfError as error:
    print(type(error).__name__, error)
"""


def bounded(
    imports: str, expression: str, *arguments: str | Path, more_bytes: int, file_bytes: int = 1_000_000_000
) -> str:
    """What an expression over sys.argv returned, or the error of ours that it raised; any other error fails.

    The address space is limited, so a process that needs more dies of it instead of being slow; so is every file.
    """
    program = _LIMITED.format(imports=imports, expression=expression, more_bytes=more_bytes, file_bytes=file_bytes)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    one_heap = os.environ | {"MALLOC_ARENA_MAX": "1"}  # else each thread reserves addresses that it never uses
    done = subprocess.run(command, cwd=_ROOT, env=one_heap, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
