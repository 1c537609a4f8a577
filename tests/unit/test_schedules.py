"""`saferlhf schedule` with KFP's own client, against a server on the loopback interface that speaks its REST API."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.kubeflow.client import Access, connect
from pipelines.kubeflow.versions import PipelineVersion, upload_pipeline
from tests.unit.kfp_server import KfpServer
from tests.unit.kubeflow_command import saferlhf

WEEKLY = """
schedules:
  - {name: weekly, cron: "0 0 2 * * 1", profile: tiny, seed: 7, settings: [ppo.steps=2], service_account: saferlhf}
"""
BOTH = WEEKLY + '  - {name: monthly, cron: "0 0 3 1 * *", start: 2026-12-01T00:00:00Z}\n'
Apply = Callable[..., tuple[int, str]]


@pytest.fixture
def version(kfp: KfpServer, compiled_pipeline: Path) -> PipelineVersion:
    made = upload_pipeline(connect(Access(kfp.url)), compiled_pipeline, "v")
    kfp.calls.clear()
    return made


@pytest.fixture
def apply(version: PipelineVersion, tmp_path: Path) -> Apply:
    """Applies a text, with further arguments; (exit status, what was said)."""

    def run(text: str, *arguments: str) -> tuple[int, str]:
        file = tmp_path / "schedules.yaml"
        file.write_text(text)
        return saferlhf("schedule", "apply", "-f", str(file), *arguments)

    return run


def schedule(kfp: KfpServer, name: str) -> dict[str, Any]:
    (only,) = [entry for entry in kfp.schedules if entry["display_name"] == name]
    return only


def test_row_32_a_new_schedule_is_made_as_it_is_written(kfp: KfpServer, apply: Apply, version: PipelineVersion) -> None:
    status, said = apply(BOTH)
    assert status == 0, said
    weekly, monthly = schedule(kfp, "weekly"), schedule(kfp, "monthly")
    assert weekly["trigger"]["cron_schedule"] == {"cron": "0 0 2 * * 1"}
    assert monthly["trigger"]["cron_schedule"] == {"cron": "0 0 3 1 * *", "start_time": "2026-12-01T00:00:00+00:00"}
    assert weekly["runtime_config"]["parameters"] == {
        "run_id": "[[RunUUID]]",
        "run_profile": "tiny",
        "run_seed": 7,
        "run_set": '["ppo.steps=2"]',
    }
    reference = {"pipeline_id": version.pipeline_id, "pipeline_version_id": version.version_id}
    for entry in (weekly, monthly):
        assert (entry["no_catchup"], entry["max_concurrency"], entry["mode"]) == (True, "1", "ENABLE")
        assert entry["pipeline_version_reference"] == reference
    assert (weekly["service_account"], "service_account" in monthly) == ("saferlhf", False)
    assert [e["display_name"] for e in kfp.experiments] == ["safe-rlhf"]
    assert "weekly: create\n  cron: 0 0 2 * * 1\n" in said


def test_applied_twice_nothing_is_changed_the_second_time(kfp: KfpServer, apply: Apply) -> None:
    apply(BOTH)
    before = list(kfp.schedules)
    kfp.calls.clear()
    assert apply(BOTH) == (0, "weekly: unchanged\nmonthly: unchanged\n")
    assert kfp.changes == []
    assert kfp.schedules == before


def test_a_changed_cron_replaces_exactly_one(kfp: KfpServer, apply: Apply) -> None:
    apply(BOTH)
    old, other = schedule(kfp, "weekly")["recurring_run_id"], schedule(kfp, "monthly")
    kfp.calls.clear()
    status, said = apply(BOTH.replace("0 0 2 * * 1", "0 30 2 * * 1"))
    assert status == 0
    assert said == "weekly: replace\n  cron: 0 0 2 * * 1 -> 0 30 2 * * 1\nmonthly: unchanged\nweekly: done\n"
    new = schedule(kfp, "weekly")["recurring_run_id"]
    made, turned = "POST /recurringruns", [f"POST /recurringruns/{old}:disable", f"POST /recurringruns/{new}:enable"]
    assert kfp.changes == [made, *turned, f"DELETE /recurringruns/{old}"]
    assert schedule(kfp, "weekly")["trigger"]["cron_schedule"]["cron"] == "0 30 2 * * 1"
    assert schedule(kfp, "monthly") == other


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("seed: 7", "seed: 8", "seed: 7 -> 8"),
        ("profile: tiny", "profile: smol", "profile: tiny -> smol"),
        ("settings: [ppo.steps=2], ", "", 'settings: ["ppo.steps=2"] -> -'),
        ("seed: 7", "seed: 7, experiment: other", "experiment: safe-rlhf -> other"),
        ("seed: 7", "seed: 7, end: 2027-01-01T00:00:00Z", "end: - -> 2027-01-01T00:00:00+00:00"),
        ("account: saferlhf", "account: default-editor", "service_account: saferlhf -> default-editor"),
    ],
)
def test_a_dry_run_shows_the_difference_and_changes_nothing(
    kfp: KfpServer, apply: Apply, old: str, new: str, line: str
) -> None:
    apply(WEEKLY)
    kfp.calls.clear()
    assert apply(WEEKLY.replace(old, new), "--dry-run") == (
        0,
        f"weekly: replace\n  {line}\ndry run: nothing was changed\n",
    )
    assert kfp.changes == []


def test_latest_is_the_newest_version_at_the_time_of_applying(
    kfp: KfpServer, apply: Apply, version: PipelineVersion, compiled_pipeline: Path, tmp_path: Path
) -> None:
    apply(WEEKLY)
    other = tmp_path / "other.yaml"
    other.write_bytes(compiled_pipeline.read_bytes() + b"# other\n")
    newer = upload_pipeline(connect(Access(kfp.url)), other, "v")
    assert f"version: {version.name} -> {newer.name}" in apply(WEEKLY)[1]
    reference = schedule(kfp, "weekly")["pipeline_version_reference"]
    assert reference["pipeline_version_id"] == newer.version_id
    (tmp_path / "back.yaml").write_bytes(compiled_pipeline.read_bytes())
    status, said = apply(WEEKLY.replace("seed: 7", "seed: 7, version: back.yaml"))
    assert (status, f"version: {newer.name} -> {version.name}" in said) == (0, True)


@pytest.mark.fault
@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "PAUSED", "CANCELING"])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_schedule_whose_run_is_in_flight_is_not_replaced(
    kfp: KfpServer, apply: Apply, state: str, dry_run: list[str]
) -> None:
    apply(BOTH)
    mine = schedule(kfp, "weekly")["recurring_run_id"]
    for _ in range(3):  # more than the server has on a page
        kfp.start_scheduled_run(mine, "SUCCEEDED")
    run = kfp.start_scheduled_run(mine, state)
    kfp.calls.clear()
    changed = BOTH.replace("0 0 2 * * 1", "0 30 2 * * 1").replace("0 0 3 1", "0 0 4 1")
    status, said = apply(changed, *dry_run)
    assert status == 1
    assert "cron: 0 0 2 * * 1 -> 0 30 2 * * 1" in said
    assert f"nothing was changed: a schedule is not replaced while a run of it is in flight (weekly: run {run} " in said
    assert f"({state})" in said
    assert kfp.changes == []
    kfp.runs[-1]["state"] = "FAILED"
    assert apply(changed)[0] == 0


def test_a_run_of_another_schedule_is_no_obstacle(kfp: KfpServer, apply: Apply) -> None:
    apply(BOTH)
    kfp.start_scheduled_run(schedule(kfp, "monthly")["recurring_run_id"], "RUNNING")
    assert apply(BOTH.replace("0 0 2 * * 1", "0 30 2 * * 1"))[0] == 0


def test_pausing_and_resuming_is_possible_while_a_run_is_in_flight(kfp: KfpServer, apply: Apply) -> None:
    apply(WEEKLY)
    mine = schedule(kfp, "weekly")["recurring_run_id"]
    kfp.start_scheduled_run(mine, "RUNNING")
    kfp.calls.clear()
    off = WEEKLY.replace("seed: 7", "seed: 7, enabled: false")
    assert apply(off) == (0, "weekly: pause\n  enabled: true -> false\nweekly: done\n")
    assert apply(off) == (0, "weekly: unchanged\n")
    assert schedule(kfp, "weekly")["mode"] == "DISABLE"
    on = WEEKLY.replace("seed: 7", "seed: 7, enabled: true")
    assert apply(on) == (0, "weekly: resume\n  enabled: false -> true\nweekly: done\n")
    assert kfp.changes == [f"POST /recurringruns/{mine}:disable", f"POST /recurringruns/{mine}:enable"]


def test_one_that_was_paused_stays_paused_unless_the_file_says_otherwise(kfp: KfpServer, apply: Apply) -> None:
    apply(WEEKLY)
    assert saferlhf("schedule", "pause", "weekly") == (0, "weekly: paused\n")
    assert apply(WEEKLY) == (0, "weekly: unchanged\n")
    changed = WEEKLY.replace("seed: 7", "seed: 8")
    assert apply(changed)[0] == 0
    assert schedule(kfp, "weekly")["mode"] == "DISABLE"
    assert apply(changed.replace("seed: 8", "seed: 9, enabled: true"))[0] == 0
    assert schedule(kfp, "weekly")["mode"] == "ENABLE"


def test_schedules_are_listed_paused_resumed_and_deleted_by_name(kfp: KfpServer, apply: Apply) -> None:
    assert saferlhf("schedule", "list") == (0, "no schedules\n")
    apply(BOTH + '  - {name: third, cron: "0 0 4 * * *"}\n')  # more than the server has on a page
    assert saferlhf("schedule", "pause", "weekly")[1] == "weekly: paused\n"
    kfp.calls.clear()
    assert saferlhf("schedule", "pause", "weekly")[1] == "weekly: already paused\n"
    assert kfp.changes == []
    head, *rows = saferlhf("schedule", "list")[1].splitlines()
    assert head.split() == ["name", "state", "cron", "start", "end", "version", "profile", "seed", "settings"]
    assert [row.split()[:2] for row in rows] == [["monthly", "on"], ["third", "on"], ["weekly", "paused"]]
    assert "0 0 2 * * 1" in rows[2] and '["ppo.steps=2"]' in rows[2]
    assert saferlhf("schedule", "resume", "weekly")[1] == "weekly: on\n"
    assert schedule(kfp, "weekly")["mode"] == "ENABLE"
    assert saferlhf("schedule", "delete", "weekly") == (0, "weekly: deleted\n")
    assert [entry["display_name"] for entry in kfp.schedules] == ["monthly", "third"]
    assert saferlhf("schedule", "delete", "weekly", "--ignore-missing") == (0, "weekly: is not there\n")


@pytest.mark.fault
@pytest.mark.parametrize("command", ["pause", "resume", "delete"])
def test_an_unknown_name_lists_those_that_there_are(kfp: KfpServer, apply: Apply, command: str) -> None:
    assert "has no schedule 'daily' in KFP: there is none" in saferlhf("schedule", command, "daily")[1]
    apply(BOTH)
    kfp.calls.clear()
    status, said = saferlhf("schedule", command, "daily")
    assert (status, kfp.changes) == (1, [])
    assert "there is monthly, weekly" in said


@pytest.mark.fault
def test_a_schedule_whose_run_is_in_flight_is_not_deleted(kfp: KfpServer, apply: Apply) -> None:
    apply(WEEKLY)
    run = kfp.start_scheduled_run(schedule(kfp, "weekly")["recurring_run_id"], "RUNNING")
    status, said = saferlhf("schedule", "delete", "weekly")
    assert status == 1
    assert f"weekly: not deleted, run {run} (RUNNING) is in flight: pause the schedule now" in said
    assert schedule(kfp, "weekly")["mode"] == "ENABLE"


def test_a_schedule_of_many_settings_fits_into_the_servers_columns(kfp: KfpServer, apply: Apply) -> None:
    """The server refuses a description of more than 255 characters, and the settings alone have more here."""
    many = "settings: [" + ", ".join(f"ppo.steps={number}" for number in range(2, 42)) + "]"
    text = BOTH.replace("settings: [ppo.steps=2]", many)
    assert apply(text)[0] == 0
    assert apply(text) == (0, "weekly: unchanged\nmonthly: unchanged\n")
    copies = [{**schedule(kfp, "weekly"), "recurring_run_id": f"{number:036d}"} for number in range(9)]
    kfp.schedules += copies  # as many as no failure leaves
    status, said = apply(text.replace("seed: 7", "seed: 8"))
    assert status == 0, said
    assert schedule(kfp, "weekly")["runtime_config"]["parameters"]["run_seed"] == 8


@pytest.mark.fault
def test_a_schedule_whose_experiment_was_deleted_can_be_listed_and_deleted(kfp: KfpServer, apply: Apply) -> None:
    apply(BOTH)
    kfp.experiments.clear()
    assert "weekly" in saferlhf("schedule", "list")[1]
    assert saferlhf("schedule", "delete", "weekly") == (0, "weekly: deleted\n")
    status, said = apply(WEEKLY + '  - {name: monthly, cron: "0 0 3 1 * *", start: 2026-12-01T00:00:00Z}\n')
    assert status == 0, said  # in an experiment that is made anew


@pytest.mark.fault
def test_a_copy_by_hand_that_is_no_schedule_of_ours_is_somebody_elses(kfp: KfpServer, apply: Apply) -> None:
    apply(WEEKLY)
    copied = schedule(kfp, "weekly")
    copied["trigger"] = {"periodic_schedule": {"interval_second": "3600"}}
    assert saferlhf("schedule", "list") == (0, "no schedules\n")
    assert "that saferlhf did not make: choose another name" in apply(WEEKLY)[1]


def test_an_account_that_the_server_filled_in_is_no_difference(kfp: KfpServer, apply: Apply) -> None:
    text = WEEKLY.replace(", service_account: saferlhf", "")
    apply(text)
    schedule(kfp, "weekly")["service_account"] = "pipeline-runner"
    assert apply(text) == (0, "weekly: unchanged\n")
    said = apply(text.replace("seed: 7", "seed: 8"), "--dry-run")[1]
    assert said == "weekly: replace\n  seed: 7 -> 8\ndry run: nothing was changed\n"


@pytest.mark.fault
def test_what_somebody_else_made_is_never_touched(kfp: KfpServer, apply: Apply) -> None:
    theirs = {"display_name": "weekly", "recurring_run_id": "x", "mode": "ENABLE", "description": '{"cron": "mine"}'}
    kfp.schedules.append(theirs)
    assert "recurring run 'weekly' that saferlhf did not make: choose another name" in apply(WEEKLY)[1]
    assert saferlhf("schedule", "delete", "weekly")[0] == 1
    assert saferlhf("schedule", "list") == (0, "no schedules\n")
    assert kfp.changes == []


@pytest.mark.fault
@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("version: v7", "schedule weekly: safe-rlhf has no version 'v7' in KFP"),
        ("version: none.yaml", "none.yaml cannot be read"),
        ("settings: [rounds=3]", "schedule weekly: rounds=3 is asked of version v-"),
    ],
)
def test_one_schedule_that_does_not_fit_the_server_stops_all(
    kfp: KfpServer, apply: Apply, extra: str, sentence: str
) -> None:
    text = BOTH.replace("settings: [ppo.steps=2]", extra)
    status, said = apply(text)
    assert status == 1
    assert sentence in said
    assert kfp.changes == []


@pytest.mark.fault
@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("0 0 3 1 * *", "0 3 1 * *", "has 5 fields, and KFP wants 6, seconds first: write '0 0 3 1 * *'"),
        (
            "00:00:00Z}",
            "00:00:00Z, end: 2026-11-01T00:00:00Z}",
            "end 2026-11-01T00:00:00+00:00 is not after start 2026",
        ),
    ],
)
def test_a_file_that_is_refused_makes_no_call(kfp: KfpServer, apply: Apply, old: str, new: str, sentence: str) -> None:
    status, said = apply(BOTH.replace(old, new))
    assert (status, sentence in said) == (1, True), said
    assert kfp.calls == []


@pytest.mark.fault
def test_if_the_new_one_cannot_be_made_the_old_one_goes_on(kfp: KfpServer, apply: Apply) -> None:
    apply(BOTH)
    before = [dict(entry) for entry in kfp.schedules]
    kfp.refuse["POST /recurringruns"] = (500, "no database")
    status, said = apply(BOTH.replace("seed: 7", "seed: 8").replace("0 0 3 1", "0 0 4 1"))
    assert status == 1
    assert "cannot make the schedule weekly: KFP answers 500 Internal Server Error (no database)" in said
    assert "weekly: the old schedule is as it was; apply again; not reached: monthly" in said
    assert kfp.schedules == before


@pytest.mark.fault
def test_if_a_first_one_cannot_be_made_that_is_said(kfp: KfpServer, apply: Apply) -> None:
    kfp.refuse["POST /recurringruns"] = (500, "no database")
    assert "weekly: it was not made, as far as is known; apply again" in apply(WEEKLY)[1]


@pytest.mark.fault
def test_if_the_old_one_cannot_be_deleted_the_new_one_is_taken_back(kfp: KfpServer, apply: Apply) -> None:
    apply(WEEKLY)
    before = [dict(entry) for entry in kfp.schedules]
    kfp.refuse[f"DELETE /recurringruns/{before[0]['recurring_run_id']}"] = (503, "busy")
    status, said = apply(WEEKLY.replace("seed: 7", "seed: 8"))
    assert status == 1
    assert "weekly: the old schedule is as it was; apply again" in said
    assert kfp.schedules == before


@pytest.mark.fault
def test_if_nothing_can_be_deleted_both_are_named_and_the_next_apply_mends_it(kfp: KfpServer, apply: Apply) -> None:
    apply(WEEKLY)
    kfp.refuse["DELETE /recurringruns/*"] = (503, "busy")
    changed = WEEKLY.replace("seed: 7", "seed: 8")
    status, said = apply(changed)
    old, new = (entry["recurring_run_id"] for entry in kfp.schedules)
    assert status == 1
    assert f"the old {old} may be paused, and the new {new} may be in place: see `saferlhf schedule list`" in said
    assert [entry["mode"] for entry in kfp.schedules] == ["ENABLE", "DISABLE"]
    status, said = saferlhf("schedule", "resume", "weekly")
    assert (status, f"an apply was cut short and left {old}, {new}" in said) == (1, True)
    kfp.refuse.clear()
    assert apply(changed) == (0, "weekly: remove the duplicate\n  enabled: false -> true\nweekly: done\n")
    assert schedule(kfp, "weekly")["recurring_run_id"] == new


@pytest.mark.parametrize("call", ["POST /recurringruns/*:disable", "DELETE /recurringruns/*"])
def test_one_that_somebody_deleted_meanwhile_is_no_failure(kfp: KfpServer, apply: Apply, call: str) -> None:
    apply(WEEKLY)
    kfp.refuse[call] = (404, "not found")
    assert apply(WEEKLY.replace("seed: 7", "seed: 8"))[0] == 0


def watch_how_many_are_on(kfp: KfpServer) -> list[int]:
    """How many recurring runs are on whenever a call arrives."""
    on: list[int] = []
    kfp.on_call = lambda call: on.append(sum(entry["mode"] == "ENABLE" for entry in kfp.schedules))
    return on


@pytest.mark.fault
@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("refused", ["", "*:disable", "GET /runs", "POST /recurringruns", "DELETE *", "*:enable"])
def test_two_that_are_on_are_never_in_place(kfp: KfpServer, apply: Apply, refused: str, paused: bool) -> None:
    apply(WEEKLY)
    if paused:
        saferlhf("schedule", "pause", "weekly")
    before = [dict(entry) for entry in kfp.schedules]
    on = watch_how_many_are_on(kfp)
    kfp.refuse.update({refused: (503, "busy")} if refused else {})
    status, _ = apply(WEEKLY.replace("seed: 7", "seed: 8"))
    assert max(on) == (0 if paused else 1)
    if status:
        kept = [entry for entry in kfp.schedules if entry["recurring_run_id"] == before[0]["recurring_run_id"]]
        assert kept == before or refused == "*:enable"  # then the old one cannot be resumed either
    kfp.refuse.clear()
    assert apply(WEEKLY.replace("seed: 7", "seed: 8"))[0] == 0
    assert schedule(kfp, "weekly")["mode"] == ("DISABLE" if paused else "ENABLE")
    assert schedule(kfp, "weekly")["runtime_config"]["parameters"]["run_seed"] == 8


@pytest.mark.fault
def test_a_run_that_starts_after_the_look_keeps_its_schedule(kfp: KfpServer, apply: Apply) -> None:
    apply(BOTH)
    before = [dict(entry) for entry in kfp.schedules]
    mine, runs = schedule(kfp, "weekly")["recurring_run_id"], list[str]()

    def start_it(call: str) -> None:
        if call.endswith(":disable") and not runs:
            runs.append(kfp.start_scheduled_run(mine, "RUNNING"))

    kfp.on_call = start_it
    kfp.calls.clear()
    status, said = apply(BOTH.replace("seed: 7", "seed: 8").replace("0 0 3 1", "0 0 4 1"))
    assert status == 1
    assert f"a schedule is not replaced while a run of it is in flight (weekly: run {runs[0]} (RUNNING))" in said
    assert "weekly: the old schedule is as it was; apply again; not reached: monthly" in said
    made, *turned, taken_back = kfp.changes
    assert (made, taken_back.partition("/")[0]) == ("POST /recurringruns", "DELETE ")
    assert turned == [f"POST /recurringruns/{mine}:disable", f"POST /recurringruns/{mine}:enable"]
    assert kfp.schedules == before


@pytest.mark.fault
def test_one_that_was_made_without_an_answer_is_taken_back(kfp: KfpServer, apply: Apply) -> None:
    apply(WEEKLY)
    before = [dict(entry) for entry in kfp.schedules]
    kfp.lose = "POST /recurringruns"
    status, said = apply(WEEKLY.replace("seed: 7", "seed: 8"))
    assert (status, "weekly: the old schedule is as it was; apply again" in said) == (1, True)
    assert kfp.schedules == before


@pytest.mark.fault
def test_an_interrupted_apply_leaves_the_old_one_on(kfp: KfpServer, apply: Apply) -> None:
    apply(WEEKLY)
    before = [dict(entry) for entry in kfp.schedules]
    looks = list[str]()

    def interrupt_the_second_look(call: str) -> None:
        if call == "GET /runs":
            looks.append(call)
            if len(looks) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    kfp.on_call = interrupt_the_second_look
    assert apply(WEEKLY.replace("seed: 7", "seed: 8"))[0] != 0
    assert len(looks) == 2
    assert kfp.schedules == before


def killed_at(kfp: KfpServer, number: int, *arguments: str) -> bool:
    """Run `saferlhf` in a process that is killed when its call of that number arrives; the call is not carried out.

    Returns:
        whether it came so far.
    """
    process = multiprocessing.get_context("fork").Process(target=saferlhf, args=arguments)

    def kill(call: str) -> None:
        if len(kfp.calls) == number:
            process.kill()
            raise ConnectionAbortedError

    kfp.calls.clear()
    kfp.on_call = kill
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()  # else it would be waited for without limit at the end of all tests
        pytest.fail(f"{arguments} did not end within a minute")
    return process.exitcode == -signal.SIGKILL


@pytest.mark.fault
@pytest.mark.parametrize("before", ["on", "paused", "none"])
def test_an_apply_that_is_killed_before_any_of_its_calls_is_mended_by_the_next(
    kfp: KfpServer, apply: Apply, tmp_path: Path, before: str
) -> None:
    """As the chart's Job is, with its node: no handler runs, and the next attempt finds what is on the server."""
    changed = WEEKLY.replace("seed: 7", "seed: 8")
    if before != "none":
        apply(WEEKLY)
    if before == "paused":
        saferlhf("schedule", "pause", "weekly")
    present = copy.deepcopy(kfp.schedules)
    file = tmp_path / "killed.yaml"
    file.write_text(changed)
    reached = set()
    for number in itertools.count(1):
        kfp.schedules[:] = copy.deepcopy(present)
        if not killed_at(kfp, number, "schedule", "apply", "-f", str(file)):
            break
        reached.add(kfp.calls[-1].rpartition(":")[2] if ":" in kfp.calls[-1] else kfp.calls[-1].partition(" ")[0])
        on = watch_how_many_are_on(kfp)
        status, said = apply(changed)
        assert (status, max(on) <= 1) == (0, True), (number, said)
        left = schedule(kfp, "weekly")
        assert left["mode"] == ("DISABLE" if before == "paused" else "ENABLE"), number
        assert left["runtime_config"]["parameters"]["run_seed"] == 8
    replaced = {"on": {"disable", "enable", "DELETE"}, "paused": {"DELETE"}, "none": set[str]()}
    assert reached == {"GET", "POST"} | replaced[before]
