"""What Kubernetes lets us do: it is asked, right by right, with a SelfSubjectAccessReview."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from kubernetes.client import (
    AuthorizationV1Api,
    Configuration,
    V1ResourceAttributes,
    V1SelfSubjectAccessReview,
    V1SelfSubjectAccessReviewSpec,
)
from kubernetes.client.exceptions import ApiException
from kubernetes.config import list_kube_config_contexts, load_kube_config
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.incluster_config import InClusterConfigLoader
from urllib3.exceptions import HTTPError

from components.foundation.errors import ClusterError
from components.foundation.train_job.kubernetes_api import new_client
from pipelines.doctor.findings import Finding

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_SECONDS = (5, 10)


@dataclass(frozen=True)
class Right:
    """A verb on a resource; `resource` may be `pods/log`."""

    verb: str
    resource: str
    group: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{f'.{self.group}' if self.group else ''}"


RIGHTS = (
    *(Right(v, "trainjobs", "trainer.kubeflow.org") for v in ("create", "get", "list", "watch", "patch", "delete")),
    *(Right(verb, "pods") for verb in ("list", "watch")),
    Right("get", "pods/log"),
    Right("list", "events"),
)
"""What a step that trains on several nodes does; the chart's Role `saferlhf` grants it."""


def check_rights(environment: Mapping[str, str] = os.environ, service_account: Path = _SERVICE_ACCOUNT) -> Finding:
    """May this process do all of `RIGHTS` in its namespace?

    Raises:
        ClusterError: Kubernetes cannot be reached, or does not answer.
    """
    found = _connection(environment, service_account)
    if found is None:
        return Finding(
            "skipped",
            "this is no pod, and kubectl is not configured",
            "set KUBECONFIG to check the rights on a cluster",
        )
    configuration, namespace = found
    api = AuthorizationV1Api(new_client(configuration))
    try:
        lacking = [right for right in RIGHTS if not _allowed(api, right, namespace)]
    except (ApiException, HTTPError) as error:
        reason = f"{error.status} {error.reason}" if isinstance(error, ApiException) else type(error).__name__
        raise ClusterError(
            f"Kubernetes at {configuration.host} does not say what we may do ({reason}): check the address, and that "
            "the account's token is accepted"
        ) from error
    if lacking:
        return Finding(
            "failed",
            f"in namespace {namespace} this account may not {', '.join(map(str, lacking))}",
            "stages on several nodes need it: install the chart with rbac.create=true, and start runs with its account",
        )
    return Finding("ok", f"all {len(RIGHTS)} rights that TrainJobs need are granted in namespace {namespace}")


def _allowed(api: AuthorizationV1Api, right: Right, namespace: str) -> bool:
    resource, _, subresource = right.resource.partition("/")
    attributes = V1ResourceAttributes(
        namespace=namespace, verb=right.verb, group=right.group, resource=resource, subresource=subresource or None
    )
    review = V1SelfSubjectAccessReview(spec=V1SelfSubjectAccessReviewSpec(resource_attributes=attributes))
    answer = api.create_self_subject_access_review(review, _request_timeout=_TIMEOUT_SECONDS)
    return bool(answer.status.allowed)


def _connection(environment: Mapping[str, str], service_account: Path) -> tuple[Configuration, str] | None:
    """(how to reach the cluster, our namespace there), or None where there is no cluster."""
    configuration = Configuration()
    try:
        if environment.get("KUBERNETES_SERVICE_HOST") and (service_account / "token").is_file():
            token, authority = str(service_account / "token"), str(service_account / "ca.crt")
            InClusterConfigLoader(token, authority, environ=environment).load_and_set(configuration)
            return configuration, (service_account / "namespace").read_text(encoding="utf-8").strip()
        file = environment.get("KUBECONFIG") or str(Path(environment.get("HOME", "/")) / ".kube" / "config")
        if not any(Path(part).is_file() for part in file.split(os.pathsep)):
            return None
        load_kube_config(file, client_configuration=configuration)
        _, active = list_kube_config_contexts(file)
        return configuration, active["context"].get("namespace") or "default"
    except (ConfigException, OSError, yaml.YAMLError) as error:
        raise ClusterError(f"the cluster's configuration cannot be read: {error}") from error
