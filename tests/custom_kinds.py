"""Kinds that are not Kubernetes' own, checked as an API server that has their definitions would.

An object's own fields are checked against a schema, written by hand from the kind's Go types, that knows no field
beyond those; whatever of it becomes part of a pod is put into one and checked against Kubernetes' own schema.

    LocalQueue, WorkloadPriorityClass, ClusterQueue, ResourceFlavor    kueue v0.15 apis/kueue/v1beta2
    TrainJob            kubeflow/trainer v2.3.0 pkg/apis/trainer/v1alpha1/trainjob_types.go
    InferenceService    kserve v0.20.0 pkg/apis/serving/v1beta1/{inference_service,predictor,component}.go
    PodMonitor, PrometheusRule    prometheus-operator pkg/apis/monitoring/v1
"""

from __future__ import annotations

from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

KUBERNETES = "1.34"
Json = dict[str, Any]


def check(entry: Json) -> None:
    """Refuse an object, of Kubernetes' own kinds or of those above, that an API server would refuse or cut.

    Raises:
        jsonschema.ValidationError: it has a field that the kind has not, lacks one, or has one of another type.
    """
    kind = f"{entry['apiVersion']}/{entry['kind']}"
    if kind not in _FIELDS:
        kubernetes_validate.validate(entry, KUBERNETES, strict=True)
        return
    fields = {"apiVersion": _TEXT, "kind": _TEXT, "metadata": _ANY} | _FIELDS[kind]
    needed = tuple(name for name in fields if (kind, name) not in _OPTIONAL)
    Draft202012Validator(_object(needed, **fields)).validate(entry)
    pod = _PODS[kind](entry["spec"]) if kind in _PODS else {"containers": [_container("none")]}
    as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": entry["metadata"], "spec": pod}
    kubernetes_validate.validate(as_pod, KUBERNETES, strict=True)


def _object(needed: tuple[str, ...] = (), **fields: Any) -> Json:
    return {"type": "object", "properties": fields, "required": list(needed), "additionalProperties": False}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


