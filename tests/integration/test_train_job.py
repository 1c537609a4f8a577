"""Training on several nodes: what is submitted, and what becomes of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

from components.foundation.errors import ClusterError, JobConflictError, JobDeletedError, JobFailedError
from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.scheduling import Affinity, NodeRequirement, PreferredNode, Toleration
from tests.custom_kinds import check
from tests.integration.kubernetes_server import KubernetesServer
from tests.integration.kubernetes_state import PODS, TRAIN_JOB_SPEC, Fault, prune
from tests.integration.train_jobs import (
    FOLLOW_LOG,
    JOB,
    SPEC,
    WATCH_JOBS,
    WATCH_PODS,
    Run,
    completes,
    ended,
    fails,
    node_lines,
    pod_status,
    running,
)

# What is submitted.


@pytest.mark.golden
def test_the_manifest_is_the_one_that_was_reviewed(server: KubernetesServer, run: Run) -> None:
    server.controller = completes
    run(
        replace(
            SPEC,
            queue="saferlhf",
            priority="high",
            shared_memory="16Gi",
            node_selector={"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
            tolerations=[
                Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"),
                Toleration(key="pool", value="training", effect="NoExecute", tolerationSeconds=60),
            ],
            affinity=Affinity(
                required=[NodeRequirement(key="zone", values=["a", "b"])],
                preferred=[PreferredNode(weight=7, key="nvme", operator="Exists")],
            ),
        )
    )
    golden = yaml.safe_load(Path(__file__).with_name("train_job.golden.yaml").read_text())
    assert server.created[0] == golden
    check(golden)
    for path in ("spec", "spec.trainer"):
        with pytest.raises(ValidationError, match="'colour' was unexpected"):
            check(merged(golden, path, {"colour": "red"}))


def merged(tree: dict[str, Any], path: str, more: dict[str, Any]) -> dict[str, Any]:
    """A copy with more fields at a place."""
    if not path:
        return tree | more
    key, _, rest = path.partition(".")
    return tree | {key: merged(tree[key], rest, more)}


def test_every_field_is_one_of_the_api(server: KubernetesServer, run: Run) -> None:
    server.controller = completes
    affinity = Affinity(required=[NodeRequirement(key="a", values=["b"])])
    run(replace(SPEC, shared_memory="1Gi", node_selector={"b": "c"}, affinity=affinity))
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
        server.warn(JOB, "FailedScheduling", "0/4 nodes are available", at="2026-11-24T10:01:00Z")
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
        f"  BackOff ({JOB}-node-0-1-abcde): Back-off restarting failed container",
        f"  FailedScheduling ({JOB}): 0/4 nodes are available",
    ]
    assert len(server.created) == 1


@pytest.mark.fault
def test_pods_that_are_gone_when_the_job_fails_still_tell_why(server: KubernetesServer, run: Run) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        server.wait_for_request(WATCH_PODS)
        pod = server.set_pod(JOB, 0, running())
        server.write_log(pod, "2026-11-24T10:00:01Z before the end")
        server.wait_for_request(FOLLOW_LOG)
        server.lagging.add(PODS)  # their watch tells of the end only after the job's has
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
@pytest.mark.parametrize("gone", [True, False])
def test_a_job_that_somebody_deletes_is_an_error(server: KubernetesServer, run: Run, gone: bool) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        server.end_log(server.set_pod(JOB, 0, running()))
        server.wait_for_request(WATCH_JOBS)
        if gone:
            server.remove_job(JOB)
        else:
            server.delete_job(JOB, {"propagationPolicy": "Foreground"})  # it goes when its pods have gone

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
def test_row_11_a_preempted_job_is_started_again(
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
def test_row_12_a_job_that_is_preempted_again_and_again_is_given_up(server: KubernetesServer, run: Run) -> None:
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
        server.set_pod(JOB, 1, running())
        server.suspend(JOB, True)
        server.wait(lambda: "suspended" in caplog.text)
        server.set_pod(JOB, 1, ended(75))
        server.wait(lambda: "exit code 75" in caplog.text)
        server.remove_pods()
        server.suspend(JOB, False)
        server.wait(lambda: "may run" in caplog.text)
        server.end_log(server.set_pod(JOB, 0, ended(1, at="2026-11-24T11:00:00Z"), suffix="fghij"))
        server.set_condition(JOB, "Failed", reason="FailedJobs")

    server.controller = controller
    with pytest.raises(JobFailedError, match="exit code 1"):
        run()
    assert len(server.created) == 1


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
