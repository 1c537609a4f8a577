"""What the pages beside the chart say of rights and of costs, held against what is rendered and against the formula."""

from __future__ import annotations

import re

import pytest

from pipelines.cluster.platform_file import read_platform
from tests.unit.helm_chart import CHART, PLATFORMS, platform_values, render

INSTALL = CHART.parent / "INSTALL.md"
S3_ACTIONS = {  # what a call of boto3's needs
    "head_bucket": {"s3:ListBucket"},
    "get_paginator": {"s3:ListBucket"},
    "head_object": {"s3:GetObject"},
    "get_object": {"s3:GetObject"},
    "download_fileobj": {"s3:GetObject"},
    "put_object": {"s3:PutObject"},
    "upload_file": {"s3:PutObject", "s3:AbortMultipartUpload"},
    "delete_object": {"s3:DeleteObject"},
    "create_bucket": set[str](),  # only where the bucket is not there: the page asks for it beforehand
}


def rows(text: str, head: str) -> list[list[str]]:
    """Cells of the table that begins so; an empty first cell repeats the one above."""
    found: list[list[str]] = []
    for line in text[text.index(head) :].splitlines()[2:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found.append([cells[0] or found[-1][0], *cells[1:]])
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_right_of_the_chart_has_its_row_with_a_reason() -> None:
    granted = {
        (entry["metadata"]["name"], resource, verb)
        for platform in PLATFORMS
        for entry in render(platform_values(platform))
        if entry["kind"] in {"Role", "ClusterRole"}
        for rule in entry["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    resources = {resource for _, resource, _ in granted}
    table = rows((CHART / "README.md").read_text(), "| Role | resources | verbs | why |")
    told = {
        (role.strip("`"), resource, verb)
        for role, cell, verbs, _ in table
        for resource in quoted(cell)
        if resource in resources
        for verb in verbs.split(", ")
    }
    assert told == granted
    assert all(why for *_, why in table)


@pytest.mark.parametrize("role", ["steps", "MLflow"])
def test_every_s3_action_that_we_call_has_its_row_with_a_reason(role: str) -> None:
    """MLflow's own calls are the same."""
    calls = re.findall(r"client\.(\w+)\(", (CHART.parents[1] / "components/foundation/s3.py").read_text())
    needed = set[str]().union(*(S3_ACTIONS[call] for call in calls))
    table = rows(INSTALL.read_text(), "| role | on | action | why |")
    assert {action for name, _, cell, _ in table if name == role for action in quoted(cell)} == needed
    assert all(why for *_, why in table)


@pytest.mark.golden
def test_the_estimate_is_what_its_formula_gives() -> None:
    text = INSTALL.read_text()
    said = {quoted(name)[0]: float(value.replace(",", "")) for name, value in rows(text, "| assumption | value |")}
    platform, total, hours_of_all = read_platform("gke"), 0.0, 0.0
    table = rows(text, "| stage | pool | GPUs | tokens, M | FLOPs a token | hours | cost |")
    times = {"sft": 1, "evaluate": 4, "collect": 3, "ppo_lagrangian": 3, "reward_model": 6, "cost_model": 6}
    for stage, pool, gpus, tokens, flops, hours, cost in table:
        place = platform.pool_of(quoted(stage)[0])
        assert (platform.pools[quoted(pool)[0]], int(gpus)) == (place, place.gpus), stage
        device = "L4" if quoted(pool) == ["generate"] else "A100"
        work = float(tokens) * 1e6 * int(flops.removesuffix(" N")) * said["N"]
        expected = work / (said[f"PEAK_{device}"] * 1e12 * said["UTILISATION"]) / int(gpus) / 3600
        price = expected * int(gpus) * said[f"PRICE_{device}"]
        assert (hours, cost) == (f"{expected:.1f}", f"{price:.1f}"), stage
        hours_of_all += times[quoted(stage)[0]] * expected * int(gpus)
        total += times[quoted(stage)[0]] * price
    assert {quoted(row[0])[0] for row in table} == {name for name in platform.stages if platform.pool_of(name).gpus}
    assert f"{hours_of_all:.0f} GPU-hours and {total:.0f} in all" in text
