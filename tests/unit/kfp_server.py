"""A small pipeline server on the loopback interface: the part of KFP's v2beta1 REST API that the project calls.

It keeps what it is given, answers lists in pages, and asks for a token when it has one.
"""

from __future__ import annotations

import email
import email.policy
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

_PAGE = 2
_API = "/apis/v2beta1"


@dataclass
class KfpServer:
    """State of the server; with a `token`, a request without it is refused."""

    url: str = ""
    token: str = ""
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    """(status, sentence) with which a call `METHOD /path` is refused."""
    pipelines: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    experiments: list[dict[str, Any]] = field(default_factory=list)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    _made: int = 0

    def respond(
        self, method: str, path: str, query: dict[str, str], body: Any, authorization: str
    ) -> tuple[int, dict[str, Any]]:
        call = f"{method} {path}"
        self.calls.append(call)
        if call == "GET /healthz":  # answered to everybody
            return 200, {"multi_user": bool(self.token)}
        if self.token and authorization != f"Bearer {self.token}":
            return 403, {"error": "no rights"}
        if call in self.refuse:
            status, sentence = self.refuse[call]
            return status, {"error_message": sentence, "error_details": sentence}
        if match := re.fullmatch(r"/pipelines/([^/]+)/versions", path):
            found = [entry for entry in self.versions if entry["pipeline_id"] == match[1]]
            return 200, _page("pipeline_versions", found, query)
        if call == "POST /pipelines/upload_version":
            return self._add_version(query, body)
        if method == "DELETE":
            self.schedules = [s for s in self.schedules if s["recurring_run_id"] != path.rpartition("/")[2]]
            return 200, {}
        name = path.strip("/")
        entries: list[dict[str, Any]] = {
            "pipelines": self.pipelines,
            "experiments": self.experiments,
            "recurringruns": self.schedules,
        }[name]
        key = {"pipelines": "pipeline", "experiments": "experiment", "recurringruns": "recurring_run"}[name]
        if method == "POST":
            entry = {**json.loads(body), f"{key}_id": self._new_id(key)}
            entries.append(entry)
            return 200, entry
        found = [e for e in entries if e.get("namespace", "") == query.get("namespace", "") or name == "recurringruns"]
        return 200, _page("recurringRuns" if name == "recurringruns" else name, _filtered(found, query), query)

    def _add_version(self, query: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        entry = {
            "pipeline_id": query["pipelineid"],
            "pipeline_version_id": self._new_id("version"),
            "display_name": query["name"],
            "name": query["name"],
            "description": query.get("description", ""),
        }
        self.versions.append(entry)
        self.files[query["name"]] = body
        return 200, entry

    def _new_id(self, kind: str) -> str:
        self._made += 1
        return f"{kind}-{self._made}"


@contextmanager
def kfp_server(token: str = "") -> Iterator[KfpServer]:
    state = KfpServer(token=token)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = self.headers.get("Content-Type", "")
            body = _file_of(kind, raw) if kind.startswith("multipart/") else raw
            path = parts.path.removeprefix(_API)
            status, answer = state.respond(self.command, path, query, body, self.headers.get("Authorization", ""))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    try:
        yield state
    finally:
        httpd.shutdown()
        httpd.server_close()


def _file_of(content_type: str, raw: bytes) -> bytes:
    """The one file of a multipart upload."""
    message = email.message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + raw, policy=email.policy.HTTP)
    return next(part for part in message.iter_parts()).get_payload(decode=True)  # type: ignore[no-any-return,attr-defined]


def _filtered(entries: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
    predicates = json.loads(query.get("filter", "{}")).get("predicates", [])
    wanted = {(p["key"], p["stringValue"]) for p in predicates if p["operation"] == "EQUALS"}
    return [entry for entry in entries if all(entry.get(key) == value for key, value in wanted)]


def _page(name: str, entries: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    start = int(query.get("page_token") or 0)
    end = start + min(_PAGE, int(query.get("page_size") or _PAGE))
    return {name: entries[start:end], "next_page_token": str(end) if end < len(entries) else ""}
