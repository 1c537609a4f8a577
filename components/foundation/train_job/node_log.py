"""The log of node 0, line by line in our log, none lost and none twice, however often the connection breaks."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError, ReadTimeoutError

from components.foundation.errors import ClusterError
from components.foundation.logs import is_json_event
from components.foundation.train_job.kubernetes_api import KubernetesApi
from components.foundation.train_job.pods import PodBoard, PodState
from components.foundation.train_job.spec import NODE

_TAIL_LINES = 30
_CONNECT_SECONDS, _SILENT_SECONDS = 10, 300
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)$")

log = logging.getLogger("saferlhf")


class LogPosition:
    """How far a container's log has been read: the last timestamp, and the number of lines that bear it.

    A log can be asked for from a time on, not from a line on, and the server rounds that time down to a second.
    """

    def __init__(self) -> None:
        self.since = ""
        self._last = ""
        self._count = 0

    def new(self, lines: Iterable[str]) -> Iterator[str]:
        """Lines as the server sends them from `since` on, each after its timestamp -> texts that were not read yet."""
        start, skip = self._last, self._count
        for line in lines:
            stamp, _, text = line.partition(" ")
            if not _TIMESTAMP.match(stamp):  # the kubelet's own word, as when it cannot follow the file any more
                yield line
                continue
            time = _comparable(stamp)
            if time < start:
                continue
            if time == start and skip > 0:
                skip -= 1
                continue
            self._count = self._count + 1 if time == self._last else 1
            self._last, self.since = time, stamp
            yield text


class NodeLog:
    """Follows the log of node 0, through restarts of its container and new pods, until the board is closed."""

    def __init__(self, api: KubernetesApi, board: PodBoard) -> None:
        self._api = api
        self._board = board
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def run(self) -> None:
        """Follow; a log that cannot be read is said so, and does not end the job."""
        read = ""
        while (pod := self._board.wait_for_container(read)) is not None:
            try:
                self._follow(pod)
            except ClusterError as error:
                log.warning("the log of node 0 is not followed any more: %s", error)
                return
            read = pod.container

    def _follow(self, pod: PodState) -> None:
        """Copy one container's log to its end."""
        position, failures = LogPosition(), 0
        while True:
            running = self._is_running(pod)
            try:
                for text in position.new(self._lines(pod, position.since)):
                    failures = 0
                    self.tail.append(text)
                    _repeat(text)
                if not running:
                    return
                self._api.backoff.sleep(self._api.backoff.first)  # the stream ended; did the container?
            except ReadTimeoutError:
                log.debug("node 0 has been silent for %d s", _SILENT_SECONDS)
            except (ApiException, HTTPError) as error:
                if isinstance(error, ApiException) and error.status in {400, 404}:
                    return  # the container or its pod is gone
                failures += 1
                self._api.pause(f"log of pod {pod.name}", failures, error)

    def _is_running(self, pod: PodState) -> bool:
        return not self._board.closed and any(
            now.container == pod.container and now.running for now in self._board.all()
        )

    def _lines(self, pod: PodState, since: str) -> Iterator[str]:
        """Whole lines; what stands after the last newline when the connection breaks will come again."""
        query = [("container", NODE), ("follow", "true"), ("timestamps", "true")]
        if since:
            query.append(("sinceTime", since))  # the client's own method for logs does not know it
        response: Any = self._api.client.call_api(
            "/api/v1/namespaces/{namespace}/pods/{name}/log",
            "GET",
            path_params={"namespace": self._api.namespace, "name": pod.name},
            query_params=query,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=(_CONNECT_SECONDS, _SILENT_SECONDS),
        )
        try:
            rest = b""
            for chunk in response.stream(amt=None, decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            if rest:
                yield rest.decode(errors="replace")
        finally:
            response.close()


def _repeat(text: str) -> None:
    if is_json_event(text):
        print(text, flush=True)  # it tells its run, stage and rank by itself
    else:
        log.info("node 0 | %s", text)


def _comparable(stamp: str) -> str:
    """A timestamp -> a string that sorts by time, whatever its number of decimals."""
    match = _TIMESTAMP.match(stamp)
    assert match is not None
    return f"{match[1]}.{match[2] or ''}"
