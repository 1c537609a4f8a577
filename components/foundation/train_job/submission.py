"""The TrainJob object of one step: created once, found again by later attempts, deleted when it is to end."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from kubernetes.client import CustomObjectsApi
from kubernetes.client.exceptions import ApiException

from components.foundation.errors import ClusterError, JobConflictError
from components.foundation.train_job.kubernetes_api import Cluster, Json, KubernetesApi, explain
from components.foundation.train_job.spec import (
    DIGEST_ANNOTATION,
    GROUP,
    PLURAL,
    VERSION,
    TrainJobSpec,
    check_kept,
    manifest,
    owner_references,
)

log = logging.getLogger("saferlhf")


class Submission:
    """One step's TrainJob.

    Attributes:
        label: how messages call it.
    """

    def __init__(self, api: KubernetesApi, cluster: Cluster, spec: TrainJobSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.label = f"TrainJob {cluster.namespace}/{spec.name}"
        self._api = api
        self._cluster = cluster
        self._objects = CustomObjectsApi(api.client)
        self._kind = (GROUP, VERSION, cluster.namespace, PLURAL)
        self._manifest = manifest(spec, cluster)

    def attach(self) -> Json:
        """Create the job, or take over the one that an earlier attempt of this step made.

        A job that failed in an earlier attempt is replaced: the step would not have been started again otherwise.

        Raises:
            JobConflictError: there is a job of this name that is not ours.
            ClusterError: the API refuses.
        """
        for _ in range(self._api.backoff.attempts):
            job = self._create() or self._find()
            if job is None:
                continue  # deleted between the two
            if not _ends_badly(job):
                return job
            log.info("%s: that of an earlier attempt is deleted or has failed; starting anew", self.label)
            self.delete_and_wait()
        raise ClusterError(f"{self.label} is deleted again and again while this step creates it; find out by whom")

    def watch(self) -> Iterator[list[Json]]:
        """The job, as a list of one or none, now and whenever it changes."""
        return self._api.watch(
            self.label,
            self._objects.list_namespaced_custom_object,
            *self._kind,
            field_selector=f"metadata.name={self.name}",
        )

    def delete(self) -> None:
        """Delete the job with its pods, if it is there and this step's pod owns it; does not wait for the pods' end.

        Another pod owns it where the step has been started again already: that attempt needs it.
        """
        job = self._read()
        owners = (job or {"metadata": {}})["metadata"].get("ownerReferences") or []
        if job is None or self._cluster.pod_uid not in [owner["uid"] for owner in owners]:
            log.info("%s: not there, or not this pod's", self.label)
            return
        body = {"propagationPolicy": "Foreground", "preconditions": {"uid": job["metadata"]["uid"]}}
        delete = self._objects.delete_namespaced_custom_object
        try:
            self._api.call(f"deleting {self.label}", delete, *self._kind, self.name, body=body, expected={404, 409})
        except ApiException:
            log.info("%s: was gone already", self.label)

    def delete_and_wait(self) -> None:
        """Delete the job, and wait until its pods are gone too: the next job has the same name.

        Raises:
            ClusterError: something holds it.
        """
        self.delete()
        for polls in range(1, self._api.backoff.attempts + 1):
            if self._read() is None:
                return
            self._api.backoff.sleep(self._api.backoff.seconds(polls))
        raise ClusterError(f"{self.label} is deleted but does not go: look at its finalizers and at its pods")

    def _create(self) -> Json | None:
        """The new job; None where there is one of its name."""
        create = self._objects.create_namespaced_custom_object
        try:
            job: Json = self._api.call(
                f"creating {self.label}", create, *self._kind, self._manifest, expected={404, 409}
            )
        except ApiException as error:
            if error.status == 409:
                return None
            raise ClusterError(
                f"{self.label}: the cluster has no such API or namespace ({explain(error)}): "
                "install Kubeflow Trainer 2.2 or newer"
            ) from error
        try:
            check_kept(self._manifest, job)
        except ClusterError:
            self.delete()
            raise
        log.info("%s: created, %d nodes", self.label, self.spec.nodes)
        return job

    def _find(self) -> Json | None:
        """The existing job, now owned by this step's pod; None where it has gone meanwhile."""
        job = self._read()
        if job is None:
            return None
        if not self._is_ours(job):
            found = (job["metadata"].get("annotations") or {}).get(DIGEST_ANNOTATION, "none")
            wanted = self._manifest["metadata"]["annotations"][DIGEST_ANNOTATION]
            raise JobConflictError(
                f"{self.label} exists and was made from another description (digest {found[:12]}, ours {wanted[:12]}): "
                "delete it, or start a new run"
            )
        log.info("%s: found that of an earlier attempt; following it", self.label)
        return self._adopt()

    def _adopt(self) -> Json | None:
        patch = {"metadata": {"ownerReferences": owner_references(self._cluster)}}  # a merge patch: replaces the list
        adopt = self._objects.patch_namespaced_custom_object
        try:
            job: Json = self._api.call(f"adopting {self.label}", adopt, *self._kind, self.name, patch, expected={404})
        except ApiException:
            return None
        return job

    def _read(self) -> Json | None:
        read = self._objects.get_namespaced_custom_object
        try:
            job: Json = self._api.call(f"reading {self.label}", read, *self._kind, self.name, expected={404})
        except ApiException:
            return None
        return job

    def _is_ours(self, job: Json) -> bool:
        annotations = job["metadata"].get("annotations") or {}
        return bool(annotations.get(DIGEST_ANNOTATION) == self._manifest["metadata"]["annotations"][DIGEST_ANNOTATION])


def _ends_badly(job: Json) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    failed = any(entry["type"] == "Failed" and entry["status"] == "True" for entry in conditions)
    return failed or "deletionTimestamp" in job["metadata"]
