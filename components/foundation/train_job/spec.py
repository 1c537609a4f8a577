"""What a TrainJob is asked to be: its name, its command, its manifest.

Field names are those of trainer.kubeflow.org/v1alpha1 since Kubeflow Trainer 2.2 (`runtimePatches`,
`activeDeadlineSeconds`), from kubeflow/trainer pkg/apis/trainer/v1alpha1/trainjob_types.go. The runtime
`torch-distributed` has one replicated job `node` with one container `node`, and sets PET_NNODES, PET_NPROC_PER_NODE,
PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, which torchrun reads as its options.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from components.foundation.errors import ClusterError, SettingsError
from components.foundation.scheduling import Affinity, Toleration, explain
from components.foundation.train_job.kubernetes_api import Cluster, Json
from components.foundation.untrusted import shown

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
DIGEST_ANNOTATION = "saferlhf/spec-digest"
NODE = "node"
"""Name of the runtime's replicated job, and of its container."""

_QUEUE_LABEL, _PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
_MANAGER = "saferlhf/train-job"
_LONGEST_NAME = 45
"""JobSet names pods `<name>-node-0-<index>-<5 characters>`, in 63 characters; this leaves four digits for the index."""


@dataclass(frozen=True)
class EnvReference:
    """An environment variable from the key of its name in an existing Secret or ConfigMap; either may be absent."""

    variable: str
    kind: Literal["secret", "configMap"]
    name: str


PLATFORM_ENVIRONMENT = (
    EnvReference("SAFERLHF_STORE_URI", "configMap", "saferlhf-platform"),
    EnvReference("AWS_ENDPOINT_URL", "configMap", "saferlhf-platform"),
    EnvReference("AWS_DEFAULT_REGION", "configMap", "saferlhf-platform"),
    EnvReference("MLFLOW_TRACKING_URI", "configMap", "saferlhf-platform"),
    EnvReference("AWS_ACCESS_KEY_ID", "secret", "saferlhf-s3"),
    EnvReference("AWS_SECRET_ACCESS_KEY", "secret", "saferlhf-s3"),
    EnvReference("MLFLOW_TRACKING_USERNAME", "secret", "saferlhf-mlflow"),
    EnvReference("MLFLOW_TRACKING_PASSWORD", "secret", "saferlhf-mlflow"),
)
"""What every rank needs to reach the store and MLflow."""


@dataclass(frozen=True)
class TrainJobSpec:
    """A training job over several nodes.

    The namespace is not here: it is that of the step's pod, which owns the job.

    Attributes:
        run_id, stage, round: what the job is for; they make its name.
        image: by digest, which goes into the manifests of what the job commits.
        command: see `train_job_command`.
        processes_per_node: ranks on each node.
        resources: limits of each node: cpu, memory, and the GPU resource with its count, for instance
            `{"cpu": "16", "memory": "200Gi", "nvidia.com/gpu": "8"}`.
        requests: of each node, where they are less than `resources`, for instance `{"cpu": "8"}`.
        shared_memory: size of /dev/shm, which NCCL and data loaders use, for instance `16Gi`; empty: the runtime's.
        queue: Kueue LocalQueue that admits all nodes at once; empty: none.
        priority: Kueue WorkloadPriorityClass, by which it goes before others of the queue; empty: none.
        deadline_seconds: how long the job may run, queueing not counted.
        retries: how often a preempted job is started again.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    run_id: str
    stage: str
    round: int
    image: str
    command: Sequence[str]
    nodes: int
    processes_per_node: int
    resources: Mapping[str, str]
    requests: Mapping[str, str] = field(default_factory=dict)
    shared_memory: str = ""
    environment: Sequence[EnvReference] = PLATFORM_ENVIRONMENT
    service_account: str = "saferlhf"
    user_id: int = 10001
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Toleration] = ()
    affinity: Affinity = field(default_factory=Affinity)
    queue: str = ""
    priority: str = ""
    deadline_seconds: int = 24 * 3600
    retries: int = 3
    runtime: str = "torch-distributed"

    @property
    def name(self) -> str:
        """The job's name: the same for every attempt of a step, another for every other step."""
        return job_name(self.run_id, self.stage, self.round)


def read_spec(text: str, run_id: str, stage: str, round_number: int, command: Sequence[str]) -> TrainJobSpec:
    """The job that a platform describes (SAFERLHF_TRAIN_JOB: the other fields of a TrainJobSpec, as JSON), for a stage.

    Raises:
        SettingsError: it is no such description; the message names the field.
    """
    ours = {"run_id": run_id, "stage": stage, "round": round_number, "command": tuple(command)}
    try:
        return TypeAdapter(TrainJobSpec).validate_python({**json.loads(text), **ours})
    except ValidationError as error:
        raise SettingsError(explain(error, "SAFERLHF_TRAIN_JOB")) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise SettingsError(f"SAFERLHF_TRAIN_JOB={shown(text)} is no JSON object of TrainJobSpec's fields") from error


def train_job_command(target: str, arguments: Sequence[str | int | float]) -> tuple[str, ...]:
    """Command of a node's container: every rank calls `target` ("package.module:function") with `arguments`."""
    launch = ("-m", "components.foundation.launch", target, json.dumps(list(arguments)))
    return ("python", "-m", "components.foundation.torchrun", *launch)


