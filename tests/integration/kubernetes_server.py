"""A small Kubernetes API server for tests, over real HTTP or HTTPS, with faults on demand."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.integration.kubernetes_state import EVENTS, PODS, SERVICES, TRAIN_JOBS, ClusterState, Fault


class KubernetesServer(ClusterState):
    """A cluster that listens at `url`; with a certificate, it speaks TLS."""

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """End all connections; those of clients that still wait break."""
        super().stop()
        self._http.shutdown()
        self._http.server_close()


def _handler(server: KubernetesServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        state = server

    return Handler


class _Handler(BaseHTTPRequestHandler):
    """One connection of the API."""

    state: KubernetesServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # small answers in two packets would wait for the client

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a test's output is its own."""

    def _begin(self) -> tuple[str, dict[str, str], Any, Fault | None]:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        with self.state.changed:
            request = f"{self.command} {self.path}"
            self.state.requests.append(request)
            self.state.tokens.append(self.headers.get("Authorization", ""))
            fault = self.state.take_fault(request)
            self.state.changed.notify_all()
        return url.path, query, body, fault

    def _answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, {"kind": "Status", "code": status, "message": f"scripted {status}"}, headers)

    @contextmanager
    def _fault(self, fault: Fault | None) -> Iterator[bool]:
        """True where the request was dealt with by a fault."""
        if fault is not None and fault.status:
            self._refuse(fault.status, fault.headers)
            yield True
        elif fault is not None and fault.cut is None:
            self.state.wait(lambda: False)
            self.close_connection = True
            yield True
        else:
            try:
                yield False
            except ConnectionError:
                self.close_connection = True

    def do_POST(self) -> None:
        _, _, body, fault = self._begin()
        with self._fault(fault) as done:
            if not done:
                with self.state.changed:
                    job = self.state.create_job(body)
                self._answer(201, job) if job else self._refuse(409)

    def do_DELETE(self) -> None:
        path, _, body, fault = self._begin()
        with self._fault(fault) as done:
            if not done:
                with self.state.changed:
                    status = self.state.delete_job(path.rpartition("/")[2], body)
                self._answer(200, {"kind": "Status"}) if status == 200 else self._refuse(status)

    def do_PATCH(self) -> None:
        path, query, body, fault = self._begin()
        with self._fault(fault) as done:
            if not done:
                folder, _, name = path.rpartition("/")
                with self.state.changed:
                    if folder == SERVICES:
                        status = self.state.apply_service(name, self.headers["Content-Type"], query, body)
                    else:
                        status = self.state.patch_job(name, self.headers["Content-Type"], body)
                    stored = (self.state.services if folder == SERVICES else self.state.jobs).get(name)
                self._answer(status, stored) if status < 300 else self._refuse(status)

    def do_GET(self) -> None:
        path, query, _, fault = self._begin()
        with self._fault(fault) as done:
            if done:
                return
            cut = fault.cut if fault else None
            if path.endswith("/log"):
                self._log(path.split("/")[-2], query, cut)
            elif path in {TRAIN_JOBS, PODS, EVENTS}:
                self._watch(path, query, cut) if query.get("watch") else self._list(path, query)
            else:
                with self.state.changed:
                    job = self.state.read_job(path.rpartition("/")[2])
                self._answer(200, job) if job else self._refuse(404)

    def _list(self, path: str, query: Mapping[str, str]) -> None:
        with self.state.changed:
            listing = self.state.list(path, query)
        self._answer(200, listing)

    def _start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _break(self) -> None:
        self.close_connection = True

    def _watch(self, path: str, query: Mapping[str, str], cut: int | None) -> None:
        self._start_stream()
        version = int(query["resourceVersion"])
        while True:
            with self.state.changed:
                while not (events := self.state.events_after(path, query, version)) and not self.state.closed:
                    self.state.changed.wait()
            if self.state.closed:
                return self._break()
            for at, event in events:
                line = json.dumps(event).encode() + b"\n"
                if cut is not None:
                    self._chunk(line[:cut])
                    return self._break()
                self._chunk(line)
                version = at
            if version < 0:
                return self._chunk(b"")

    def _log(self, pod: str, query: Mapping[str, str], cut: int | None) -> None:
        """Lines from the second of `sinceTime` on, then new ones as they come; a cut is after so many bytes."""
        with self.state.changed:
            lines = self.state.log_of(pod)
        if lines is None:
            return self._refuse(404)
        if "tailLines" in query:
            return self._answer(200, "".join(line.partition(" ")[2] + "\n" for line in lines))
        self._start_stream()
        sent, budget = 0, cut
        while True:
            with self.state.changed:
                while len(lines) == sent and not self.state.log_has_ended(pod):
                    self.state.changed.wait()
                fresh, ended = lines[sent:], self.state.log_has_ended(pod)
                sent = len(lines)
            for line in fresh:
                if line[:19] < query.get("sinceTime", "")[:19]:
                    continue
                data = line.encode() + b"\n"
                if budget is not None and len(data) > budget:
                    self._chunk(data[:budget])
                    return self._break()
                budget = budget - len(data) if budget is not None else None
                self._chunk(data)
            if ended:
                return self._chunk(b"")


def kubeconfig(path: Path, server: str, namespace: str) -> str:
    """Write a kubeconfig whose current context is this server -> its path."""
    context = {"cluster": "here", "user": "me"} | ({"namespace": namespace} if namespace else {})
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "now",
        "clusters": [{"name": "here", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": {"token": "a-token"}}],
        "contexts": [{"name": "now", "context": context}],
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)
