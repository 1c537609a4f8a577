"""A champion as something to serve: a KServe InferenceService, kept beside the champion log.

    <store>/registry/<model>-serving/000001.yaml   of entry 1 of the log, written once, with If-None-Match

Whoever deploys reads the newest one. `deployment.py` gives it to a cluster.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import yaml

from components.foundation.champion_log import ChampionEntry
from components.foundation.checkpoint_store import MANIFEST_NAME, CheckpointStore
from components.foundation.errors import ConflictError
from components.foundation.run_context import RunContext
from components.foundation.setting_sections import ServingSettings

GROUP, VERSION, PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
VERSION_ANNOTATION, RUN_ANNOTATION = "saferlhf/version", "saferlhf/run-id"
DIGEST_ANNOTATION = "saferlhf/manifest-sha256"
_SCRATCH = "/tmp"
log = logging.getLogger("saferlhf")


@dataclass(frozen=True)
class ServedPolicy:
    """A registered version, as far as serving it goes.

    Attributes:
        model_uri: folder of the exported model, in a commit that never changes.
        manifest_sha256: of that commit's manifest, which holds the digest of every file.
    """

    version: str
    run_id: str
    model_uri: str
    manifest_sha256: str


def served_policy(store: CheckpointStore, version: str, tags: dict[str, str]) -> ServedPolicy:
    """What is to be served of a version, by its tags.

    Raises:
        IntegrityError: the commit that the version names is not in the store.
    """
    commit = tags["source"].removesuffix("/model")
    text = store.read_text(f"{commit}/{MANIFEST_NAME}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return ServedPolicy(version, tags.get("run_id", ""), tags["source"], digest)


def inference_service(policy: ServedPolicy, settings: ServingSettings, canary_share: float) -> dict[str, Any]:
    """The InferenceService: KServe's runtime for Hugging Face folders with vLLM, read-only and not as root.

    Args:
        canary_share: of the traffic for this policy; the one that served before keeps the rest. With 1 the field is
            left out, which is how KServe ends a canary.
    """
    resources: dict[str, str] = {"cpu": f"{settings.cpu:g}", "memory": settings.memory}
    if settings.gpus:
        resources["nvidia.com/gpu"] = str(settings.gpus)
    predictor = {
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,  # a model server asks nothing of the cluster
        "minReplicas": 1,  # a model takes minutes to load: never scaled to zero
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "model": {
            "modelFormat": {"name": "huggingface"},
            "storageUri": policy.model_uri,
            "args": ["--backend=vllm"],
            "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}, {"name": "HOME", "value": _SCRATCH}],
            "resources": {"requests": resources, "limits": dict(resources)},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "scratch", "mountPath": _SCRATCH}],
        },
        "volumes": [{"name": "scratch", "emptyDir": {}}],
    }
    if canary_share < 1:
        predictor["canaryTrafficPercent"] = round(100 * canary_share)
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "InferenceService",
        "metadata": {
            "name": settings.name,
            "labels": {"app.kubernetes.io/name": settings.name, "app.kubernetes.io/managed-by": "saferlhf"},
            "annotations": {
                VERSION_ANNOTATION: policy.version,
                RUN_ANNOTATION: policy.run_id,
                DIGEST_ANNOTATION: policy.manifest_sha256,
            },
        },
        "spec": {"predictor": predictor},
    }


def hand_over(context: RunContext, model: str, entry: ChampionEntry, canary_share: float) -> str:
    """Write the InferenceService of a champion's entry, unless it is there -> its URI.

    An entry that has its manifest keeps it: it is of the same version, whoever wrote it.
    """
    uri = handed_over_uri(context.store, model, entry.number)
    if is_handed_over(context.store, model, entry.number):
        return uri
    policy = served_policy(context.store, entry.version, context.tracker.version_tags(model, entry.version))
    try:
        context.store.write_text(uri, to_yaml(inference_service(policy, context.settings.serving, canary_share)))
    except ConflictError:  # somebody else was faster
        return uri
    log.info("to serve %s version %s: %s", model, entry.version, uri)
    return uri


def is_handed_over(store: CheckpointStore, model: str, number: int) -> bool:
    """Whether all was done that follows from an entry: its manifest is written last."""
    return store.has_text(handed_over_uri(store, model, number))


def handed_over_uri(store: CheckpointStore, model: str, number: int) -> str:
    """Where the InferenceService of an entry of the champion log lies."""
    return f"{store.root_uri}/registry/{model}-serving/{number:06d}.yaml"


def to_yaml(service: dict[str, Any]) -> str:
    return yaml.safe_dump(service, sort_keys=False, width=120)
