"""Stands between one process and its S3 server: passes on every byte, but at one request strikes.

The process needs no hook for it: it talks to S3 as ever, and what hits it is a real signal, or a real answer.
"""

from __future__ import annotations

import os
import signal
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

_PIECE = 1 << 16
FULL = (
    b"HTTP/1.1 507 Insufficient Storage\r\nContent-Type: application/xml\r\nConnection: close\r\n\r\n"
    b"<Error><Code>InsufficientStorage</Code><Message>the disk is full</Message></Error>"
)


@dataclass(frozen=True)
class Trap:
    """The `occurrence`-th request of this method to a path that ends so.

    Attributes:
        number: the signal that the process gets. SIGKILL takes the request with it; after any other it is passed on.
        in_the_middle: half of the request's body has reached the server by then; else not even its head.
        answer: what the process gets instead of a signal, for this request and all later ones like it.
    """

    method: str
    suffix: str
    occurrence: int = 1
    number: int = signal.SIGKILL
    in_the_middle: bool = False
    answer: bytes = b""


class KillingProxy(socketserver.ThreadingTCPServer):
    """Attributes: `url` for AWS_ENDPOINT_URL; `requests`, (method, path) of each request so far."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, s3_url: str, trap: Trap | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[tuple[str, str]] = []
        self.upstream = (urlsplit(s3_url).hostname or "", urlsplit(s3_url).port or 0)
        self._trap = trap
        self._seen = 0
        self._lock = threading.Lock()
        self._victim = 0
        self._armed = threading.Event()

    def aim_at(self, pid: int) -> None:
        """Name the process; until then its first request waits."""
        self._victim = pid
        self._armed.set()

    def note(self, method: str, path: str) -> Trap | None:
        """Count a request; the trap, where it is the one."""
        with self._lock:
            self.requests.append((method, path))
            trap = self._trap
            if trap is None or trap.method != method or not path.endswith(trap.suffix):
                return None
            self._seen += 1
            struck = self._seen == trap.occurrence or (trap.answer and self._seen > trap.occurrence)
            return trap if struck else None

    def strike(self, number: int) -> None:
        self._armed.wait()
        os.kill(self._victim, number)


class _Connection(socketserver.BaseRequestHandler):
    server: KillingProxy

    def handle(self) -> None:
        with socket.create_connection(self.server.upstream) as store, self.request.makefile("rb") as client:
            threading.Thread(target=self._answers, args=(store,), daemon=True).start()
            while head := _head(client):
                method, target, _ = head[0].decode().split(" ", 2)
                headers = {name.lower(): value.strip() for name, _, value in (h.decode().partition(":") for h in head)}
                assert "transfer-encoding" not in headers, "bodies have a length"
                length = int(headers.get("content-length", 0))
                trap = self.server.note(method, urlsplit(target).path)
                if trap is not None and trap.answer:
                    if "expect" not in headers:  # a client that asks first sends no body after a refusal
                        client.read(length)
                    self.request.sendall(trap.answer)
                    return
                if trap is not None and not trap.in_the_middle:
                    self.server.strike(trap.number)
                    if trap.number == signal.SIGKILL:
                        return
                store.sendall(b"".join(head))
                if trap is not None and trap.in_the_middle:
                    store.sendall(client.read(length // 2))
                    self.server.strike(trap.number)
                    return
                for start in range(0, length, _PIECE):
                    try:
                        piece = client.read(min(_PIECE, length - start))
                    except ConnectionError:  # the process was killed at another request
                        return
                    store.sendall(piece)

    def _answers(self, store: socket.socket) -> None:
        try:
            while piece := store.recv(_PIECE):
                self.request.sendall(piece)
        except OSError:
            pass  # one of both ends is gone: nobody waits for the rest


def _head(client: socket.SocketIO) -> list[bytes]:
    """Lines of a request's head up to the empty one, which is there too; none at the end of the connection."""
    lines: list[bytes] = []
    try:
        while line := client.readline():
            lines.append(line)
            if line == b"\r\n":
                return lines
    except ConnectionError:
        pass  # the process was killed
    return []


@contextmanager
def killing_proxy(s3_url: str, trap: Trap | None = None) -> Iterator[KillingProxy]:
    with KillingProxy(s3_url, trap) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
