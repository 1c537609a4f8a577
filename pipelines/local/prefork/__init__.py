"""Steps without their ten seconds of imports: they are forked from a process that has made them.

run --- sh (KFP) --- client.py        one for each step; takes the place of `python3`
 \\                     :  socket
  `--- server.py --- the step         imports once, forks, and tells the client how the step ended
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

_SERVER = "pipelines.local.prefork.server"
_CLIENT = Path(__file__).with_name("client.py")
_GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


@contextlib.contextmanager
def preforked_python() -> Iterator[str]:
    """A shell command to use in place of `python3`, for as long as the block lasts.

    The server inherits the environment as it is now; what is set later counts for the steps, but not for libraries
    that read it when they are imported.

    Only where a fork is safe: on Linux, and without a GPU, whose driver a forked process cannot use once its parent
    has. Elsewhere the command is this interpreter.
    """
    if sys.platform != "linux" or any(driver.exists() for driver in _GPU_DRIVERS):
        yield shlex.quote(sys.executable)
        return
    with tempfile.TemporaryDirectory(prefix="saferlhf-prefork-") as folder:  # nobody else may enter it
        address = f"{folder}/socket"
        with _start_server(address) as server:
            try:
                yield shlex.join([sys.executable, "-IS", str(_CLIENT), address])
            finally:
                server.terminate()


def _start_server(address: str) -> subprocess.Popen[bytes]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        descriptor = listener.fileno()
        command = [sys.executable, "-m", _SERVER, str(descriptor)]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[descriptor],
            start_new_session=True,  # out of reach of a Ctrl-C: it would end steps that have not saved their state
        )


def is_forked_step(process: psutil.Process) -> bool:
    """Whether a process is a step that a server has forked; it looks like its server, and is below it."""
    parent = process.parent()
    return _SERVER in process.cmdline() and parent is not None and _SERVER in parent.cmdline()


@contextlib.contextmanager
def as_sys_executable(command: str) -> Iterator[None]:
    """Within the block, KFP's local runner starts its steps by this command: it asks `sys` for the interpreter."""
    before = sys.executable
    sys.executable = command
    try:
        yield
    finally:
        sys.executable = before
