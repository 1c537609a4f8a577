"""TrainJobs for tests: a description, a runner without pauses, and what a cluster's controllers make of a job."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from kubernetes.client import Configuration

from components.foundation.train_job import TrainJobSpec, run_train_job, train_job_command
from components.foundation.train_job.kubernetes_api import Backoff, Cluster, new_client
from tests.integration.kubernetes_server import KubernetesServer

IMAGE = "registry.example/saferlhf/trainer@sha256:" + "0" * 64
SPEC = TrainJobSpec(
    run_id="2026-11-24-abc",
    stage="sft",
    round=0,
    image=IMAGE,
    command=train_job_command("components.sft.sft:run_sft", ["s3://bucket/runs/r", "$(HOME)"]),
    nodes=2,
    processes_per_node=8,
    resources={"cpu": "16", "memory": "200Gi", "nvidia.com/gpu": "8"},
    deadline_seconds=3600,
    retries=2,
)
JOB = SPEC.name
WATCH_JOBS, WATCH_PODS = r"GET .*trainjobs\?.*watch=True", r"GET .*pods\?.*watch=True"
FOLLOW_LOG = r"GET .*/log\?.*follow=true"


class Run(logging.Handler):
    """`run_train_job` without pauses; `slept` has what they would have been. The server hears of pauses and of logs."""

    def __init__(self, server: KubernetesServer) -> None:
        super().__init__()
        self.server = server
        self.slept: list[float] = []

    def __call__(self, spec: TrainJobSpec = SPEC, **backoff: float) -> None:
        options: dict[str, Any] = {"attempts": 6, "first": 0.5, "longest": 4.0, **backoff}
        run_train_job(spec, cluster(self.server), Backoff(sleep=self.sleep, **options))

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.server.notify()

    def emit(self, record: logging.LogRecord) -> None:
        self.server.notify()


def cluster(server: KubernetesServer) -> Cluster:
    return Cluster(new_client(Configuration(host=server.url)), "team", "step-pod", "step-uid")


def running(container: str = "c1") -> dict[str, Any]:
    return pod_status("Running", container, {"running": {}})


def ended(
    exit_code: int, at: str = "2026-11-24T10:00:05Z", reason: str = "Error", container: str = "c1"
) -> dict[str, Any]:
    state = {"terminated": {"exitCode": exit_code, "reason": reason, "finishedAt": at}}
    return pod_status("Failed" if exit_code else "Succeeded", container, state)


def pod_status(phase: str, container: str, state: dict[str, Any], **more: Any) -> dict[str, Any]:
    status = {"name": "node", "ready": False, "image": "", "imageID": "", "restartCount": 0, "state": state}
    return {"phase": phase, "containerStatuses": [{**status, "containerID": container}], **more}


def completes(server: KubernetesServer, job: dict[str, Any]) -> None:
    """A job that trains on two nodes and is done."""
    name = job["metadata"]["name"]
    pods = [server.set_pod(name, node, running()) for node in (0, 1)]
    server.write_log(pods[0], "2026-11-24T10:00:01.000000001Z step 1", "2026-11-24T10:00:02.5Z step 2")
    for node, pod in enumerate(pods):
        server.set_pod(name, node, ended(0))
        server.end_log(pod)
    server.set_condition(name, "Complete", reason="AllJobsCompleted")


def fails(
    server: KubernetesServer, job: dict[str, Any], statuses: tuple[dict[str, Any], ...], reason: str = "FailedJobs"
) -> list[str]:
    """A job whose nodes end so."""
    name = job["metadata"]["name"]
    pods = [server.set_pod(name, node, status) for node, status in enumerate(statuses)]
    for pod in pods:
        server.end_log(pod)
    server.set_condition(name, "Failed", reason=reason, message="jobset failed due to one or more job failures")
    return pods


def node_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of node 0's log."""
    messages = [record.getMessage() for record in caplog.records]
    return [message.removeprefix("node 0 | ") for message in messages if message.startswith("node 0 | ")]
