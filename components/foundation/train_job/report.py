"""Why a TrainJob failed, in one message: its reason, its nodes, the end of their logs, the cluster's events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kubernetes.client import CoreV1Api

from components.foundation.errors import ClusterError
from components.foundation.train_job.kubernetes_api import Json, KubernetesApi
from components.foundation.train_job.pods import PodState
from components.foundation.train_job.submission import Submission

_EVENTS, _LOG_LINES = 12, 20


@dataclass(frozen=True)
class Ending:
    """The condition of a finished job, and how often it was preempted, if more often than it may."""

    complete: bool
    reason: str
    message: str
    preemptions: int = 0


def failure_report(
    api: KubernetesApi, submission: Submission, ending: Ending, pods: Sequence[PodState], tail: Sequence[str]
) -> str:
    """A job that failed -> what to tell; `tail` is the end of node 0's log."""
    summary = f"{submission.label} failed: {ending.reason}: {ending.message}"
    if ending.preemptions:
        summary += (
            f"; it was preempted {ending.preemptions} times, and {submission.spec.retries} retries are allowed: "
            "its state is saved, start the step again when nodes are free"
        )
    lines = [summary, *(f"  {pod}" for pod in pods if pod.exit_code or pod.trouble)]
    first = min((pod for pod in pods if pod.exit_code), key=lambda pod: pod.finished, default=None)
    if first is not None and first.node != 0:
        lines += _section(f"the last lines of node {first.node}, which failed first", _end_of_log(api, first))
    lines += _section("the last lines of node 0", list(tail)[-_LOG_LINES:])
    lines += _section("events", _warnings(api, [submission.name, *(pod.name for pod in pods)]))
    return "\n".join(lines)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _end_of_log(api: KubernetesApi, pod: PodState) -> list[str]:
    read_log = CoreV1Api(api.client).read_namespaced_pod_log
    try:
        text = api.call(f"log of pod {pod.name}", read_log, pod.name, api.namespace, tail_lines=_LOG_LINES)
    except ClusterError as error:
        return [str(error)]
    return str(text).splitlines()


def _warnings(api: KubernetesApi, names: Sequence[str]) -> list[str]:
    """Events of type Warning about objects of these names, the oldest first."""
    try:
        found = [event for name in names for event in _events(api, name) if event.get("type") == "Warning"]
    except ClusterError as error:
        return [str(error)]
    found.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
    return [
        f"{event['reason']} ({event['involvedObject']['name']}): {event.get('message', '')}"
        for event in found[-_EVENTS:]
    ]


def _events(api: KubernetesApi, name: str) -> list[Json]:
    list_events = CoreV1Api(api.client).list_namespaced_event
    selector = f"involvedObject.name={name}"
    events: list[Json] = api.call(f"events of {name}", list_events, api.namespace, field_selector=selector)["items"]
    return events
