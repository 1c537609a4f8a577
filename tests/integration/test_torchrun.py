"""torchrun's exit code, where its ranks were preempted and where they failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.foundation.exit_codes import PREEMPTED_EXIT_CODE

# Rank 1 waits to be stopped, and then ends like a stage that has saved its state. Rank 0 does the same, or ends with
# the code that it is given, once rank 1 is ready.
_RANK = f"""
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit({PREEMPTED_EXIT_CODE}))
fifo, code = sys.argv[1:]
open(fifo, "w" if os.environ["RANK"] == "1" else "r").close()  # each waits for the other
if code and os.environ["RANK"] == "0":
    sys.exit(int(code))
print("ready", flush=True)
signal.pause()
"""


def _start(folder: Path, code: str) -> subprocess.Popen[str]:
    os.mkfifo(folder / "fifo")
    (folder / "rank.py").write_text(_RANK)
    torchrun = [sys.executable, "-m", "components.foundation.torchrun", "--standalone", "--nproc_per_node", "2"]
    ranks = [str(folder / "rank.py"), str(folder / "fifo"), code]
    return subprocess.Popen([*torchrun, *ranks], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.fault
@pytest.mark.parametrize(("code", "expected"), [("75", PREEMPTED_EXIT_CODE), ("3", 1)])
def test_the_rank_that_ends_first_decides(tmp_path: Path, code: str, expected: int) -> None:
    process = _start(tmp_path, code)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == expected, output


@pytest.mark.fault
def test_row_11_sigterm_reaches_the_ranks_and_is_a_preemption(tmp_path: Path) -> None:
    process = _start(tmp_path, "")
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():  # one rank is enough: torchrun has started both by then
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED_EXIT_CODE, output
