"""A champion in the cluster: its InferenceService, by server-side apply.

`saferlhf serve apply` does it by hand, and with `serving.apply` the promotion itself.
"""

from __future__ import annotations

import logging
from typing import Any

import yaml
from kubernetes.client.exceptions import ApiException

from components.foundation.champion_log import POLICY_MODEL, ChampionLog
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ClusterError
from components.foundation.train_job.kubernetes_api import KubernetesApi, explain
from components.promote.serving import GROUP, PLURAL, VERSION, handed_over_uri

FIELD_MANAGER = "saferlhf"
log = logging.getLogger("saferlhf")


def deploy_champion(store: CheckpointStore, api: KubernetesApi) -> None:
    """Let the cluster serve the policy that the champion log names last, as it was handed over.

    Two promotions may overwrite each other's service; but each looks at the log again after it applied, so the one
    that applies last applies the last entry. An entry that has not been handed over yet is left to whoever wrote it.

    Raises:
        ClusterError: as `apply_service`.
    """
    champions = ChampionLog(store, POLICY_MODEL)
    entry = champions.latest()
    while entry is not None and store.has_text(uri := handed_over_uri(store, POLICY_MODEL, entry.number)):
        service = yaml.safe_load(store.read_text(uri))
        apply_service(api, service)
        log.info("%s/%s serves version %s now", api.namespace, service["metadata"]["name"], entry.version)
        applied, entry = entry, champions.latest()
        if entry == applied:
            return


def apply_service(api: KubernetesApi, service: dict[str, Any]) -> dict[str, Any]:
    """Server-side apply: fields that are ours become as given, and those that we gave up are removed.

    A conflict (409) means that the object was being changed at that moment, and the same call is made again.

    Returns:
        the object as the cluster has it.

    Raises:
        ClusterError: the cluster has no KServe or no such namespace, refuses, or conflicts without end.
    """
    name = service["metadata"]["name"]
    what = f"InferenceService {api.namespace}/{name}"
    for failures in range(1, api.backoff.attempts + 1):
        try:
            answer: dict[str, Any] = api.call(
                f"applying {what}",
                api.client.call_api,
                f"/apis/{GROUP}/{VERSION}/namespaces/{api.namespace}/{PLURAL}/{name}",
                "PATCH",
                expected={404, 409},
                header_params={"Content-Type": "application/apply-patch+yaml", "Accept": "application/json"},
                query_params=[("fieldManager", FIELD_MANAGER), ("force", "true")],
                body=service,
                response_type="object",
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
            )
            return answer
        except ApiException as error:
            if error.status != 409:
                raise ClusterError(
                    f"{what}: the cluster has no such API or namespace ({explain(error)}): install KServe 0.11 or "
                    "newer, or name the namespace with --namespace"
                ) from error
            last = explain(error)
        api.backoff.sleep(api.backoff.seconds(failures))
    raise ClusterError(
        f"{what}: conflicted {api.backoff.attempts} times, at last with: {last}; see who else changes it"
    )
