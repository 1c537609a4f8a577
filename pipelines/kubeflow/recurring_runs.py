"""Our schedules as KFP keeps them: recurring runs, each with a digest of what it was made from in its description.

KFP can make, pause, resume and delete a recurring run, and never change one. So a description stays true. That of one
that is made to replace others also has their ids: what an apply that was killed meant to do is read from it. It is
short, as a column of KFP's database holds 255 characters; what people are shown is read from the recurring run itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kfp_server_api import ApiException

from components.foundation.errors import ClusterError
from pipelines.kubeflow.client import PIPELINE, KubeflowClient, pages
from pipelines.kubeflow.schedule_file import Schedule
from pipelines.kubeflow.versions import PipelineVersion, version_names

_MARK = "saferlhf schedule: "
_DIGEST_CHARACTERS = 16
_MOST_TAKEN_OVER = 5
"""Ids that are written down: with more, a description could be longer than its column."""
_NO_SUCH = 404


@dataclass(frozen=True)
class RecurringRun:
    """A recurring run that saferlhf made.

    Attributes:
        digest: of what it was made from, `digest_of` a `record_of`.
        record: what it is by KFP, for people: names of `record_of`.
        takes_over: ids of those that it was made to replace and to start runs for; none if they were paused.
    """

    id: str
    name: str
    enabled: bool
    digest: str
    record: Mapping[str, str]
    takes_over: frozenset[str] = frozenset()


def record_of(schedule: Schedule, version: PipelineVersion, parameters: Mapping[str, Any]) -> dict[str, str]:
    """What a recurring run is made from: two that are equal in this start the same runs at the same times."""
    return {
        "cron": schedule.cron,
        "start": _in_utc(schedule.start),
        "end": _in_utc(schedule.end),
        **_chosen(parameters),
        "version": version.name,
        "experiment": schedule.experiment,
        "service_account": schedule.service_account,
    }


def digest_of(record: Mapping[str, str]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARACTERS]


def list_ours(client: KubeflowClient) -> tuple[list[RecurringRun], set[str]]:
    """(the recurring runs that saferlhf made, names of those that others made)."""
    found, others = [], set()
    with client.explained("list the schedules"):
        for run in pages(client.list_recurring_runs, "recurring_runs", namespace=client.namespace):
            if _is_ours(run):
                found.append(run)
            else:
                others.add(str(run.display_name))
    names = _Names.of(client, found)
    return [_read(run, names) for run in found], others


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
    record = record_of(schedule, version, parameters)
    digest = digest_of(record)
    noted = takes_over[-_MOST_TAKEN_OVER:]  # they are deleted in order: one of the last is there for longest
    experiment = client.experiment_id(schedule.experiment)
    with client.explained(f"make the schedule {schedule.name}"):
        made = client.create_recurring_run(
            experiment,
            schedule.name,
            description=_MARK + " ".join([digest, *noted]),
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
    return RecurringRun(str(made.recurring_run_id), schedule.name, enabled, digest, record, frozenset(noted))


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


@dataclass(frozen=True)
class _Names:
    """Of the versions and experiments that recurring runs have, by their ids."""

    versions: Mapping[str, str]
    experiments: Mapping[str, str]

    @classmethod
    def of(cls, client: KubeflowClient, runs: Sequence[Any]) -> _Names:
        if not runs:
            return cls({}, {})
        with client.explained("find the experiments of the schedules"):
            ids = sorted({str(run.experiment_id) for run in runs})
            experiments = {id: _experiment_name(client, id) for id in ids}
        return cls(version_names(client), experiments)


def _is_ours(run: Any) -> bool:
    """Whether it was made by `create`; what somebody made of a copy of it by hand is theirs."""
    parameters = (run.runtime_config and run.runtime_config.parameters) or {}
    return bool(
        (run.description or "").startswith(_MARK)
        and run.trigger
        and run.trigger.cron_schedule
        and run.pipeline_version_reference
        and {"run_set", "run_profile", "run_seed"} <= parameters.keys()
    )


def _experiment_name(client: KubeflowClient, experiment_id: str) -> str:
    """Its id where it was deleted: its recurring runs stay, and must be seen to be deleted."""
    try:
        return str(client.get_experiment(experiment_id=experiment_id).display_name)
    except ApiException as error:
        if error.status != _NO_SUCH:
            raise
        return experiment_id


def _read(run: Any, names: _Names) -> RecurringRun:
    digest, *takes_over = run.description.removeprefix(_MARK).split() or [""]
    times = run.trigger.cron_schedule
    version, experiment = str(run.pipeline_version_reference.pipeline_version_id), str(run.experiment_id)
    record = {
        "cron": str(times.cron),
        "start": _in_utc(times.start_time),
        "end": _in_utc(times.end_time),
        **_chosen(run.runtime_config.parameters),
        "version": names.versions.get(version, version),
        "experiment": names.experiments[experiment],
        "service_account": run.service_account or "",
    }
    on = run.mode == "ENABLE"
    return RecurringRun(run.recurring_run_id, run.display_name, on, digest, record, frozenset(takes_over))


def _chosen(parameters: Mapping[str, Any]) -> dict[str, str]:
    settings = str(parameters["run_set"])
    return {
        "profile": str(parameters["run_profile"]),
        "seed": str(int(parameters["run_seed"])),  # JSON has one kind of number
        "settings": "" if settings == "[]" else settings,
    }


def _in_utc(time: datetime | None) -> str:
    return time.astimezone(UTC).isoformat() if time else ""
