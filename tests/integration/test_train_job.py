"""Training on several nodes: the real Kubernetes client against an API server that misbehaves on demand."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import Configuration
from kubernetes_server import TRAIN_JOB_SPEC, Fault, KubernetesServer, prune

from components.foundation.errors import ClusterError, JobConflictError, JobDeletedError, JobFailedError
from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.train_job import Toleration, TrainJobSpec, run_train_job, train_job_command
from components.foundation.train_job.kubernetes_api import Backoff, Cluster, in_cluster, new_client

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


@pytest.fixture
def server() -> Iterator[KubernetesServer]:
    server = KubernetesServer()
    yield server
    server.stop()
    assert server.problems == []


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


@pytest.fixture
def run(server: KubernetesServer, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    caplog.set_level(logging.INFO, logger="saferlhf")
    run = Run(server)
    logging.getLogger().addHandler(run)  # after the one of caplog
    yield run
    logging.getLogger().removeHandler(run)


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
    end(server, pods)
    server.set_condition(name, "Complete", reason="AllJobsCompleted")


def end(server: KubernetesServer, pods: list[str], exit_codes: tuple[int, ...] = (0, 0)) -> None:
    for node, (pod, code) in enumerate(zip(pods, exit_codes, strict=True)):
        server.set_pod(pod[: -len("-node-0-0-abcde")], node, ended(code))
        server.end_log(pod)


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


# What is submitted.


@pytest.mark.golden
def test_the_manifest_is_the_one_that_was_reviewed(server: KubernetesServer, run: Run) -> None:
    server.controller = completes
    run(
        replace(
            SPEC,
            queue="saferlhf",
            shared_memory="16Gi",
            node_selector={"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
            tolerations=[Toleration("nvidia.com/gpu"), Toleration("pool", "training", "NoExecute")],
        )
    )
    golden = Path(__file__).with_name("train_job.golden.yaml")
    assert server.created[0] == yaml.safe_load(golden.read_text())


def test_every_field_is_one_of_the_api(server: KubernetesServer, run: Run) -> None:
    server.controller = completes
    run(replace(SPEC, shared_memory="1Gi", tolerations=[Toleration("a")], node_selector={"b": "c"}))
    sent = server.created[0]["spec"]
    assert prune(sent, TRAIN_JOB_SPEC) == sent


def test_the_command_hands_arguments_to_every_rank_unexpanded() -> None:
    assert SPEC.command[:5] == ("python", "-m", "components.foundation.torchrun", "-m", "components.foundation.launch")
    target, arguments = SPEC.command[5:]
    assert target == "components.sft.sft:run_sft"
    assert json.loads(arguments) == ["s3://bucket/runs/r", "$(HOME)"]


@pytest.mark.parametrize(
    ("run_id", "stage", "round_number"),
    [("a", "sft", 0), ("A_B.c/" * 40, "ppo_lagrangian", 12), ("é--", "cost_model", 3)],
)
def test_a_name_fits_the_pods_of_a_job_set(run_id: str, stage: str, round_number: int) -> None:
    name = replace(SPEC, run_id=run_id, stage=stage, round=round_number).name
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-node-0-9999-abcde") <= 63


def test_names_differ_where_only_what_was_left_out_differs() -> None:
    run_ids = ["a_b", "a-b", "A-b", "x" * 80, "x" * 81]
    assert len({replace(SPEC, run_id=run_id).name for run_id in run_ids}) == len(run_ids)
    assert replace(SPEC, image="another").name == SPEC.name


@pytest.mark.fault
def test_an_older_trainer_that_drops_fields_is_refused(server: KubernetesServer, run: Run) -> None:
    server.schema = {key: value for key, value in TRAIN_JOB_SPEC.items() if key != "runtimePatches"}
    with pytest.raises(ClusterError, match=r"no field spec\.runtimePatches.*Trainer 2\.2"):
        run()
    assert "deletionTimestamp" in server.jobs[JOB]["metadata"]


# How it is followed.


def test_a_job_that_completes_leaves_its_log_in_ours(
    server: KubernetesServer, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    server.controller = completes
    run()
    assert node_lines(caplog) == ["step 1", "step 2"]
    assert server.jobs[JOB]["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Pod", "name": "step-pod", "uid": "step-uid"}
    ]


@pytest.mark.fault
def test_a_failed_job_is_reported_with_its_nodes_logs_and_events(server: KubernetesServer, run: Run) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        pods = [f"{JOB}-node-0-{node}-abcde" for node in (0, 1)]
        for node, pod in enumerate(pods):
            server.set_pod(JOB, node, running())
            server.write_log(pod, f"2026-11-24T10:00:01Z last words of {node}")
        server.warn(JOB, "FailedScheduling", "0/4 nodes are available", at="2026-11-24T09:59:00Z")
        server.warn(pods[1], "BackOff", "Back-off restarting failed container")
        fails(
            server,
            job,
            (ended(1, at="2026-11-24T10:00:09Z"), ended(137, at="2026-11-24T10:00:05Z", reason="OOMKilled")),
        )

    server.controller = controller
    with pytest.raises(JobFailedError) as failure:
        run()
    assert str(failure.value).splitlines() == [
        f"TrainJob team/{JOB} failed: FailedJobs: jobset failed due to one or more job failures",
        f"  node 0 (pod {JOB}-node-0-0-abcde) exit code 1: Error",
        f"  node 1 (pod {JOB}-node-0-1-abcde) exit code 137: OOMKilled",
        "the last lines of node 1, which failed first:",
        "  last words of 1",
        "the last lines of node 0:",
        "  last words of 0",
        "events:",
        f"  FailedScheduling ({JOB}): 0/4 nodes are available",
        f"  BackOff ({JOB}-node-0-1-abcde): Back-off restarting failed container",
    ]
    assert len(server.created) == 1


@pytest.mark.fault
def test_pods_that_are_gone_when_the_job_fails_still_tell_why(server: KubernetesServer, run: Run) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        server.wait_for_request(WATCH_PODS)
        pod = server.set_pod(JOB, 0, running())
        server.write_log(pod, "2026-11-24T10:00:01Z before the end")
        server.wait_for_request(FOLLOW_LOG)
        server.set_pod(JOB, 0, ended(1))
        server.set_pod(JOB, 1, ended(139))
        server.remove_pods()
        server.set_condition(JOB, "Failed", reason="FailedJobs")

    server.controller = controller
    with pytest.raises(JobFailedError, match=r"(?s)exit code 1.*before the end"):
        run()


@pytest.mark.fault
def test_an_image_that_cannot_be_pulled_is_named_when_the_deadline_ends_the_job(
    server: KubernetesServer, run: Run
) -> None:
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
    unschedulable = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}]

    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        statuses = (pod_status("Pending", "", waiting), {"phase": "Pending", "conditions": unschedulable})
        fails(server, job, statuses, reason="DeadlineExceeded")

    server.controller = controller
    with pytest.raises(
        JobFailedError, match=r"(?s)DeadlineExceeded.*ImagePullBackOff: Back-off.*Unschedulable: no GPU"
    ):
        run()


def test_a_queued_job_waits_and_is_resumed(
    server: KubernetesServer, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "saferlhf"
        server.suspend(JOB, True)
        server.set_condition(JOB, "Suspended", "True")
        server.wait(lambda: "waits in queue saferlhf" in caplog.text)
        server.suspend(JOB, False)
        server.set_condition(JOB, "Suspended", "False", reason="Resumed")
        completes(server, job)

    server.controller = controller
    run(replace(SPEC, queue="saferlhf"))
    assert "may run on 2 nodes" in caplog.text


@pytest.mark.fault
def test_a_job_that_somebody_deletes_is_an_error(server: KubernetesServer, run: Run) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        server.set_pod(JOB, 0, running())
        server.wait_for_request(WATCH_JOBS)
        server.remove_job(JOB)

    server.controller = controller
    with pytest.raises(JobDeletedError, match="deleted by somebody else"):
        run()


# Preemption.


@pytest.mark.fault
@pytest.mark.parametrize(
    "statuses",
    [
        pytest.param((ended(PREEMPTED_EXIT_CODE), ended(1)), id="a peer loses its connection"),
        pytest.param(
            (running(), {**running(), "conditions": [{"type": "DisruptionTarget", "status": "True"}]}), id="disrupted"
        ),
    ],
)
def test_a_preempted_job_is_started_again(
    server: KubernetesServer, run: Run, statuses: tuple[dict[str, Any], ...]
) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        if len(server.created) == 1:
            server.lingering = 2
            fails(server, job, statuses)
        else:
            completes(server, job)

    server.controller = controller
    run()
    assert len(server.created) == 2


@pytest.mark.fault
def test_a_job_that_is_preempted_again_and_again_is_given_up(server: KubernetesServer, run: Run) -> None:
    server.controller = lambda server, job: fails(server, job, (ended(75), ended(75)))
    with pytest.raises(JobFailedError, match="preempted 3 times, and 2 retries are allowed"):
        run()
    assert len(server.created) == 3


@pytest.mark.fault
@pytest.mark.parametrize("reason", ["FailedJobs", "DeadlineExceeded"])
def test_nodes_that_a_failure_stops_do_not_make_it_a_preemption(
    server: KubernetesServer, run: Run, reason: str
) -> None:
    first = 1 if reason == "FailedJobs" else 75
    statuses = (ended(75, at="2026-11-24T10:00:30Z"), ended(first, at="2026-11-24T10:00:05Z"))
    server.controller = lambda server, job: fails(server, job, statuses, reason)
    with pytest.raises(JobFailedError):
        run()
    assert len(server.created) == 1


@pytest.mark.fault
def test_pods_of_before_a_suspension_do_not_make_a_later_failure_a_preemption(
    server: KubernetesServer, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        server.wait_for_request(WATCH_PODS)
        server.set_pod(JOB, 1, ended(75))
        server.wait(lambda: "exit code 75" in caplog.text)
        server.remove_pods()
        server.suspend(JOB, True)
        server.wait(lambda: "suspended" in caplog.text)
        server.suspend(JOB, False)
        server.wait(lambda: "may run" in caplog.text)
        server.end_log(server.set_pod(JOB, 0, ended(1, at="2026-11-24T11:00:00Z"), suffix="fghij"))
        server.set_condition(JOB, "Failed", reason="FailedJobs")

    server.controller = controller
    with pytest.raises(JobFailedError, match="exit code 1"):
        run()


# A step that is started again.


def test_a_retried_step_follows_the_job_that_runs_and_owns_it(server: KubernetesServer, run: Run) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        server.wait_for_request("PATCH")
        completes(server, job)

    server.controller = controller
    first = Run(server)
    server.fault(Fault(WATCH_JOBS, status=403))
    with pytest.raises(ClusterError, match="403"):  # the first attempt dies, its job runs on
        first()
    server.jobs[JOB]["metadata"]["ownerReferences"][0]["uid"] = "uid of the first attempt's pod"
    run()
    assert len(server.created) == 1
    assert server.jobs[JOB]["metadata"]["ownerReferences"][0]["uid"] == "step-uid"


def test_a_retried_step_replaces_the_job_that_failed(server: KubernetesServer, run: Run) -> None:
    server.controller = lambda server, job: fails(server, job, (ended(1),))
    with pytest.raises(JobFailedError):
        run()
    server.controller = completes
    run()
    assert len(server.created) == 2


@pytest.mark.fault
@pytest.mark.parametrize("annotations", [{}, {"saferlhf/spec-digest": "0" * 64}])
def test_a_job_of_our_name_that_is_not_ours_is_left_alone(
    server: KubernetesServer, run: Run, annotations: dict[str, str]
) -> None:
    server.put_job({"metadata": {"name": JOB, "annotations": annotations}, "spec": {}})
    with pytest.raises(JobConflictError, match="exists and was made from another description"):
        run()
    assert not [request for request in server.requests if request.startswith(("DELETE", "PATCH"))]


# A server that misbehaves.


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "pause"),
    [
        pytest.param(Fault("POST", status=429, headers={"Retry-After": "7"}), 7.0, id="429"),
        pytest.param(Fault("POST", status=500, times=3), 2.0, id="500"),
        pytest.param(Fault(r"GET .*trainjobs\?", times=2), 1.0, id="slow"),
        pytest.param(Fault(WATCH_JOBS, status=503, headers={"Retry-After": "9"}), 9.0, id="503 on a watch"),
        pytest.param(Fault(WATCH_JOBS, cut=40), 0.5, id="a watch breaks in mid-JSON"),
        pytest.param(Fault(WATCH_PODS, cut=40), 0.5, id="the watch of pods breaks in mid-JSON"),
    ],
)
def test_a_passing_fault_of_the_api_is_outlived(server: KubernetesServer, run: Run, fault: Fault, pause: float) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        server.wait_for_request(WATCH_JOBS)
        server.wait_for_request(WATCH_PODS)
        server.suspend(JOB, False)  # something to see for a watch
        server.set_pod(JOB, 0, running())
        server.wait(lambda: pause in run.slept)
        completes(server, job)

    server.controller = controller
    server.fault(fault)
    run(answer_seconds=0.3)
    assert len(server.created) == 1


@pytest.mark.fault
def test_a_creation_that_succeeded_unheard_is_found_again(server: KubernetesServer, run: Run) -> None:
    real = server.create_job

    def create_and_break(body: dict[str, Any]) -> dict[str, Any] | None:
        if real(body) is None:
            return None
        raise ConnectionError  # the connection ends without an answer

    server.create_job = create_and_break  # type: ignore[method-assign]
    server.controller = completes
    run()
    assert len(server.created) == 1


@pytest.mark.fault
def test_a_watch_from_a_version_that_is_gone_lists_again(server: KubernetesServer, run: Run) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        server.wait_for_request(WATCH_JOBS)
        lists = sum("trainjobs?" in request and "watch" not in request for request in server.requests)
        server.forget_history()
        server.suspend(JOB, False)
        server.wait(
            lambda: sum("trainjobs?" in request and "watch" not in request for request in server.requests) > lists
        )
        completes(server, job)

    server.controller = controller
    run()


@pytest.mark.fault
def test_a_server_that_stays_down_is_an_error_after_bounded_pauses(server: KubernetesServer, run: Run) -> None:
    server.fault(Fault("POST", status=500, times=99))
    with pytest.raises(ClusterError, match=r"creating TrainJob .* failed 6 times in a row, at last with: scripted 500"):
        run()
    assert run.slept == [0.5, 1.0, 2.0, 4.0, 4.0]


@pytest.mark.fault
def test_a_refusal_is_not_repeated(server: KubernetesServer, run: Run) -> None:
    server.fault(Fault("POST", status=403))
    with pytest.raises(ClusterError, match="refused with 403: scripted 403; grant the step's service account"):
        run()
    assert run.slept == []


@pytest.mark.fault
def test_a_log_that_breaks_loses_no_line_and_repeats_none(
    server: KubernetesServer, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    same = "2026-11-24T10:00:02.25Z"
    before = [f"2026-11-24T10:00:01.9Z a {'x' * 30}", f"{same} b", f"{same} b"]
    after = [f"{same} c", "2026-11-24T10:00:02.3Z e", "2026-11-24T10:00:02.300000001Z f"]

    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        pod = server.set_pod(JOB, 0, running())
        server.write_log(pod, *before)
        server.wait_for_request(FOLLOW_LOG, times=2)
        server.write_log(pod, *after)
        server.set_pod(JOB, 0, ended(0))
        server.end_log(pod)
        server.set_condition(JOB, "Complete", reason="AllJobsCompleted")

    server.controller = controller
    server.fault(Fault(FOLLOW_LOG, cut=len("\n".join(before)) - 1))  # in the middle of the third line
    run()
    assert node_lines(caplog) == [f"a {'x' * 30}", "b", "b", "c", "e", "f"]


def test_the_log_of_a_restarted_container_follows_that_of_the_first(
    server: KubernetesServer, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        first = server.set_pod(JOB, 0, running())
        server.write_log(first, "2026-11-24T10:00:01Z first")
        server.wait_for_request(FOLLOW_LOG)
        server.set_pod(JOB, 0, ended(1))
        server.end_log(first)
        server.wait(lambda: "exit code 1" in caplog.text)
        second = server.set_pod(JOB, 0, running("c2"), suffix="fghij")
        server.write_log(second, "2026-11-24T09:00:00Z second, by another clock")
        server.end_log(second)
        server.set_pod(JOB, 0, ended(0, container="c2"), suffix="fghij")
        server.set_condition(JOB, "Complete", reason="AllJobsCompleted")

    server.controller = controller
    run()
    assert node_lines(caplog) == ["first", "second, by another clock"]


@pytest.mark.fault
def test_a_log_that_must_not_be_read_does_not_end_the_job(
    server: KubernetesServer, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    server.controller = completes
    server.fault(Fault(FOLLOW_LOG, status=403, times=99))
    run()
    assert "the log of node 0 is not followed any more" in caplog.text


# Being stopped, and being in a cluster.

_STEP = """
import sys
from kubernetes.client import Configuration
from components.foundation.progress import configure_logging
from components.foundation.train_job import TrainJobSpec, run_train_job
from components.foundation.train_job.kubernetes_api import Cluster, new_client
configure_logging()
spec = TrainJobSpec("r", "sft", 0, "image", ["true"], nodes=2, processes_per_node=1, resources={})
run_train_job(spec, Cluster(new_client(Configuration(host=sys.argv[1])), "team", "pod", "uid"))
"""


@pytest.mark.fault
def test_sigterm_deletes_the_job_and_ends_with_the_code_of_preemption(server: KubernetesServer) -> None:
    server.controller = lambda server, job: server.set_pod(job["metadata"]["name"], 0, running()) and None
    step = subprocess.Popen([sys.executable, "-c", _STEP, server.url], stderr=subprocess.STDOUT, stdout=subprocess.PIPE)
    server.wait_for_request(FOLLOW_LOG)
    step.send_signal(signal.SIGTERM)
    output, _ = step.communicate(timeout=20)
    assert step.returncode == PREEMPTED_EXIT_CODE, output.decode()
    (job,) = server.jobs.values()
    assert "deletionTimestamp" in job["metadata"]


def test_a_pod_finds_its_cluster_by_its_service_account(tmp_path: Path) -> None:
    certificate = _self_signed(tmp_path)
    (tmp_path / "token").write_text("secret-token")
    (tmp_path / "namespace").write_text("team\n")
    server = KubernetesServer(certificate)
    server.controller = completes
    try:
        found = in_cluster(_environment(server.port), tmp_path)
        run_train_job(SPEC, found, Backoff(sleep=lambda seconds: None))
    finally:
        server.stop()
    assert (found.namespace, found.pod_name, found.pod_uid) == ("team", "step", "step-uid")
    assert set(server.tokens) == {"bearer secret-token"}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("KUBERNETES_SERVICE_HOST", "needs a pod with a service account"),
        ("token", "Service token file does not exist"),
        ("namespace", "needs a pod with a service account"),
        ("KFP_POD_UID", "KFP_POD_UID not set"),
    ],
)
def test_what_a_pod_lacks_is_named(tmp_path: Path, missing: str, message: str) -> None:
    environment = _environment(6443)
    for name in ("token", "namespace", "ca.crt"):
        (tmp_path / name).write_text("something")
    environment.pop(missing, None)
    (tmp_path / missing).unlink(missing_ok=True)
    with pytest.raises(ClusterError, match=message):
        in_cluster(environment, tmp_path)


def _environment(port: int) -> dict[str, str]:
    address = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(port)}
    return {**address, "KFP_POD_NAME": "step", "KFP_POD_UID": "step-uid"}


def _self_signed(folder: Path) -> Path:
    """`ca.crt`, and one file with it and its key for a server on 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    text = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "ca.crt").write_bytes(text)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.pem").write_bytes(private + text)
    return folder / "server.pem"
