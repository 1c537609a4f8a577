"""Tells a webhook how a run ended: one JSON object by POST.

Run: 1 gather what the store and MLflow have of the run, 2 post it, again after a growing pause where that fails.
A notification that fails is a warning: it never changes how the run ended.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import httpx

from components.foundation.errors import SaferlhfError
from components.foundation.results import Evaluation, PromotionResult, from_json, read_record
from components.foundation.run_context import RunContext, finished_uri, open_run
from components.foundation.waiting_runs import gone_on_with

URL_VARIABLE = "SAFERLHF_WEBHOOK_URL"
"""Holds the webhook's URL, which is a secret: whoever knows it may post there. It is in no parameter and no log."""
_ATTEMPTS, _FIRST_PAUSE, _TIMEOUT_SECONDS = 5, 1.0, 10.0

log = logging.getLogger("saferlhf")


@dataclass(frozen=True)
class Notification:
    """What is posted. What is not known, because the run did not get there, is None.

    Attributes:
        run_id: of the run that was gone on with, where that is another one.
        status: succeeded, failed, cancelled, waiting (for people to label), or nothing new (to train on).
        decision: of the gate: promote or challenger.
        unsafe_rate, win_rate: of the last round that was evaluated, in [0, 1]; the latter on benign prompts.
        links: name -> address: of the run's folder in the store, its report, and its page in MLflow.
    """

    run_id: str
    status: str
    decision: str | None = None
    round: int | None = None
    unsafe_rate: float | None = None
    win_rate: float | None = None
    links: dict[str, str] = field(default_factory=dict)


def notify(
    run_uri: str,
    run_id: str,
    status: str,
    environment: Mapping[str, str] = os.environ,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Tell the webhook of SAFERLHF_WEBHOOK_URL; returns whether it took it. Without that variable nobody is told."""
    url = environment.get(URL_VARIABLE, "").strip()
    if not url:
        return False
    try:
        return _post(url, gather(run_uri, run_id, status), sleep)
    except Exception as error:  # whatever it is: the run has ended as it has
        log.warning("nobody was told that run %s ended: %s", run_id, type(error).__name__)
        return False


def uri_of_run(run_uri: str, run_id: str, environment: Mapping[str, str] = os.environ) -> str:
    """Where a run lies that was given no URI: in the platform's store, as `start_run` puts it."""
    return run_uri or f"{environment.get('SAFERLHF_STORE_URI', '').rstrip('/')}/runs/{run_id}"


def gather(run_uri: str, run_id: str, status: str) -> Notification:
    """What is known of a run, however far it got; of one that went on with another, what is known of that."""
    told = Notification(run_id, status, links={"store": run_uri})
    try:
        context = open_run(gone_on_with(run_uri))
        told = replace(told, run_id=context.run_id, links={"store": context.run_uri})
        number, evaluation = _last_evaluation(context)
        told = replace(
            told,
            decision=_decision(context),
            round=number,
            unsafe_rate=evaluation.unsafe_rate.value if evaluation else None,
            win_rate=evaluation.win_rate.value if evaluation and number else None,
        )
        told = replace(told, links=told.links | _report_link(context))
        told = replace(told, status=_status(context, status), links=told.links | _mlflow_link(context))
    except SaferlhfError as error:
        log.warning("the notification does not tell all: %s", error)
    return told


def _status(context: RunContext, told: str) -> str:
    """Kubeflow tells a run that waits as failed, and one that has nothing to do as succeeded. MLflow knows better."""
    status, ended = context.tracker.end_of_pipeline_run(context.mlflow_run_id)
    if ended:
        return ended
    return "waiting" if told == "failed" and status == "SCHEDULED" else told


def _decision(context: RunContext) -> str | None:
    uri = f"{context.run_uri}/promotion.json"
    if not context.store.has_text(uri):
        return None
    return from_json(PromotionResult, context.store.read_text(uri)).decision


def _last_evaluation(context: RunContext) -> tuple[int | None, Evaluation | None]:
    for number in range(context.settings.rounds, -1, -1):
        uri = context.store.latest(context.stage_uri("evaluate", number))
        if uri is not None:
            return number, read_record(Evaluation, context.store.fetch(uri) / "evaluation.json")
    return None, None


def _report_link(context: RunContext) -> dict[str, str]:
    if context.store.latest(context.stage_uri("report", 0)) is None:
        return {}
    return {"report": f"{finished_uri(context, 'report', 0)}/report.html"}


def _mlflow_link(context: RunContext) -> dict[str, str]:
    return {"mlflow": context.tracker.run_address(context.mlflow_run_id)}


def _post(url: str, notification: Notification, sleep: Callable[[float], None]) -> bool:
    """Post; 429, 5xx and a broken connection are tried again. The URL is in no message."""
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            answer = httpx.post(url, json=asdict(notification), timeout=_TIMEOUT_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = type(error).__name__  # its text may hold the URL
            if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
                break
            continue
        if answer.is_success:
            return True
        problem = f"status {answer.status_code}"
        if answer.status_code != httpx.codes.TOO_MANY_REQUESTS and not answer.is_server_error:
            break
    log.warning("the webhook of %s was not told that the run ended (%s): check the URL", URL_VARIABLE, problem)
    return False
