"""The real Kubernetes client against an API server that misbehaves on demand, through the TrainJobs that need it."""

from __future__ import annotations

import datetime
import ipaddress
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.foundation.errors import ClusterError
from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.train_job import run_train_job
from components.foundation.train_job.kubernetes_api import Backoff, in_cluster
from tests.integration.kubernetes_server import KubernetesServer
from tests.integration.kubernetes_state import Fault
from tests.integration.train_jobs import (
    FOLLOW_LOG,
    JOB,
    SPEC,
    WATCH_JOBS,
    WATCH_PODS,
    Run,
    completes,
    ended,
    node_lines,
    running,
)

# A server that misbehaves.


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "pause"),
    [
        pytest.param(Fault("POST", status=429, headers={"Retry-After": "7"}), 7.0, id="429"),
        pytest.param(Fault("POST", status=500, times=3), 2.0, id="500"),
        pytest.param(Fault(r"GET .*trainjobs\?"), 0.5, id="slow"),
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
    fault = server.fault(replace(fault))
    run(answer_seconds=1.0)
    assert fault.times == 0
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
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "refused with 403: scripted 403; grant the step's service account"),
        (404, r"no such API or namespace \(scripted 404\): install Kubeflow Trainer 2\.2"),
    ],
)
def test_a_refusal_is_not_repeated(server: KubernetesServer, run: Run, status: int, message: str) -> None:
    server.fault(Fault("POST", status=status))
    with pytest.raises(ClusterError, match=message):
        run()
    assert run.slept == []


_SAME = "2026-11-24T10:00:02.25Z"
_BEFORE = ["2026-11-24T10:00:01.9Z a", f"{_SAME} b", f"{_SAME} b", f"{_SAME} c"]
_AFTER = ["2026-11-24T10:00:02.3Z d", "2026-11-24T10:00:02.300000001Z e", "2026-11-24T10:00:03Z f"]


@pytest.mark.fault
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(len("\n".join(_BEFORE)) - 1, id="in the middle of a line"),
        pytest.param(0, id="in good order, while the container runs on"),
    ],
)
def test_a_log_that_ends_too_early_loses_no_line_and_repeats_none(
    server: KubernetesServer, run: Run, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        pod = server.set_pod(JOB, 0, running())
        server.write_log(pod, *_BEFORE)
        server.wait_for_request(FOLLOW_LOG, times=2)
        server.write_log(pod, *_AFTER)
        server.set_pod(JOB, 0, ended(0))
        server.end_log(pod)
        server.set_condition(JOB, "Complete", reason="AllJobsCompleted")

    server.controller = controller
    server.fault(Fault(FOLLOW_LOG, cut=cut))
    run()
    assert node_lines(caplog) == ["a", "b", "b", "c", "d", "e", "f"]
    resumed = [request for request in server.requests if "sinceTime=2026-11-24T10%3A00%3A02.25Z" in request]
    assert bool(resumed) == (cut > 0)


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
from components.foundation.logs import configure_logging
from components.foundation.train_job import TrainJobSpec, run_train_job
from components.foundation.train_job.kubernetes_api import Cluster, new_client
configure_logging()
spec = TrainJobSpec("r", "sft", 0, "image", ["true"], nodes=2, processes_per_node=1, resources={})
run_train_job(spec, Cluster(new_client(Configuration(host=sys.argv[1])), "team", "pod", "uid"))
"""


@pytest.mark.fault
def test_row_13_sigterm_deletes_the_job_and_ends_with_the_code_of_preemption(server: KubernetesServer) -> None:
    server.controller = lambda server, job: server.set_pod(job["metadata"]["name"], 0, running()) and None
    step = subprocess.Popen([sys.executable, "-c", _STEP, server.url], stderr=subprocess.STDOUT, stdout=subprocess.PIPE)
    server.wait_for_request(FOLLOW_LOG)
    step.send_signal(signal.SIGTERM)
    output, _ = step.communicate(timeout=60)
    assert step.returncode == PREEMPTED_EXIT_CODE, output.decode()
    (job,) = server.jobs.values()
    assert "deletionTimestamp" in job["metadata"]


@pytest.mark.fault
def test_sigterm_leaves_a_job_that_another_attempt_has_taken_over(server: KubernetesServer, run: Run) -> None:
    def controller(server: KubernetesServer, job: dict[str, Any]) -> None:
        server.wait_for_request(WATCH_JOBS)
        owners = [{"apiVersion": "v1", "kind": "Pod", "name": "step-pod-2", "uid": "step-uid-2"}]
        server.patch_job(JOB, "application/merge-patch+json", {"metadata": {"ownerReferences": owners}})
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)

    server.controller = controller
    with pytest.raises(SystemExit):
        run()
    assert "deletionTimestamp" not in server.jobs[JOB]["metadata"]


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
        ("KUBERNETES_SERVICE_HOST", "need a pod with a service account"),
        ("token", "Service token file does not exist"),
        ("namespace", "need a pod with a service account"),
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