_ANY: Json = {}
_TEXT, _COUNT, _SWITCH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_NAME = {
    "type": "string",
    "maxLength": 253,
    "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}
_PERCENT = {"type": "integer", "minimum": 0, "maximum": 100}
_DURATION = {"type": "string", "pattern": r"^(\d+(ms|[smhdwy]))+$"}
_SELECTOR = _object(
    matchLabels=_TEXTS,
    matchExpressions=_list(
        _object(
            ("key", "operator"),
            key=_TEXT,
            operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
            values=_list(_TEXT),
        )
    ),
)
_LOCAL_QUEUE = _object(
    clusterQueue=_NAME,
    stopPolicy={"enum": ["None", "Hold", "HoldAndDrain"]},
    fairSharing=_object(weight=_ANY),
)
_QUANTITY = {"type": ["integer", "string"], "pattern": r"^\d+(m|Ki|Mi|Gi|Ti)?$"}
_CLUSTER_QUEUE = _object(
    namespaceSelector=_SELECTOR,
    resourceGroups=_list(
        _object(
            ("coveredResources", "flavors"),
            coveredResources=_list(_TEXT),
            flavors=_list(
                _object(
                    ("name", "resources"),
                    name=_NAME,
                    resources=_list(
                        _object(("name", "nominalQuota"), name=_TEXT, nominalQuota=_QUANTITY, borrowingLimit=_QUANTITY)
                    ),
                )
            ),
        )
    ),
    cohortName=_NAME,
    preemption=_object(
        reclaimWithinCohort={"enum": ["Never", "LowerPriority", "Any"]},
        withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]},
    ),
)
_TRAIN_JOB = _object(
    ("runtimeRef",),
    runtimeRef=_object(("name",), name=_TEXT, apiGroup=_TEXT, kind=_TEXT),
    initializer=_ANY,
    trainer=_object(
        image=_TEXT,
        command=_list(_TEXT),
        args=_list(_TEXT),
        env=_list(_ANY),
        numNodes={"type": "integer", "minimum": 1},
        resourcesPerNode=_ANY,
        numProcPerNode={"type": "integer", "minimum": 1},
    ),
    runtimePatches=_list(
        _object(
            ("manager",),
            manager=_TEXT,
            time=_TEXT,
            trainingRuntimeSpec=_object(
                template=_object(
                    metadata=_ANY,
                    spec=_object(
                        replicatedJobs=_list(
                            _object(
                                ("name",),
                                name=_TEXT,
                                template=_object(
                                    metadata=_ANY, spec=_object(template=_object(metadata=_ANY, spec=_ANY))
                                ),
                            )
                        )
                    ),
                )
            ),
        )
    ),
    suspend=_SWITCH,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    managedBy=_TEXT,
)
_MODEL = {
    "modelFormat": _object(("name",), name=_TEXT, version=_TEXT),
    "storageUri": {"type": "string", "pattern": "^s3://"},
    "runtime": _TEXT,
}
_REPLICAS = {"minReplicas": _COUNT, "maxReplicas": _COUNT, "canaryTrafficPercent": _PERCENT, "timeout": _COUNT}
_INFERENCE_SERVICE = _object(
    ("predictor",),
    predictor={  # the other fields are a pod's, and checked there
        "type": "object",
        "required": ["model"],
        "properties": {
            **_REPLICAS,
            "model": {"type": "object", "required": ["modelFormat", "storageUri"], "properties": _MODEL},
        },
    },
)
_POD_MONITOR = _object(
    ("selector", "podMetricsEndpoints"),
    selector=_SELECTOR,
    podMetricsEndpoints=_list(
        _object(
            path=_TEXT,
            interval=_DURATION,
            relabelings=_list(
                _object(
                    action={"enum": ["keep", "replace"]},
                    sourceLabels=_list(_TEXT),
                    regex=_TEXT,
                    replacement=_TEXT,
                    targetLabel=_TEXT,
                )
            ),
        )
    ),
)
_PROMETHEUS_RULE = _object(
    groups=_list(
        _object(
            ("name",),
            name=_TEXT,
            rules=_list(
                _object(("expr",), alert=_TEXT, expr=_TEXT, **{"for": _DURATION}, labels=_TEXTS, annotations=_TEXTS)
            ),
        )
    )
)
_FIELDS: dict[str, Json] = {
    "kueue.x-k8s.io/v1beta2/LocalQueue": {"spec": _LOCAL_QUEUE},
    "kueue.x-k8s.io/v1beta2/WorkloadPriorityClass": {
        "value": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
        "description": {"type": "string", "maxLength": 2048},
    },
    "kueue.x-k8s.io/v1beta2/ClusterQueue": {"spec": _CLUSTER_QUEUE},
    "kueue.x-k8s.io/v1beta2/ResourceFlavor": {"spec": _object(nodeLabels=_TEXTS, nodeTaints=_ANY, tolerations=_ANY)},
    "trainer.kubeflow.org/v1alpha1/TrainJob": {"spec": _TRAIN_JOB},
    "serving.kserve.io/v1beta1/InferenceService": {"spec": _INFERENCE_SERVICE},
    "monitoring.coreos.com/v1/PodMonitor": {"spec": _POD_MONITOR},
    "monitoring.coreos.com/v1/PrometheusRule": {"spec": _PROMETHEUS_RULE},
}
_OPTIONAL = {
    ("kueue.x-k8s.io/v1beta2/ResourceFlavor", "spec"),
    ("kueue.x-k8s.io/v1beta2/WorkloadPriorityClass", "description"),
}


def _container(name: str, **fields: Any) -> Json:
    return {"name": name, "image": "image", **fields}


def _train_job_pod(spec: Json) -> Json:
    """The pod of a node, as far as the job decides it."""
    trainer = {key: value for key, value in spec["trainer"].items() if key in ("image", "command", "args", "env")}
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (node,) = pod["containers"]
    return pod | {"containers": [node | trainer | {"resources": spec["trainer"]["resourcesPerNode"]}]}


def _predictor_pod(spec: Json) -> Json:
    """The pod of the model's server, as far as the service decides it."""
    predictor = spec["predictor"]
    model = {key: value for key, value in predictor["model"].items() if key not in _MODEL}
    pod = {key: value for key, value in predictor.items() if key not in (*_REPLICAS, "model")}
    return pod | {"containers": [_container("kserve-container", **model)]}


_PODS = {
    "trainer.kubeflow.org/v1alpha1/TrainJob": _train_job_pod,
    "serving.kserve.io/v1beta1/InferenceService": _predictor_pod,
}
