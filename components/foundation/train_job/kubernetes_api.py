"""The Kubernetes API as a long-running step needs it: calls and watches that outlive a bad hour of the server.

A call is repeated after 429 (when the server says), 5xx, a broken connection and a slow answer, with growing pauses and
a bounded number of times. A watch is a list that keeps itself up to date: whenever its stream breaks, ends, or is too
old (410), it lists again and goes on.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.incluster_config import InClusterConfigLoader
from kubernetes.watch import Watch
from urllib3.exceptions import HTTPError

from components.foundation.errors import ClusterError

Json = dict[str, Any]
"""A Kubernetes object, as it travels."""

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PASSING = frozenset({410, 429, 500, 502, 503, 504})
_LONGEST_RETRY_AFTER = 300.0
_CONNECT_SECONDS, _WATCH_SECONDS = 10, 240
_HINTS = {
    401: "the service account's token is not accepted",
    403: "grant the step's service account this verb (the Helm chart of saferlhf does)",
}

log = logging.getLogger("saferlhf")


@dataclass(frozen=True)
class Backoff:
    """Pauses between attempts: `first` seconds, twice as long each time, at most `longest`; `attempts` in a row.

    An attempt has failed after `answer_seconds` without an answer.
    """

    attempts: int = 20
    first: float = 1.0
    longest: float = 30.0
    answer_seconds: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def seconds(self, failures: int) -> float:
        """Pause after the given number of failures in a row."""
        return float(min(self.longest, self.first * 2 ** (failures - 1)))


@dataclass(frozen=True)
class Cluster:
    """The cluster that this process runs in, and the pod that it is."""

    client: ApiClient
    namespace: str
    pod_name: str
    pod_uid: str


def in_cluster(environment: Mapping[str, str] = os.environ, service_account: Path = _SERVICE_ACCOUNT) -> Cluster:
    """Connect as the pod's service account.

    Raises:
        ClusterError: this process is not in a pod, has no token, or does not know its pod (KFP_POD_NAME, KFP_POD_UID).
    """
    configuration = Configuration()
    loader = InClusterConfigLoader(str(service_account / "token"), str(service_account / "ca.crt"), environ=environment)
    try:
        loader.load_and_set(configuration)
        namespace = (service_account / "namespace").read_text(encoding="utf-8").strip()
    except (ConfigException, OSError) as error:
        raise ClusterError(
            "training on several nodes, and serving.apply, need a pod with a service account, and this process has "
            f"none: {error} (looked in {service_account}); run the pipeline on a cluster, or without them"
        ) from error
    pod = {name: environment.get(name, "") for name in ("KFP_POD_NAME", "KFP_POD_UID")}
    missing = [name for name, value in pod.items() if not value]
    if missing:
        raise ClusterError(
            f"{' and '.join(missing)} not set: the TrainJob could not be tied to this step's pod and would outlive it; "
            "Kubeflow Pipelines sets them, elsewhere set them by the downward API"
        )
    return Cluster(new_client(configuration), namespace, pod["KFP_POD_NAME"], pod["KFP_POD_UID"])


def new_client(configuration: Configuration) -> ApiClient:
    """A client without retries of its own: urllib3's would sleep out of sight, and multiply ours."""
    configuration.retries = False
    return ApiClient(configuration)


class KubernetesApi:
    """Calls and watches with back-off."""

    def __init__(self, cluster: Cluster, backoff: Backoff) -> None:
        self.client = cluster.client
        self.namespace = cluster.namespace
        self.backoff = backoff

    def call(
        self, what: str, function: Callable[..., Any], *arguments: Any, expected: Collection[int] = (), **options: Any
    ) -> Any:
        """Call a function of the client until it answers -> its answer as JSON; `what` is for messages.

        Raises:
            ApiException: the server's answer is one of the `expected` statuses.
            ClusterError: it refuses the call, or has failed too often in a row.
        """
        failures = 0
        while True:
            try:
                timeout = (_CONNECT_SECONDS, self.backoff.answer_seconds)
                answer = function(*arguments, _request_timeout=timeout, **options)
                return self.client.sanitize_for_serialization(answer)
            except ApiException as error:
                if error.status in expected:
                    raise
                failures += 1
                self.pause(what, failures, error)
            except HTTPError as error:
                failures += 1
                self.pause(what, failures, error)

    def watch(
        self, what: str, list_objects: Callable[..., Any], *arguments: Any, **selector: Any
    ) -> Iterator[list[Json]]:
        """All objects that match, now and whenever one of them changes; without end.

        Raises:
            ClusterError: the server refuses, or has failed too often in a row.
        """
        failures = 0
        while True:
            listing = self.call(what, list_objects, *arguments, **selector)
            present = {item["metadata"]["uid"]: item for item in listing["items"]}
            yield list(present.values())
            try:
                for event in Watch().stream(
                    list_objects,
                    *arguments,
                    resource_version=listing["metadata"]["resourceVersion"],
                    timeout_seconds=_WATCH_SECONDS,
                    _request_timeout=(_CONNECT_SECONDS, _WATCH_SECONDS + self.backoff.answer_seconds),
                    **selector,
                ):
                    failures = 0
                    changed = event["raw_object"]
                    if event["type"] == "DELETED":
                        present.pop(changed["metadata"]["uid"], None)
                    else:
                        present[changed["metadata"]["uid"]] = changed
                    yield list(present.values())
                failures = 0  # the server ended the stream, as it does every few minutes where nothing changes
                self.backoff.sleep(self.backoff.first)
            except (ApiException, HTTPError, ValueError, KeyError) as error:  # ValueError: half a line of JSON
                failures += 1
                self.pause(what, failures, error)

    def pause(self, what: str, failures: int, error: Exception) -> None:
        """Wait after the given number of failures in a row.

        Raises:
            ClusterError: it is no use: the server refuses, or has failed too often.
        """
        if isinstance(error, ApiException) and error.status not in _PASSING:
            hint = _HINTS.get(error.status)
            raise ClusterError(
                f"{what}: refused with {error.status}: {explain(error)}" + (f"; {hint}" if hint else "")
            ) from error
        if failures >= self.backoff.attempts:
            raise ClusterError(
                f"{what}: the Kubernetes API at {self.client.configuration.host} failed {failures} times in a row, "
                f"at last with: {explain(error)}; start the step again when the API server answers"
            ) from error
        asked = _retry_after(error)
        seconds = self.backoff.seconds(failures) if asked is None else asked
        log.info("%s: %s; again in %.0f s", what, explain(error), seconds)
        self.backoff.sleep(seconds)


def explain(error: Exception) -> str:
    """What the server says in its answer, else what the client says."""
    if not isinstance(error, ApiException):
        return f"{type(error).__name__}: {error}"
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


def _retry_after(error: Exception) -> float | None:
    headers = error.headers if isinstance(error, ApiException) else None
    try:
        return min(_LONGEST_RETRY_AFTER, float((headers or {}).get("Retry-After", "")))
    except ValueError:
        return None
