"""Stands where a step's Python interpreter would: has the step forked from the server, and ends as it ends.

Its arguments are the server's socket and then those of `python -m MODULE ...`. It imports nothing that takes time, and
nothing of this project. Without a server, the step runs in an interpreter of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path


def main(address: str, arguments: Sequence[str]) -> None:
    """Never returns: ends with the step's exit status, or becomes the step where no server answers."""
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(address)
        request = {"arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
        socket.send_fds(server, [b"\n"], [0, 1, 2])  # the byte that bears the descriptors
        server.sendall(json.dumps(request).encode() + b"\n")
        answers = server.makefile()
        pid = int(answers.readline())
    except (OSError, ValueError):
        os.execv(sys.executable, [sys.executable, *arguments])
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(pid, number))
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's are for the run, which asks its steps to stop
        signal.signal(number, signal.SIG_IGN)
    status = int(answers.readline() or -signal.SIGKILL)  # no answer: the server has gone, and the step with it
    os._exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
