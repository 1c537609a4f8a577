"""Start, watch and stop server processes that must outlive a Ctrl-C but never their owner.

A server is named by process id *and* start time, so a process id that was given to somebody else is never signalled.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from components.foundation.errors import ServiceError

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 1.0  # SeaweedFS would take 15 s; its data survive a kill
_LOG_TAIL_LINES = 15
_GUARD_SCRIPT = 'cat >/dev/null; kill -TERM "$@" 2>/dev/null; sleep 1; kill -KILL "$@" 2>/dev/null'
_children: list[subprocess.Popen[bytes]] = []  # kept, because Python warns when it forgets a running child


@dataclass(frozen=True)
class Server:
    """A server process: its log file, the loopback ports that it was given, and its start time (see `_start_time`)."""

    name: str
    pid: int
    create_time: float
    log: str
    ports: list[int]


def start_server(
    name: str, command: Sequence[str], *, log: Path, ports: Sequence[int], environment: Mapping[str, str], lock: int
) -> Server:
    """Start a server in its own session, so that a Ctrl-C in the terminal does not reach it.

    `lock` is a locked file descriptor that the server inherits: the lock is free when the server has gone.
    """
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            pass_fds=(lock,),
        )
    _children.append(child)
    return Server(name, child.pid, _start_time(child.pid), str(log), list(ports))


def is_alive(server: Server) -> bool:
    return _process(server) is not None


def wait_until_healthy(checks: Sequence[tuple[Server, Callable[[], bool]]], seconds: float) -> None:
    """Poll until every server's check holds.

    Raises:
        ServiceError: a server ended or was not healthy in time; the message holds the end of its log.
    """
    deadline = time.monotonic() + seconds
    waiting = list(checks)
    while waiting:
        for server, _ in waiting:
            if not is_alive(server):
                raise ServiceError(f"{server.name} ended while it was starting. {_log_tail(server)}")
        waiting = [(server, check) for server, check in waiting if not check()]
        if waiting and time.monotonic() > deadline:
            server = waiting[0][0]
            raise ServiceError(f"{server.name} was not ready after {seconds:.0f} s. {_log_tail(server)}")
        if waiting:
            time.sleep(_POLL_SECONDS)


def stop_servers(servers: Sequence[Server]) -> None:
    """Terminate, wait a little, kill, wait."""
    processes = [process for server in servers if (process := _process(server))]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(processes, timeout=_GRACE_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=_GRACE_SECONDS)
    _children[:] = [child for child in _children if child.poll() is None]


def start_guard(servers: Sequence[Server]) -> subprocess.Popen[bytes]:
    """A small shell that waits for the end of this process, even by SIGKILL, and then stops the servers.

    It reads a pipe whose other end only this process holds: the kernel closes that end, whatever happens here.
    """
    command = ["/bin/sh", "-c", _GUARD_SCRIPT, "guard", *(str(server.pid) for server in servers)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def release_guard(guard: subprocess.Popen[bytes]) -> None:
    """End the guard without a signal to the servers."""
    guard.kill()
    guard.communicate()


def free_ports(count: int) -> list[int]:
    """Ports that are free on 127.0.0.1 now, below the range from which the system takes ports for connections."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 2_000):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ServiceError(f"no {count} free ports between 20000 and 32000 on 127.0.0.1: stop some servers")


def _process(server: Server) -> psutil.Process | None:
    try:
        process = psutil.Process(server.pid)
        alive = _start_time(server.pid) == server.create_time and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def _start_time(pid: int) -> float:
    """On Linux in ticks since the machine started: the time of day at which that was changes when the clock is set.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return float(psutil.Process(pid).create_time())
    return float(stat.rpartition(")")[2].split()[19])  # the 22nd field; the second is a name in brackets


def _log_tail(server: Server) -> str:
    lines = Path(server.log).read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return f"The end of {server.log}:\n" + "\n".join(lines)
