"""State of a small Kubernetes cluster for tests: TrainJobs, pods, logs and events; `kubernetes_server.py` serves it.

It keeps objects under resource versions, answers lists and watches from them, prunes fields that a resource's schema
does not have, takes merge patches, and deletes in the foreground. What a controller would do, a test does:
`cluster.controller` is called with every TrainJob that is created, in a thread of its own.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
_WAIT_SECONDS = 60

TRAIN_JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs"
PODS, EVENTS = "/api/v1/namespaces/team/pods", "/api/v1/namespaces/team/events"
SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/team/inferenceservices"
ANY = "any"
"""In a schema: whatever is below."""

# Fields of a TrainJob as far as the tests need them, read from the Go types of kubeflow/trainer v2.3.0,
# pkg/apis/trainer/v1alpha1/trainjob_types.go (they are the same in v2.2.0). A list stands for its items.
POD_PATCH = {
    "serviceAccountName": ANY,
    "volumes": ANY,
    "initContainers": ANY,
    "containers": [{"name": ANY, "env": ANY, "volumeMounts": ANY, "securityContext": ANY}],
    "imagePullSecrets": ANY,
    "securityContext": ANY,
    "nodeSelector": ANY,
    "affinity": ANY,
    "tolerations": ANY,
    "schedulingGates": ANY,
}
JOB_PATCH = {"metadata": ANY, "spec": {"template": {"metadata": ANY, "spec": POD_PATCH}}}
TRAIN_JOB_SPEC = {
    "runtimeRef": {"name": ANY, "apiGroup": ANY, "kind": ANY},
    "initializer": ANY,
    "trainer": {
        "image": ANY,
        "command": ANY,
        "args": ANY,
        "env": ANY,
        "numNodes": ANY,
        "resourcesPerNode": {"limits": ANY, "requests": ANY, "claims": ANY},
        "numProcPerNode": ANY,
    },
    "runtimePatches": [
        {
            "manager": ANY,
            "time": ANY,
            "trainingRuntimeSpec": {
                "template": {"metadata": ANY, "spec": {"replicatedJobs": [{"name": ANY, "template": JOB_PATCH}]}}
            },
        }
    ],
    "suspend": ANY,
    "activeDeadlineSeconds": ANY,
    "managedBy": ANY,
}

# Fields of an InferenceService as far as the tests need them, read from the CRD of kserve v0.20.0,
# config/crd/full/serving.kserve.io_inferenceservices.yaml.
INFERENCE_SERVICE_SPEC = {
    "predictor": {
        "serviceAccountName": ANY,
        "automountServiceAccountToken": ANY,
        "minReplicas": ANY,
        "canaryTrafficPercent": ANY,
        "securityContext": {"runAsNonRoot": ANY, "runAsUser": ANY, "seccompProfile": {"type": ANY}},
        "model": {
            "modelFormat": {"name": ANY, "version": ANY},
            "storageUri": ANY,
            "runtime": ANY,
            "args": ANY,
            "env": [{"name": ANY, "value": ANY}],
            "resources": {"requests": ANY, "limits": ANY},
            "securityContext": {
                "allowPrivilegeEscalation": ANY,
                "readOnlyRootFilesystem": ANY,
                "runAsNonRoot": ANY,
                "capabilities": {"add": ANY, "drop": ANY},
            },
            "volumeMounts": [{"name": ANY, "mountPath": ANY}],
        },
        "volumes": [{"name": ANY, "emptyDir": ANY}],
    },
}


def prune(value: Any, schema: Any) -> Any:
    """What an API server stores of an object: fields that the schema has."""
    if isinstance(schema, list) and isinstance(value, list):
        return [prune(item, schema[0]) for item in value]
    if isinstance(schema, dict) and isinstance(value, dict):
        return {key: prune(item, schema[key]) for key, item in value.items() if key in schema}
    return value


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path?query" matches `pattern`.

    A `status` is answered; else `cut` bytes of the stream's next event are sent and the connection is closed; else the
    request hangs until the server stops.
    """

    pattern: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    times: int = 1