def job_name(run_id: str, stage: str, round_number: int) -> str:
    """A DNS label (RFC 1035) that begins readably and ends with a digest of the three."""
    digest = hashlib.sha256(f"{run_id}/{stage}/{round_number}".encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", f"saferlhf-{stage}-r{round_number}-{run_id}".lower())
    return f"{readable[: _LONGEST_NAME - 9].strip('-')}-{digest}"


def manifest(spec: TrainJobSpec, cluster: Cluster) -> Json:
    """The TrainJob, owned by the step's pod."""
    body = _owned_by_nobody(spec)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    body["metadata"]["annotations"][DIGEST_ANNOTATION] = digest
    body["metadata"]["namespace"] = cluster.namespace
    body["metadata"]["ownerReferences"] = owner_references(cluster)
    return body


def owner_references(cluster: Cluster) -> list[Json]:
    """When the step's pod goes, its job goes too."""
    return [{"apiVersion": "v1", "kind": "Pod", "name": cluster.pod_name, "uid": cluster.pod_uid}]


def check_kept(sent: Json, stored: Json) -> None:
    """Check that the server stored every field: one that it does not know, it drops without a word.

    Raises:
        ClusterError: it dropped one.
    """
    dropped = _first_dropped(sent["spec"], stored["spec"], "spec")
    if dropped:
        raise ClusterError(
            f"the cluster's TrainJob has no field {dropped}, so the job would not run as asked: "
            "install Kubeflow Trainer 2.2 or newer"
        )


def _first_dropped(sent: Any, stored: Any, path: str) -> str:
    if isinstance(sent, dict) and isinstance(stored, dict):
        for key, value in sent.items():
            deeper = _first_dropped(value, stored[key], f"{path}.{key}") if key in stored else f"{path}.{key}"
            if deeper:
                return deeper
    if isinstance(sent, list) and isinstance(stored, list):
        for item, kept in zip(sent, stored, strict=False):
            deeper = _first_dropped(item, kept, f"{path}[]")
            if deeper:
                return deeper
    return ""


def _owned_by_nobody(spec: TrainJobSpec) -> Json:
    labels = {"app.kubernetes.io/name": "saferlhf", "app.kubernetes.io/component": spec.stage.replace("_", "-")}
    if spec.queue:
        labels[_QUEUE_LABEL] = spec.queue
    if spec.priority:
        labels[_PRIORITY_LABEL] = spec.priority
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": spec.name,
            "labels": labels,
            "annotations": {"saferlhf/run-id": spec.run_id, "saferlhf/round": str(spec.round)},
        },
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": spec.runtime},
            "activeDeadlineSeconds": spec.deadline_seconds,
            "trainer": {
                "image": spec.image,
                "command": [part.replace("$(", "$$(") for part in spec.command],  # or Kubernetes expands variables
                "numNodes": spec.nodes,
                "numProcPerNode": spec.processes_per_node,
                "resourcesPerNode": {
                    "requests": {**spec.resources, **spec.requests},
                    "limits": dict(spec.resources),
                },
                "env": [_image_digest(spec), *(_env(reference) for reference in spec.environment)],
            },
            "runtimePatches": [{"manager": _MANAGER, "trainingRuntimeSpec": _runtime_patch(_pod_patch(spec))}],
        },
    }


def _image_digest(spec: TrainJobSpec) -> Json:
    return {"name": "SAFERLHF_IMAGE_DIGEST", "value": spec.image.partition("@")[2]}


def _env(reference: EnvReference) -> Json:
    source = {"name": reference.name, "key": reference.variable, "optional": True}
    return {"name": reference.variable, "valueFrom": {f"{reference.kind}KeyRef": source}}


def _runtime_patch(pod: Json) -> Json:
    # In a Kubeflow profile's namespace Istio would add a proxy, which never ends and takes the ranks' connections.
    template = {"metadata": {"labels": {"sidecar.istio.io/inject": "false"}}, "spec": pod}
    job = {"spec": {"template": template}}
    return {"template": {"spec": {"replicatedJobs": [{"name": NODE, "template": job}]}}}


def _pod_patch(spec: TrainJobSpec) -> Json:
    pod: Json = {
        "serviceAccountName": spec.service_account,
        "securityContext": {
            "runAsNonRoot": True,
            **dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), spec.user_id),
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    # with the pod's, what a namespace with Pod Security level "restricted" asks for
    container: Json = {
        "name": NODE,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if spec.node_selector:
        pod["nodeSelector"] = dict(spec.node_selector)
    if spec.tolerations:
        pod["tolerations"] = [toleration.manifest() for toleration in spec.tolerations]
    if spec.affinity != Affinity():
        pod["affinity"] = spec.affinity.manifest()
    if spec.shared_memory:
        memory = {"medium": "Memory", "sizeLimit": spec.shared_memory}
        pod["volumes"] = [{"name": "shared-memory", "emptyDir": memory}]
        container["volumeMounts"] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    return pod | {"containers": [container]}
