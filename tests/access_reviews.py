"""Kubernetes' word on what an account may do."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Review = dict[str, Any]


@contextlib.contextmanager
def reviewer(allows: Callable[[Review], bool], status: int = 201) -> Iterator[tuple[str, list[Review]]]:
    """A Kubernetes API that answers SelfSubjectAccessReviews only -> (its address, what it was asked)."""
    asked: list[Review] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["spec"]["resourceAttributes"] | {"token": self.headers.get("Authorization", "")})
            answer = json.dumps(body | {"status": {"allowed": allows(asked[-1])}}).encode()
            right_path = self.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
            self.send_response(status if right_path else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
