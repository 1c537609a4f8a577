"""Training on several nodes: submit a Kubeflow TrainJob and follow it to its end.

A step's small pod runs `run_train_job`. The job bears a name that every attempt of the step finds again, so a step
that was killed and retried goes on following the job that runs. The job goes when the step's pod goes, and when the
step gets SIGTERM. Its result is what its ranks put into the store.

    1. Create the job, or find the one of an earlier attempt.
    2. Watch its conditions; copy the log of node 0 into ours, watch the pods.
    3. Complete: done. Preempted: create it again, a limited number of times. Failed: say why.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kubernetes.client import CoreV1Api

from components.foundation.errors import ClusterError, JobDeletedError, JobFailedError
from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.train_job.kubernetes_api import Backoff, Cluster, Json, KubernetesApi, in_cluster
from components.foundation.train_job.node_log import NodeLog
from components.foundation.train_job.pods import PodBoard, pod_selector, was_preempted
from components.foundation.train_job.report import Ending, failure_report
from components.foundation.train_job.spec import EnvReference, TrainJobSpec, read_spec, train_job_command
from components.foundation.train_job.submission import Submission

__all__ = ["EnvReference", "TrainJobSpec", "read_spec", "run_train_job", "train_job_command"]

_JOIN_SECONDS = 30
_CATCH_UP_SECONDS = 10

log = logging.getLogger("saferlhf")


def run_train_job(spec: TrainJobSpec, cluster: Cluster | None = None, backoff: Backoff | None = None) -> None:
    """Run a training job over several nodes; returns when it is complete. To be called from the main thread.

    Args:
        cluster: where; None: the cluster that this process runs in, as its pod's service account.
        backoff: pauses after the API's failures; None: about eight minutes in all.

    Raises:
        JobFailedError: the job failed, or was preempted more than `spec.retries` times.
        JobDeletedError: somebody else deleted it.
        JobConflictError: there is a job of its name that is not ours.
        ClusterError: the cluster cannot be reached, or refuses.
        SystemExit: SIGTERM has come; the job is deleted. The code is PREEMPTED_EXIT_CODE.
    """
    cluster = cluster or in_cluster()
    api = KubernetesApi(cluster, backoff or Backoff())
    submission = Submission(api, cluster, spec)
    with _exit_on_sigterm():
        try:
            _run(api, submission)
        except (SystemExit, KeyboardInterrupt):
            log.warning("%s: asked to stop; deleting it", submission.label)
            submission.delete()
            raise


def _run(api: KubernetesApi, submission: Submission) -> None:
    board = PodBoard()
    node_log = NodeLog(api, board)
    reader = threading.Thread(target=node_log.run, name="node-log", daemon=True)
    reader.start()
    threading.Thread(target=_watch_pods, args=(api, submission.name, board), name="pods", daemon=True).start()
    try:
        failure = _follow_attempts(api, submission, board)
    finally:
        board.close()
    reader.join(_JOIN_SECONDS)  # it reads to the end of the log
    if failure is not None:
        raise JobFailedError(failure_report(api, submission, failure, board.all(), node_log.tail))
    log.info("%s: complete", submission.label)


def _follow_attempts(api: KubernetesApi, submission: Submission, board: PodBoard) -> Ending | None:
    """Follow the job, and start it again when it was preempted; None when it is complete."""
    preemptions = 0
    while True:
        ending = _follow_one(submission, submission.attach(), board)
        _look_at_pods(api, submission.name, board)
        if ending.complete:
            return None
        if ending.reason == "DeadlineExceeded" or not was_preempted(board.all()):
            return ending
        preemptions += 1
        if preemptions > submission.spec.retries:
            return Ending(False, ending.reason, ending.message, preemptions)
        log.warning("%s: preempted, %d of at most %d times", submission.label, preemptions, submission.spec.retries)
        submission.delete_and_wait()
        board.clear()


def _follow_one(submission: Submission, job: Json, board: PodBoard) -> Ending:
    """Watch one TrainJob until it is Complete or Failed.

    Raises:
        JobDeletedError: it is gone, or going.
    """
    uid = job["metadata"]["uid"]
    was_suspended: bool | None = None
    for jobs in submission.watch():
        job = next((found for found in jobs if found["metadata"]["uid"] == uid), {})
        ending = _ending(job)
        if ending is not None:
            return ending
        if not job or "deletionTimestamp" in job["metadata"]:
            raise JobDeletedError(
                f"{submission.label} was deleted by somebody else while it ran; "
                "start the step again, and the training goes on from its last checkpoint"
            )
        suspended = bool(job["spec"].get("suspend"))
        if suspended != was_suspended:
            _log_suspension(submission, suspended)
        if was_suspended:
            board.clear()  # its pods were taken away; how they ended says nothing about those that come later
        was_suspended = suspended
    raise AssertionError("a watch has no end")


def _ending(job: Json) -> Ending | None:
    """A TrainJob -> its Complete or Failed condition; a job may have either, and other conditions beside it."""
    for condition in job.get("status", {}).get("conditions") or []:
        if condition["type"] in {"Complete", "Failed"} and condition["status"] == "True":
            return Ending(condition["type"] == "Complete", condition["reason"], condition.get("message", ""))
    return None


def _log_suspension(submission: Submission, suspended: bool) -> None:
    queue = submission.spec.queue
    if suspended:
        log.info("%s: suspended, waits %s", submission.label, f"in queue {queue}" if queue else "to be resumed")
    else:
        log.info("%s: may run on %d nodes", submission.label, submission.spec.nodes)


def _watch_pods(api: KubernetesApi, job: str, board: PodBoard) -> None:
    """Keep the board up to date; without it a job still runs, and its failure tells less."""
    list_pods = CoreV1Api(api.client).list_namespaced_pod
    try:
        for pods in api.watch(f"pods of {job}", list_pods, api.namespace, label_selector=pod_selector(job)):
            if board.closed:
                return
            board.update(pods)
    except ClusterError as error:
        log.warning("the pods of %s are not watched any more: %s", job, error)


def _look_at_pods(api: KubernetesApi, job: str, board: PodBoard) -> None:
    """Bring the board up to date now: the watch may lag behind the job's condition.

    Only the watch knows how a pod ended that is gone already, so it is given time to get there.
    """
    list_pods = CoreV1Api(api.client).list_namespaced_pod
    try:
        pods = api.call(f"pods of {job}", list_pods, api.namespace, label_selector=pod_selector(job))
    except ClusterError as error:
        log.warning("%s", error)
        return
    board.update(pods["items"])
    board.wait_for_ends_except({pod["metadata"]["uid"] for pod in pods["items"]}, _CATCH_UP_SECONDS)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the deletion short
        raise SystemExit(PREEMPTED_EXIT_CODE)

    outer = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, outer)
