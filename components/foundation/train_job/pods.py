"""What became of a TrainJob's pods: who waits for what, who ended with which code, and who was preempted.

A failed Job may delete its pods at once, and a restarted container forgets how it ended before, so the pods are
watched all along and the last known state of every node is kept here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.train_job.kubernetes_api import Json
from components.foundation.train_job.spec import NODE

_INDEX = "batch.kubernetes.io/job-completion-index"
_NORMAL_WAITING = frozenset({"", "ContainerCreating", "PodInitializing"})

log = logging.getLogger("saferlhf")


def pod_selector(job: str) -> str:
    """Label selector of the training nodes' pods of a TrainJob (its JobSet has its name)."""
    return f"jobset.sigs.k8s.io/jobset-name={job},jobset.sigs.k8s.io/replicatedjob-name={NODE}"


@dataclass(frozen=True)
class PodState:
    """State of one node's pod, for as much as it matters.

    Attributes:
        node: index of the node; node 0 has rank 0.
        created: time, RFC 3339 in UTC; such times are in the order of their strings.
        container: the pod's uid and the id of its container that runs or has run last; empty before the first.
        restarts: how many containers have run before this one.
        running: it runs now.
        exit_code: of the container that ended last; None where none has ended.
        finished: when that was, to the second.
        trouble: why it does not run, or how it ended, in Kubernetes' words.
        disrupted: the cluster took the pod away: a drained or lost node, a pod of higher priority.
    """

    name: str
    uid: str
    node: int
    created: str
    container: str = ""
    restarts: int = 0
    running: bool = False
    exit_code: int | None = None
    finished: str = ""
    trouble: str = ""
    disrupted: bool = False

    @property
    def progress(self) -> tuple[int, bool]:
        """How far the pod's life has come: it never goes back, so the greater of two states is the newer."""
        return self.restarts, self.exit_code is not None and not self.running

    def is_newer_than(self, known: PodState) -> bool:
        """Whether this replaces what is known of the same node: a list may have told what a watch tells later."""
        if self.uid == known.uid:
            return self.progress >= known.progress
        return self.created >= known.created

    def __str__(self) -> str:
        ended = f" exit code {self.exit_code}" if self.exit_code is not None else ""
        return f"node {self.node} (pod {self.name}){ended}" + (f": {self.trouble}" if self.trouble else "")


def pod_state(pod: Json) -> PodState:
    """A pod of the API -> its state."""
    metadata, status = pod["metadata"], pod.get("status", {})
    containers = [entry for entry in status.get("containerStatuses") or [] if entry["name"] == NODE]
    container = containers[0] if containers else {}
    state, last_state = container.get("state") or {}, container.get("lastState") or {}
    ended = state.get("terminated") or last_state.get("terminated") or {}
    conditions = {entry["type"]: entry for entry in status.get("conditions") or [] if entry["status"] == "True"}
    container_id = container.get("containerID") or ended.get("containerID")
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    return PodState(
        name=metadata["name"],
        uid=metadata["uid"],
        node=int(labels.get(_INDEX) or annotations.get(_INDEX) or 0),
        created=metadata.get("creationTimestamp", ""),
        container=f"{metadata['uid']}/{container_id}" if container_id else "",
        restarts=container.get("restartCount", 0),
        running="running" in state,
        exit_code=ended.get("exitCode"),
        finished=ended.get("finishedAt") or "",
        trouble=_trouble(status, state.get("waiting") or {}, ended),
        disrupted="DisruptionTarget" in conditions,
    )


def _trouble(status: Json, waiting: Json, ended: Json) -> str:
    if ended.get("exitCode"):
        return str(ended.get("reason", "")) + (f": {ended['message']}" if ended.get("message") else "")
    if waiting.get("reason", "") not in _NORMAL_WAITING:
        return f"{waiting['reason']}: {waiting.get('message', '')}"
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    reason = status.get("reason")  # of the pod, for instance Evicted
    return f"{reason}: {status.get('message', '')}" if reason else ""


def was_preempted(pods: Sequence[PodState]) -> bool:
    """Whether nodes were taken away, rather than the training failed.

    The first container to end badly decides: a job that fails stops its other pods with SIGTERM, and they save their
    state and end with 75 like a preempted one. Within one second, 75 is taken for the first: a preempted node's peers
    lose their connection at once, while a failed node's peers take their time to save.
    """
    if any(pod.disrupted for pod in pods):
        return True
    failed = [pod for pod in pods if pod.exit_code]
    first = min(failed, key=lambda pod: (pod.finished, pod.exit_code != PREEMPTED_EXIT_CODE), default=None)
    return first is not None and first.exit_code == PREEMPTED_EXIT_CODE


class PodBoard:
    """The newest pod of every node, shared between the thread that watches pods and those that want to know."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pods: dict[int, PodState] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Nobody needs the pods any more."""
        return self._closed

    def update(self, pods: Sequence[Json]) -> None:
        """Take over what the API says of the pods; pods that are gone keep their last state."""
        with self._changed:
            for state in map(pod_state, pods):
                known = self._pods.get(state.node)
                if known is None or state.is_newer_than(known):
                    self._pods[state.node] = state
                    if state.trouble and (known is None or known.trouble != state.trouble):
                        log.warning("%s", state)
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget all pods: those that come next belong to another attempt."""
        with self._changed:
            self._pods.clear()

    def close(self) -> None:
        """End all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def all(self) -> list[PodState]:
        """The nodes' pods, by node."""
        with self._changed:
            return [self._pods[node] for node in sorted(self._pods)]

    def wait_for_ends_except(self, present: Collection[str], seconds: float) -> None:
        """Wait until it is known how every pod ended whose uid is not among those present, but not for longer."""

        def known() -> bool:
            return all(pod.exit_code is not None for pod in self._pods.values() if pod.uid not in present)

        with self._changed:
            self._changed.wait_for(lambda: self._closed or known(), seconds)

    def wait_for_container(self, read: str) -> PodState | None:
        """Node 0's pod, once it has a container other than `read`; None where the board is closed before."""

        def ready() -> PodState | None:
            pod = self._pods.get(0)
            return pod if pod is not None and pod.container not in {"", read} else None

        with self._changed:
            self._changed.wait_for(lambda: self._closed or ready() is not None)
            return ready()