class ClusterState:
    """Objects, their history, and what goes wrong.

    Attributes:
        controller: what happens once a TrainJob is created.
        schema: fields of a TrainJob's spec that this cluster knows.
        lingering: how many reads see a deleted TrainJob before it is gone.
        lagging: paths whose watches say nothing more until they are listed again.
        requests: "METHOD path?query" of all requests so far.
    """

    def __init__(self) -> None:
        self.controller: Callable[[Any, Json], None] = lambda cluster, job: None
        self.schema: Json = TRAIN_JOB_SPEC
        self.lingering = 0
        self.lagging: set[str] = set()
        self.requests: list[str] = []
        self.tokens: list[str] = []
        self.created: list[Json] = []
        self.problems: list[BaseException] = []
        self.changed = threading.Condition(threading.RLock())
        self.closed = False
        self._faults: list[Fault] = []
        self._objects: dict[str, dict[str, Json]] = {TRAIN_JOBS: {}, PODS: {}, EVENTS: {}, SERVICES: {}}
        self._history: list[tuple[int, str, str, Json]] = []
        self._version = self._oldest = 100
        self._logs: dict[str, list[str]] = {}
        self._ended_logs: set[str] = set()

    def stop(self) -> None:
        """End all waiting."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    # What a test's controller does.

    @property
    def jobs(self) -> dict[str, Json]:
        """TrainJobs by name."""
        return self._objects[TRAIN_JOBS]

    def fault(self, fault: Fault) -> Fault:
        with self.changed:
            self._faults.append(fault)
        return fault

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something has happened here."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.closed or condition(), _WAIT_SECONDS), "nothing happened"

    def notify(self) -> None:
        """Something happened elsewhere: whoever waits looks again."""
        with self.changed:
            self.changed.notify_all()

    def wait_for_request(self, pattern: str, times: int = 1) -> None:
        self.wait(lambda: sum(bool(re.search(pattern, request)) for request in self.requests) >= times)

    def forget_history(self) -> None:
        """Versions before the present one can no longer be watched from."""
        with self.changed:
            self._history.clear()
            self._oldest = self._version + 1
            self._version += 1

    def set_condition(self, name: str, kind: str, status: str = "True", reason: str = "", message: str = "") -> None:
        with self.changed:
            job = json.loads(json.dumps(self.jobs[name]))
            conditions = [old for old in job.setdefault("status", {}).get("conditions", []) if old["type"] != kind]
            conditions.append({"type": kind, "status": status, "reason": reason or kind, "message": message})
            job["status"]["conditions"] = conditions
            self._store(TRAIN_JOBS, "MODIFIED", job)

    def suspend(self, name: str, suspended: bool) -> None:
        with self.changed:
            job = json.loads(json.dumps(self.jobs[name]))
            job["spec"]["suspend"] = suspended
            self._store(TRAIN_JOBS, "MODIFIED", job)

    def put_job(self, job: Json) -> Json:
        """A TrainJob that is there already."""
        with self.changed:
            return self._add(TRAIN_JOBS, job)

    def set_pod(self, job: str, node: int, status: Json, suffix: str = "abcde") -> str:
        """Create or change the pod of a node; returns its name."""
        name = f"{job}-node-0-{node}-{suffix}"
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(node),
        }
        with self.changed:
            known = self._objects[PODS].get(name)
            pod: Json = {"metadata": {"name": name, "namespace": "team", "labels": labels}, "status": status}
            if known is None:
                self._add(PODS, pod)
                self._logs.setdefault(name, [])
            else:
                self._store(PODS, "MODIFIED", {**known, "status": status})
        return name

    def remove_pods(self) -> None:
        with self.changed:
            for name in list(self._objects[PODS]):
                self._store(PODS, "DELETED", self._objects[PODS][name])
                self._ended_logs.add(name)

    def write_log(self, pod: str, *lines: str) -> None:
        """Lines with their timestamps."""
        with self.changed:
            self._logs[pod].extend(lines)
            self.changed.notify_all()

    def end_log(self, pod: str) -> None:
        with self.changed:
            self._ended_logs.add(pod)
            self.changed.notify_all()

    def warn(self, about: str, reason: str, message: str, at: str = "2026-11-24T10:00:00Z") -> None:
        with self.changed:
            event = {
                "metadata": {"name": f"{about}.{len(self._objects[EVENTS])}", "namespace": "team"},
                "involvedObject": {"name": about},
                "type": "Warning",
                "reason": reason,
                "message": message,
                "lastTimestamp": at,
            }
            self._add(EVENTS, event)

    def remove_job(self, name: str) -> None:
        """Somebody deletes a TrainJob."""
        with self.changed:
            self.remove_pods()
            self._store(TRAIN_JOBS, "DELETED", self.jobs[name])

    # What the API does. All under the lock.

    def take_fault(self, request: str) -> Fault | None:
        for fault in self._faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def create_job(self, body: Json) -> Json | None:
        if body["metadata"]["name"] in self.jobs:
            return None
        self.created.append(body)
        job = self._add(TRAIN_JOBS, {**body, "spec": prune(body["spec"], self.schema)})
        threading.Thread(target=self._control, args=(job,), daemon=True).start()
        return job

    def read_job(self, name: str) -> Json | None:
        job = self.jobs.get(name)
        if job is not None and "deletionTimestamp" in job["metadata"]:
            if self.lingering <= 0:
                self.remove_job(name)
                return None
            self.lingering -= 1
        return job

    def delete_job(self, name: str, options: Json) -> int:
        job = self.jobs.get(name)
        if job is None:
            return 404
        if options.get("preconditions", {}).get("uid", job["metadata"]["uid"]) != job["metadata"]["uid"]:
            return 409
        assert options["propagationPolicy"] == "Foreground"
        metadata = {**job["metadata"], "deletionTimestamp": "2026-11-24T10:00:00Z"}
        with self.changed:
            self._store(TRAIN_JOBS, "MODIFIED", {**job, "metadata": metadata})
        return 200

    def patch_job(self, name: str, content_type: str, patch: Json) -> int:
        if name not in self.jobs:
            return 404
        if content_type != "application/merge-patch+json":
            return 415
        with self.changed:
            job = self.jobs[name]
            self._store(TRAIN_JOBS, "MODIFIED", {**job, "metadata": {**job["metadata"], **patch["metadata"]}})
        return 200

    @property
    def services(self) -> dict[str, Json]:
        """InferenceServices by name."""
        return self._objects[SERVICES]

    def apply_service(self, name: str, content_type: str, query: Mapping[str, str], body: Json) -> int:
        """Server-side apply by the one manager that there is: what it applies is what there is."""
        if content_type != "application/apply-patch+yaml":
            return 415
        if not query.get("fieldManager") or body["metadata"]["name"] != name:
            return 400
        service = {**body, "spec": prune(body["spec"], INFERENCE_SERVICE_SPEC)}
        if name not in self.services:
            self._add(SERVICES, service)
            return 201
        uid = {key: self.services[name]["metadata"][key] for key in ("uid", "creationTimestamp")}
        self._store(SERVICES, "MODIFIED", {**service, "metadata": {**body["metadata"], **uid}})
        return 200

    def list(self, path: str, query: Mapping[str, str]) -> Json:
        items = [item for item in self._objects[path].values() if _selected(item, query)]
        self.lagging.discard(path)
        self.changed.notify_all()
        return {"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}

    def events_after(self, path: str, query: Mapping[str, str], version: int) -> list[tuple[int, Json]]:
        if path in self.lagging:
            return []
        if version < self._oldest:
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            return [(-1, {"type": "ERROR", "object": status})]
        return [
            (at, {"type": kind, "object": item})
            for at, where, kind, item in self._history
            if at > version and where == path and _selected(item, query)
        ]

    def log_of(self, pod: str) -> list[str] | None:
        return self._logs.get(pod) if pod in self._objects[PODS] else None

    def log_has_ended(self, pod: str) -> bool:
        return self.closed or pod in self._ended_logs

    def _control(self, job: Json) -> None:
        try:
            self.controller(self, job)
        except BaseException as problem:  # the test hangs unless everything ends, and then says why
            self.problems.append(problem)
            self.stop()

    def _add(self, path: str, item: Json) -> Json:
        uid, now = f"uid-{self._version}", "2026-11-24T10:00:00Z"
        metadata = {**item["metadata"], "uid": uid, "creationTimestamp": now}
        return self._store(path, "ADDED", {**item, "metadata": metadata})

    def _store(self, path: str, kind: str, item: Json) -> Json:
        self._version += 1
        item = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self._version)}}
        if kind == "DELETED":
            self._objects[path].pop(item["metadata"]["name"], None)
        else:
            self._objects[path][item["metadata"]["name"]] = item
        self._history.append((self._version, path, kind, item))
        self.changed.notify_all()
        return item


def _selected(item: Json, query: Mapping[str, str]) -> bool:
    labels = item["metadata"].get("labels", {})
    wanted_labels = dict(part.split("=") for part in query.get("labelSelector", "").split(",") if part)
    fields = {
        "metadata.name": item["metadata"]["name"],
        "involvedObject.name": item.get("involvedObject", {}).get("name"),
    }
    wanted_fields = dict(part.split("=") for part in query.get("fieldSelector", "").split(",") if part)
    return wanted_labels.items() <= labels.items() and wanted_fields.items() <= fields.items()
