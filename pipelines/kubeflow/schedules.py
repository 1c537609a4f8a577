"""`saferlhf schedule`: makes the recurring runs on the server what a file of schedules says, and no more than that.

Apply: 1 find the versions and check the settings against them, 2 compare, 3 show, 4 stop if a run that would lose its
schedule is in flight, then for each: 5 make the new, paused, 6 pause the old, and look again: a run may have started
meanwhile, 7 turn the new on, 8 delete the old. Two that are on are never in place; a failure in between leaves the old
or the new one. Killed in between, it may leave both paused: the next apply sees by the new one that it shall be on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.foundation.errors import ClusterError, SettingsError
from pipelines.kubeflow.client import KubeflowClient
from pipelines.kubeflow.compiled_pipeline import run_parameters
from pipelines.kubeflow.recurring_runs import (
    RecurringRun,
    create,
    delete,
    digest_of,
    list_ours,
    named,
    pause_unless_gone,
    record_of,
    switch,
)
from pipelines.kubeflow.schedule_file import Schedule
from pipelines.kubeflow.versions import PipelineVersion, find_version
from pipelines.kubeflow.watch import runs_in_flight


@dataclass(frozen=True)
class _Change:
    """What there is to do for one schedule.

    Attributes:
        make: it is new, or not what it should be.
        stale: recurring runs of its name that must go.
        turn: one that only has to be paused or resumed.
        enabled: what it shall be.
        lines: the differences, for the user.
    """

    schedule: Schedule
    version: PipelineVersion
    parameters: Mapping[str, Any]
    make: bool
    enabled: bool
    stale: list[RecurringRun] = field(default_factory=list)
    turn: RecurringRun | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def verb(self) -> str:
        if self.make:
            return "replace" if self.stale else "create"
        if self.stale:
            return "remove the duplicate"
        return ("resume" if self.enabled else "pause") if self.turn else "unchanged"


def apply_schedules(client: KubeflowClient, schedules: Sequence[Schedule], dry_run: bool) -> Iterator[str]:
    """Do what is needed, and yield what was found and done, a line each.

    Raises:
        SettingsError: a schedule names a version that is not there, or a setting that does not fit it.
        ClusterError: a run is in flight, or the server refuses a call; the message says what is in place.
    """
    changes = _plan(client, schedules)
    for change in changes:
        yield f"{change.schedule.name}: {change.verb}"
        yield from (f"  {line}" for line in change.lines)
    if blocked := _in_flight(client, changes):
        raise ClusterError(f"nothing was changed: {blocked}: apply again when it has ended")
    if dry_run:
        yield "dry run: nothing was changed"
        return
    todo = [change for change in changes if change.verb != "unchanged"]
    for number, change in enumerate(todo):
        try:
            _carry_out(client, change)
        except ClusterError as error:
            left = ", ".join(later.schedule.name for later in todo[number + 1 :])
            raise type(error)(f"{error}{f'; not reached: {left}' if left else ''}") from None
        yield f"{change.schedule.name}: done"


def list_schedules(client: KubeflowClient) -> list[str]:
    """A table of the schedules, or one line that says that there is none."""
    ours, _ = list_ours(client)
    if not ours:
        return ["no schedules"]
    columns = ("cron", "start", "end", "version", "profile", "seed", "settings")
    rows: list[tuple[str, ...]] = [("name", "state", *columns)]
    for run in sorted(ours, key=lambda run: run.name):
        state = "on" if run.enabled else "paused"
        rows.append((run.name, state, *(run.record.get(column, "") or "-" for column in columns)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def turn(client: KubeflowClient, name: str, on: bool) -> str:
    """Resume or pause a schedule; says what was done.

    Raises:
        ClusterError: there is none of that name, an apply of it was cut short (to resume), or the server refuses.
    """
    found = named(client, name)
    if on and len(found) > 1:
        ids = ", ".join(run.id for run in found)
        raise ClusterError(
            f"{name}: an apply was cut short and left {ids}, of which one may be on: apply its file again"
        )
    runs = [run for run in found if run.enabled != on]
    for run in runs:
        switch(client, run, on)
    return f"{name}: {'' if runs else 'already '}{'on' if on else 'paused'}"


def delete_schedule(client: KubeflowClient, name: str, ignore_missing: bool = False) -> str:
    """Delete a schedule; its past runs stay.

    Args:
        ignore_missing: it is well if there is none of that name.

    Raises:
        ClusterError: there is none of that name, a run of it is in flight, or the server refuses.
    """
    if ignore_missing and name not in {run.name for run in list_ours(client)[0]}:
        return f"{name}: is not there"
    found = named(client, name)
    if running := [run for stale in found for run in runs_in_flight(client, stale.id)]:
        raise ClusterError(
            f"{name}: not deleted, run {', '.join(running)} is in flight: pause the schedule now, and delete it then"
        )
    for run in found:
        delete(client, run.id)
    return f"{name}: deleted"


def _plan(client: KubeflowClient, schedules: Sequence[Schedule]) -> list[_Change]:
    ours, others = list_ours(client)
    if taken := [schedule.name for schedule in schedules if schedule.name in others]:
        raise ClusterError(f"there is a recurring run {taken[0]!r} that saferlhf did not make: choose another name")
    return [_compare(client, schedule, [run for run in ours if run.name == schedule.name]) for schedule in schedules]


def _compare(client: KubeflowClient, schedule: Schedule, present: list[RecurringRun]) -> _Change:
    try:
        version, pipeline = find_version(client, schedule.version)
        _, parameters = run_parameters(pipeline, schedule.choice)
    except SettingsError as error:
        raise SettingsError(f"schedule {schedule.name}: {error}") from None
    wanted = record_of(schedule, version, parameters)
    kept = next((run for run in present if run.digest == digest_of(wanted)), None)
    was_on = not present or any(run.enabled for run in present) or _half_replaced(present)
    enabled = was_on if schedule.enabled is None else schedule.enabled
    stale = [run for run in present if run is not kept]
    lines = _differences(present[-1].record if present else {}, wanted) if kept is None else []
    if present and enabled != (was_on if kept is None else kept.enabled):
        lines.append(f"enabled: {str(not enabled).lower()} -> {str(enabled).lower()}")
    turned = kept if kept is not None and kept.enabled != enabled else None
    return _Change(schedule, version, parameters, kept is None, enabled, stale, turned, lines)


def _half_replaced(present: Sequence[RecurringRun]) -> bool:
    """Whether one of them was to go on for another that is still there: an apply was killed in between."""
    return any(other.id in run.takes_over for run in present for other in present)


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    if not old:
        return [f"{key}: {value}" for key, value in new.items() if value]
    lines = [f"{key}: {old[key] or '-'} -> {value or '-'}" for key, value in new.items() if old[key] != value]
    # a server that is given no account fills in its own, which says nothing unless it is all that differs
    own_account = f"service_account: {old['service_account']} -> -"
    return [line for line in lines if line != own_account] or lines


def _in_flight(client: KubeflowClient, changes: Sequence[_Change]) -> str:
    """Which runs would lose their schedule, as a reason not to change it; empty where there are none."""
    found = [
        f"{change.schedule.name}: run {run}"
        for change in changes
        for stale in change.stale
        for run in runs_in_flight(client, stale.id)
    ]
    return f"a schedule is not replaced while a run of it is in flight ({'; '.join(found)})" if found else ""


def _carry_out(client: KubeflowClient, change: _Change) -> None:
    deleted, turned = 0, change.turn
    try:
        if change.make:
            takes_over = [stale.id for stale in change.stale] if change.enabled else []
            at_once = change.enabled and not takes_over
            made = create(client, change.schedule, change.version, change.parameters, at_once, takes_over)
            turned = made if takes_over else None
        for stale in change.stale:
            if stale.enabled:
                pause_unless_gone(client, stale)
        if blocked := _in_flight(client, [change]):
            raise ClusterError(blocked)
        if turned is not None:
            switch(client, turned, change.enabled)
        for stale in change.stale:
            delete(client, stale.id)
            deleted += 1
    except ClusterError as error:
        left = f"the old {change.stale[deleted].id} is there too, paused" if deleted else _take_back(client, change)
        raise type(error)(f"{error}; {change.schedule.name}: {left}; apply again") from None
    except KeyboardInterrupt:
        if not deleted:
            _take_back(client, change)
        raise


def _take_back(client: KubeflowClient, change: _Change) -> str:
    """Let all be as before: without the new one, the old one on if it was. Says how that went.

    What was made is looked up: the server may have made it although its answer did not come. It goes last: while it is
    there, the next apply knows that the schedule shall be on.
    """
    if not change.stale:
        return "it was not made, as far as is known" if change.make else "it is as it was, as far as is known"
    old, made = ", ".join(stale.id for stale in change.stale), list[RecurringRun]()
    try:
        if change.make:
            before = {stale.id for stale in change.stale}
            wanted = digest_of(record_of(change.schedule, change.version, change.parameters))
            same = [run for run in list_ours(client)[0] if run.name == change.schedule.name and run.digest == wanted]
            made = [run for run in same if run.id not in before]
        for run in made:
            if run.enabled:
                switch(client, run, False)
        if change.turn is not None:
            switch(client, change.turn, change.turn.enabled)
        for stale in change.stale:
            if stale.enabled:
                switch(client, stale, True)
        for run in made:
            delete(client, run.id)
    except ClusterError:
        new = f", and the new {', '.join(run.id for run in made)} may be in place" if made else ""
        return f"the old {old} may be paused{new}: see `saferlhf schedule list`"
    return "the old schedule is as it was"
