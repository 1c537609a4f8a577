"""A small pipeline server on the loopback interface: the part of KFP's v2beta1 REST API that the project calls.

It keeps what it is given in a `KfpState` and answers lists in pages of two, newest first where it is asked to. With a
token it asks for that. It breaks on demand: `refuse` a call, `hold` its answer, or act on one with `on_call`.
"""

from __future__ import annotations

import email
import email.policy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.unit.kfp_state import KfpState, Refusal

_API = "/apis/v2beta1"
_GRPC_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 500: 13, 503: 14}


@dataclass
class KfpServer(KfpState):
    """The state, and how the server shall behave. A call is `METHOD /path` without the API's prefix.

    Attributes:
        token: a request without it is answered with 401, which repeats what was sent, as a careless server would.
        refuse: pattern of calls -> (status, sentence). Only the first so many of `refuse_times` where that has it.
        lose: pattern of a call that is carried out, and whose answer is lost.
        hold: pattern of calls -> an event; the answer waits for it.
        on_call: gets every call before it is answered.
        page: an HTML page that every call is answered with, as a login proxy would.
    """

    url: str = ""
    token: str = ""
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    refuse_times: dict[str, int] = field(default_factory=dict)
    lose: str = ""
    hold: dict[str, threading.Event] = field(default_factory=dict)
    on_call: Callable[[str], None] = lambda call: None
    page: str = ""
    calls: list[str] = field(default_factory=list)

    @property
    def changes(self) -> list[str]:
        """The calls that were not only to read."""
        return [call for call in self.calls if not call.startswith("GET ")]

    def respond(self, call: str, query: dict[str, str], body: Any, authorization: str) -> tuple[int, dict[str, Any]]:
        self.calls.append(call)
        self.on_call(call)
        for pattern, event in self.hold.items():
            if fnmatchcase(call, pattern):
                event.wait(20)
        if call == "GET /healthz":  # answered to everybody
            return 200, {"multi_user": True} if self.multi_user else {}
        try:
            if self.token and authorization != f"Bearer {self.token}":
                raise Refusal(401, f"Unauthenticated: {authorization!r} is not accepted")
            self._refuse_if_asked(call)
            answer = self.answer(call, query, body)
            if self.lose and fnmatchcase(call, self.lose):
                raise Refusal(503, "the answer is lost")
            return 200, answer
        except Refusal as refusal:
            code, sentence = _GRPC_CODES.get(refusal.status, 2), refusal.sentence
            if "upload" in call:  # KFP's upload is a server of its own kind
                return refusal.status, {"error_message": sentence, "error_details": sentence}
            return refusal.status, {"error": sentence, "code": code, "message": sentence, "details": []}

    def _refuse_if_asked(self, call: str) -> None:
        for pattern, (status, sentence) in self.refuse.items():
            if fnmatchcase(call, pattern) and self.refuse_times.get(pattern, 1) > 0:
                if pattern in self.refuse_times:
                    self.refuse_times[pattern] -= 1
                raise Refusal(status, sentence)


@contextmanager
def kfp_server(token: str = "", multi_user: bool = False) -> Iterator[KfpServer]:
    state = KfpServer(token=token, multi_user=multi_user or bool(token))

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = self.headers.get("Content-Type", "")
            body = _file_of(kind, raw) if kind.startswith("multipart/") else raw
            call = f"{self.command} {parts.path.removeprefix(_API)}"
            status, answer = state.respond(call, query, body, self.headers.get("Authorization", ""))
            content = state.page.encode() or json.dumps(answer).encode()
            self.send_response(200 if state.page else status)
            self.send_header("Content-Type", "text/html" if state.page else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has given up waiting is no news."""

    httpd = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    try:
        yield state
    finally:
        for event in state.hold.values():
            event.set()
        httpd.shutdown()
        httpd.server_close()


def _file_of(content_type: str, raw: bytes) -> bytes:
    """The one file of a multipart upload."""
    message = email.message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + raw, policy=email.policy.HTTP)
    return next(part for part in message.iter_parts()).get_payload(decode=True)  # type: ignore[no-any-return,attr-defined]
