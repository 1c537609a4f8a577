"""What the pages beside the chart say of rights and of costs, held against what is rendered and against the formula."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from kubernetes.utils import parse_quantity

from pipelines.cluster.platform_file import read_platform, shipped_platforms
from tests.custom_kinds import check
from tests.unit.helm_chart import CHART, PLATFORMS, find, platform_values, render

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


@pytest.mark.parametrize(("role", "file"), [("steps", "steps.json"), ("MLflow", "mlflow.json")])
def test_the_iam_policies_of_the_page_allow_what_its_table_says(role: str, file: str) -> None:
    text = INSTALL.read_text()
    policy = json.loads(text.partition(f"cat > {file} <<END")[2].partition("END")[0])
    allowed = {
        (resource, action)
        for statement in policy["Statement"]
        for resource in [statement["Resource"].replace("$BUCKET", "BUCKET")]
        for action in statement["Action"]
    }
    told, resource = set[tuple[str, str]](), ""
    for name, cell, action, _ in rows(text, "| role | on | action | why |"):
        resource = (quoted(cell) or [resource])[0]
        told |= {(resource, quoted(action)[0])} if name == role else set()
    assert allowed == told


def test_the_page_replaces_what_stands_in_the_values_file() -> None:
    """And the accounts to which it gives IAM roles are the chart's."""
    text, values = INSTALL.read_text(), (CHART / "values-eks.yaml").read_text()
    (line,) = [line for line in text.splitlines() if line.strip().startswith("sed ") and "values-eks.yaml" in line]
    assert [old for old in re.findall(r"-e s/([^/]+)/", line) if old not in values] == []
    objects = render(platform_values("eks"))
    for account, role in re.findall(r"--namespace team-a --name (\S+) --role-only --role-name (\S+)", text):
        annotations = find(objects, "ServiceAccount", account)["metadata"]["annotations"]
        assert annotations["eks.amazonaws.com/role-arn"].endswith(f":role/{role}")


def test_the_queue_of_the_page_is_one_that_the_values_files_lead_to_and_holds_a_step() -> None:
    block = re.search(r"```yaml\n(.*?)```", INSTALL.read_text(), re.DOTALL)
    assert block is not None
    objects = list(yaml.safe_load_all(block[1]))
    for entry in objects:
        check(entry)
    flavor, queue = objects
    for platform in ("eks", "gke", "on-prem"):
        assert platform_values(platform)["kueue"]["clusterQueue"] == queue["metadata"]["name"]
    (group,) = queue["spec"]["resourceGroups"]
    assert [entry["name"] for entry in group["flavors"]] == [flavor["metadata"]["name"]]
    quota = {entry["name"]: parse_quantity(entry["nominalQuota"]) for entry in group["flavors"][0]["resources"]}
    assert [*quota] == group["coveredResources"]
    for pool in (pool for name in shipped_platforms() for pool in read_platform(name).pools.values() if pool.queue):
        assert pool.accelerator is not None
        asked = {"cpu": pool.cpu.request, "memory": pool.memory.request, pool.accelerator.resource: str(pool.gpus)}
        assert all(parse_quantity(amount) <= quota[name] for name, amount in asked.items())


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
