"""An HTTP proxy between boto3 and a real S3 server (or MLflow and its own), which lets a test meddle with what passes.

Signatures stay valid: the server sees the Host header that the client has signed.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Headers = dict[str, str]
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding", "content-length"}


class Hangup(Exception):
    """The client's connection is reset instead of a reply."""


@dataclass(frozen=True)
class Request:
    """`path` has the query; names of headers are in lower case."""

    method: str
    path: str
    headers: Headers
    body: bytes

    def without(self, *names: str) -> Request:
        """Without these headers."""
        return replace(self, headers={name: value for name, value in self.headers.items() if name not in names})


@dataclass(frozen=True)
class Reply:
    """With `cut`, the connection is reset after so many bytes of the body, while Content-Length tells of all."""

    status: int
    headers: Headers
    body: bytes
    cut: int | None = None

    @classmethod
    def error(cls, status: int, code: str) -> Reply:
        """As S3 writes it."""
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
        return cls(status, {"content-type": "application/xml"}, body)


Forward = Callable[[Request], Reply]
Meddler = Callable[[Request, Forward], Reply]
"""Answers a request, for most by `forward(request)`. May raise Hangup."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, with one connection to the server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: S3Proxy

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        try:
            reply = self.server.meddler(Request(self.command, self.path, headers, body), self._forward)
        except Hangup:
            self._reset()
            return
        self.send_response_only(reply.status)
        length = reply.headers.get("content-length", "0") if self.command == "HEAD" else str(len(reply.body))
        for name, value in (reply.headers | {"content-length": length}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body[: reply.cut])
        if reply.cut is not None:
            self._reset()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forward(self, request: Request) -> Reply:
        upstream = self._upstream
        upstream.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name not in _HOP_BY_HOP:
                upstream.putheader(name, value)
        upstream.putheader("content-length", str(len(request.body)))
        upstream.endheaders(request.body)
        reply = upstream.getresponse()
        headers = {name.lower(): value for name, value in reply.getheaders()}
        hidden = _HOP_BY_HOP - {"content-length"}
        return Reply(reply.status, {n: v for n, v in headers.items() if n not in hidden}, reply.read())

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class S3Proxy(ThreadingHTTPServer):
    """Listens on a port of its own until the end of `proxied`."""

    request_queue_size = 128

    def __init__(self, upstream: str, meddler: Meddler) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.meddler = meddler
        self.problems: list[BaseException] = []

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # no farewell, which would keep a reset from being one

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # the client went away
            self.problems.append(error)


@contextlib.contextmanager
def proxied(environment: dict[str, str], meddler: Meddler) -> Iterator[dict[str, str]]:
    """The environment for which the S3 server of `environment` lies behind a proxy."""
    with proxy_to(environment["AWS_ENDPOINT_URL"], meddler) as url:
        yield environment | {"AWS_ENDPOINT_URL": url}


@contextlib.contextmanager
def proxy_to(server_url: str, meddler: Meddler) -> Iterator[str]:
    """The URL of a proxy to a server."""
    proxy = S3Proxy(server_url, meddler)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
    assert proxy.problems == []
