"""Stands between processes and one server; while it is shut, that server is away for them."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

_PIECE = 1 << 16
_RESET = struct.pack("ii", 1, 0)
"""For SO_LINGER: close with a reset, as a host does where nobody listens any more."""


class GateToServer(socketserver.ThreadingTCPServer):
    """Attributes: `url`, to be used in place of the server's."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, server_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.upstream = (urlsplit(server_url).hostname or "", urlsplit(server_url).port or 0)
        self._changed = threading.Condition()
        self._shut = False
        self._turned_away = 0
        self._connections: set[socket.socket] = set()

    def shut(self) -> None:
        """Cut all connections, and let nobody in."""
        with self._changed:
            self._shut = True
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def open(self) -> None:
        with self._changed:
            self._shut = False

    def wait_until_asked_in_vain(self, times: int, seconds: float) -> None:
        """Until so many connections were refused since the gate was made."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._turned_away >= times, seconds), self._turned_away

    def admits(self, *connections: socket.socket) -> bool:
        with self._changed:
            if self._shut:
                self._turned_away += 1
                self._changed.notify_all()
            else:
                self._connections.update(connections)
            return not self._shut

    def forget(self, *connections: socket.socket) -> None:
        with self._changed:
            self._connections.difference_update(connections)


class _Connection(socketserver.BaseRequestHandler):
    server: GateToServer

    def handle(self) -> None:
        with socket.create_connection(self.server.upstream) as upstream:
            if not self.server.admits(self.request, upstream):
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                return
            back = threading.Thread(target=_pass_on, args=(upstream, self.request), daemon=True)
            back.start()
            _pass_on(self.request, upstream)
            back.join()
            self.server.forget(self.request, upstream)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def gate_to_server(server_url: str) -> Iterator[GateToServer]:
    with GateToServer(server_url) as gate:
        thread = threading.Thread(target=gate.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield gate
        finally:
            gate.shutdown()
            thread.join()
