"""Our schedules as KFP keeps them: recurring runs, each with what it was made from in its description.

KFP can make, pause, resume and delete a recurring run, and never change one. So a description stays true. That of one
that is made to replace others also has their ids: what an apply that was killed meant to do is read from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfp_server_api import ApiException

from components.foundation.errors import ClusterError
from pipelines.kubeflow.client import PIPELINE, KubeflowClient, pages
from pipelines.kubeflow.schedule_file import Schedule
from pipelines.kubeflow.versions import PipelineVersion

_MARK = "saferlhf schedule: "
_TAKES_OVER = "takes_over"
_NO_SUCH = 404


@dataclass(frozen=True)
class RecurringRun:
    """A recurring run that saferlhf made.

    Attributes:
        record: what it was made from, as text.
        takes_over: ids of those that it was made to replace and to start runs for; none if they were paused.
    """

    id: str
    name: str
    enabled: bool
    record: Mapping[str, str]
    takes_over: frozenset[str] = frozenset()


def record_of(schedule: Schedule, version: PipelineVersion) -> dict[str, str]:
    """What a recurring run is made from: two that are equal in this start the same runs at the same times."""
    return {
        "cron": schedule.cron,
        "start": schedule.start.isoformat() if schedule.start else "",
        "end": schedule.end.isoformat() if schedule.end else "",
        "profile": schedule.profile,
        "seed": str(schedule.seed),
        "settings": json.dumps(schedule.settings) if schedule.settings else "",
        "version": version.name,
        "experiment": schedule.experiment,
        "service_account": schedule.service_account,
    }


def list_ours(client: KubeflowClient) -> tuple[list[RecurringRun], set[str]]:
    """(the recurring runs that saferlhf made, names of those that others made)."""
    ours, others = [], set()
    with client.explained("list the schedules"):
        for run in pages(client.list_recurring_runs, "recurring_runs", namespace=client.namespace):
            record = _read(run.description or "")
            if record is None:
                others.add(str(run.display_name))
            else:
                takes_over = frozenset(record.pop(_TAKES_OVER, "").split())
                on = run.mode == "ENABLE"
                ours.append(RecurringRun(run.recurring_run_id, run.display_name, on, record, takes_over))
    return ours, others


def create(
    client: KubeflowClient,
    schedule: Schedule,
    version: PipelineVersion,
    parameters: Mapping[str, Any],
    enabled: bool,
    takes_over: Sequence[str] = (),
) -> RecurringRun:
    """Make the recurring run of a schedule.

    Each of its runs has KFP's id as its own; one at a time, and none for times that were missed.
    """
    record = record_of(schedule, version)
    described = {**record, _TAKES_OVER: " ".join(takes_over)} if takes_over else record
    experiment = client.experiment_id(schedule.experiment)
    with client.explained(f"make the schedule {schedule.name}"):
        made = client.create_recurring_run(
            experiment,
            schedule.name,
            description=_MARK + json.dumps(described),
            start_time=record["start"] or None,
            end_time=record["end"] or None,
            cron_expression=schedule.cron,
            no_catchup=True,
            max_concurrency=1,
            params={**parameters, "run_id": "[[RunUUID]]"},
            pipeline_id=version.pipeline_id,
            version_id=version.version_id,
            enabled=enabled,
            service_account=schedule.service_account or None,
        )
    return RecurringRun(str(made.recurring_run_id), schedule.name, enabled, record, frozenset(takes_over))


def delete(client: KubeflowClient, recurring_run_id: str) -> None:
    """Delete it, unless somebody else just did."""
    with client.explained(f"delete the recurring run {recurring_run_id}"):
        try:
            client.delete_recurring_run(recurring_run_id)
        except ApiException as error:
            if error.status != _NO_SUCH:
                raise


def switch(client: KubeflowClient, run: RecurringRun, on: bool) -> None:
    with client.explained(f"{'resume' if on else 'pause'} the schedule {run.name}"):
        (client.enable_recurring_run if on else client.disable_recurring_run)(run.id)


def pause_unless_gone(client: KubeflowClient, run: RecurringRun) -> None:
    """Pause it, unless somebody else just deleted it: then it starts no runs either."""
    with client.explained(f"pause the schedule {run.name}"):
        try:
            client.disable_recurring_run(run.id)
        except ApiException as error:
            if error.status != _NO_SUCH:
                raise


def named(client: KubeflowClient, name: str) -> list[RecurringRun]:
    """The recurring runs of the schedule of that name: one, but after a failure perhaps two.

    Raises:
        ClusterError: there is none; the message lists those that there are.
    """
    ours, _ = list_ours(client)
    found = [run for run in ours if run.name == name]
    if not found:
        there = ", ".join(sorted({run.name for run in ours})) or "none"
        raise ClusterError(f"{PIPELINE} has no schedule {name!r} in KFP: there is {there}")
    return found


def _read(description: str) -> dict[str, str] | None:
    if not description.startswith(_MARK):
        return None
    try:
        record = json.loads(description.removeprefix(_MARK))
    except ValueError:
        return None
    return {str(key): str(value) for key, value in record.items()} if isinstance(record, dict) else None
