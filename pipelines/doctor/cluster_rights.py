"""Does Kubernetes let a step do what training on several nodes needs?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml
from kubernetes.client import Configuration
from kubernetes.config import list_kube_config_contexts, load_kube_config
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.incluster_config import InClusterConfigLoader

from components.foundation.errors import ClusterError
from components.foundation.train_job.kubernetes_api import new_client
from components.foundation.train_job.rights import Right, lacking
from pipelines.doctor.findings import Finding

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


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
    missing = lacking(new_client(configuration), namespace, RIGHTS)
    if missing:
        return Finding(
            "failed",
            f"in namespace {namespace} this account may not {', '.join(map(str, missing))}",
            "stages on several nodes need it: install the chart with rbac.create=true, and start runs with its account",
        )
    return Finding("ok", f"all {len(RIGHTS)} rights that TrainJobs need are granted in namespace {namespace}")


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
