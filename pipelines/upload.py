"""`saferlhf upload`: what the command, and the chart's hook, ask of the pipeline server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.foundation.errors import SettingsError
from pipelines.cluster import (
    PIPELINE,
    Schedule,
    apply_schedule,
    check_cron,
    connect,
    remove_schedule,
    typed_parameters,
    upload_pipeline,
)

_REMOVE = "none"


@dataclass(frozen=True)
class Upload:
    """The command's arguments. `schedule` is a cron expression, "none" to remove the schedule, "" to leave it."""

    file: Path
    version_name: str
    namespace: str
    schedule: str
    parameters: tuple[str, ...]
    service_account: str


def upload_and_schedule(wish: Upload, host: str, token_file: str) -> Iterator[str]:
    """Do it; yields what happened, a line for each step. Nothing is sent before all arguments are checked.

    Raises:
        SettingsError: an argument cannot be used.
        ClusterError: the server cannot be reached or refuses a call.
    """
    schedule = _schedule(wish) if wish.schedule not in {"", _REMOVE} else None
    namespace = wish.namespace or None
    client = connect(host, namespace, token_file)
    version = upload_pipeline(client, wish.file, wish.version_name, namespace)
    yield f"{PIPELINE}: version {version.name} {'uploaded' if version.new else 'is there already'}"
    if schedule is not None:
        changed = apply_schedule(client, schedule, version, namespace)
        yield f"schedule {schedule.cron!r} {'set' if changed else 'is there already'}"
    elif wish.schedule == _REMOVE:
        yield f"schedules removed: {remove_schedule(client, namespace)}"


def _schedule(wish: Upload) -> Schedule:
    check_cron(wish.schedule)
    assignments: dict[str, str] = {}
    for text in wish.parameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--parameter {text!r} has no value: write name=value")
        assignments[name] = value
    return Schedule(wish.schedule, typed_parameters(wish.file, assignments), wish.service_account)
