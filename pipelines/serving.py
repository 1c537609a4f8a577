"""`saferlhf serve`: the champion as a KServe InferenceService, into a file or into a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from kubernetes.client import Configuration
from kubernetes.config import list_kube_config_contexts, load_kube_config
from kubernetes.config.config_exception import ConfigException

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionLog
from components.foundation.errors import ClusterError
from components.foundation.tracking import Tracker
from components.foundation.train_job.kubernetes_api import Backoff, Cluster, KubernetesApi, new_client
from components.promote.deployment import apply_service
from components.promote.serving import handed_over_uri, inference_service, served_policy, to_yaml
from pipelines.registry import WorkDir, open_registry, resolved, run_of, store_of

serve_app = typer.Typer(help="Hand a policy over to KServe.", no_args_is_help=True)

WhichVersion = Annotated[str, typer.Option(help="number of a registered policy, or champion")]
CanaryShare = Annotated[
    float | None, typer.Option(min=0, max=1, help="of the traffic; default: as handed over, or serving.canary_share")
]


@serve_app.command()
def render(
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file to write")],
    version: WhichVersion = CHAMPION,
    canary_share: CanaryShare = None,
    workdir: WorkDir = Path("runs"),
) -> None:
    """Write a policy's InferenceService to a file."""
    with open_registry(workdir) as tracker:
        output.write_text(to_yaml(service_of(tracker, version, canary_share)), encoding="utf-8")
    typer.echo(f"wrote {output}")


@serve_app.command()
def apply(
    version: WhichVersion = CHAMPION,
    canary_share: CanaryShare = None,
    namespace: Annotated[str, typer.Option(help="default: that of the current context")] = "",
    workdir: WorkDir = Path("runs"),
) -> None:
    """Let the cluster of the current kubeconfig context serve a policy, by server-side apply."""
    with open_registry(workdir) as tracker:
        service = service_of(tracker, version, canary_share)
    with cluster_of_context(namespace, os.environ.get("KUBECONFIG")) as cluster:
        apply_service(KubernetesApi(cluster, Backoff(attempts=5)), service)
    typer.echo(
        f"applied InferenceService {cluster.namespace}/{service['metadata']['name']}: "
        f"{service['spec']['predictor']['model']['storageUri']}"
    )


def service_of(tracker: Tracker, version: str, canary_share: float | None) -> dict[str, Any]:
    """The InferenceService of a version: the champion's as it was handed over, another one made now.

    Raises:
        SettingsError: there is no such version.
        IntegrityError: its commit, or what was handed over, is not in the store.
    """
    number = resolved(tracker, version)
    tags = tracker.version_tags(POLICY_MODEL, number)
    store = store_of(tags["source"])
    entry = ChampionLog(store, POLICY_MODEL).latest()
    if canary_share is None and entry is not None and entry.version == number:
        uri = handed_over_uri(store, POLICY_MODEL, entry.number)
        if store.has_text(uri):
            service: dict[str, Any] = yaml.safe_load(store.read_text(uri))
            return service
    settings = run_of(tracker, number).settings.serving
    share = settings.canary_share if canary_share is None else canary_share
    return inference_service(served_policy(store, number, tags), settings, share)


@contextmanager
def cluster_of_context(namespace: str, config_file: str | None) -> Iterator[Cluster]:
    """The cluster of a kubeconfig's current context; without a file, of ~/.kube/config.

    Raises:
        ClusterError: there is no such file or context.
    """
    configuration = Configuration()
    try:
        load_kube_config(config_file=config_file, client_configuration=configuration)
        _, current = list_kube_config_contexts(config_file=config_file)
    except (ConfigException, OSError, yaml.YAMLError) as error:
        raise ClusterError(f"no cluster to apply to: {error}; set KUBECONFIG, or `saferlhf serve render`") from error
    with new_client(configuration) as client:
        yield Cluster(client, namespace or current["context"].get("namespace") or "default", "", "")
