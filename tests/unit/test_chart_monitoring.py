"""Logs, metrics and alerts of the chart: off by default, and of metrics that a stage really has."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.foundation.metrics import gauge_name
from components.foundation.settings import resolve_settings
from components.ppo_lagrangian.constraint_gauges import ConstraintGauges
from components.ppo_lagrangian.ppo_lagrangian import tracked_metrics
from components.ppo_lagrangian.trainer import StepMetrics
from tests.unit.helm_chart import CHART, find, names, platform_values, render, selects

ON = {"enabled": True, "port": 9999, "podMonitor": {"create": True}, "rules": {"create": True}}
PROMTOOL = os.environ.get("SAFERLHF_PROMTOOL") or shutil.which("promtool")
STEP = StepMetrics(**{field.name: 1.0 for field in dataclasses.fields(StepMetrics)})  # type: ignore[arg-type]
KINDS = {"PodMonitor", "PrometheusRule"}


def watched(**more: Any) -> list[dict[str, Any]]:
    return render(platform_values("eks", metrics={**ON, **more}))


def rules(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (group,) = find(objects, "PrometheusRule", "saferlhf")["spec"]["groups"]
    return list(group["rules"])


@functools.cache
def alerts() -> list[dict[str, Any]]:
    """The rules with their default limits."""
    return rules(watched())


def test_off_is_the_default_and_enabled_is_the_switch_for_all() -> None:
    for metrics in ({}, {**ON, "enabled": False}):
        objects = render(platform_values("eks", metrics=metrics))
        assert not KINDS & {entry["kind"] for entry in objects}
        data = find(objects, "ConfigMap", "saferlhf-platform")["data"]
        assert not [key for key in data if key.startswith(("SAFERLHF_METRICS", "SAFERLHF_LOG"))]
        assert "ingress" not in find(objects, "NetworkPolicy", "saferlhf-steps")["spec"]


def test_steps_are_told_by_the_config_map() -> None:
    objects = render(platform_values("eks", metrics=ON, logs={"format": "json"}))
    data = find(objects, "ConfigMap", "saferlhf-platform")["data"]
    told = {"SAFERLHF_LOG_FORMAT": "json", "SAFERLHF_METRICS_ADDRESS": "0.0.0.0", "SAFERLHF_METRICS_PORT": "9999"}
    assert told.items() <= data.items()


@pytest.mark.parametrize("policy", ["saferlhf-steps", "saferlhf-train-jobs"])
def test_prometheus_alone_may_read_the_port_and_nothing_else(policy: str) -> None:
    peer = {"namespaceSelector": {"matchLabels": {"team": "watchers"}}}
    opened = find(watched(**{"from": [peer]}), "NetworkPolicy", policy)["spec"]["ingress"]
    closed = find(render(platform_values("eks")), "NetworkPolicy", policy)["spec"].get("ingress", [])
    assert [rule for rule in opened if rule not in closed] == [{"from": [peer], "ports": [{"port": 9999}]}]


def relabelled(rules: list[dict[str, Any]], target: dict[str, str]) -> dict[str, str] | None:
    """What Prometheus makes of a discovered target: its labels, or None where it is dropped."""
    labels = dict(target)
    for rule in rules:
        match = re.fullmatch(rule["regex"], ";".join(labels.get(name, "") for name in rule["sourceLabels"]))
        if rule["action"] == "keep" and match is None:
            return None
        if rule["action"] == "replace" and match is not None:
            labels[rule["targetLabel"]] = match.expand(rule["replacement"].replace("$", "\\"))
    return labels


@pytest.mark.parametrize(("monitor", "container"), [("saferlhf-steps", "main"), ("saferlhf-train-jobs", "node")])
def test_a_pod_that_declares_no_port_is_found(monitor: str, container: str) -> None:
    spec = find(watched(), "PodMonitor", monitor)["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    assert not {"port", "portNumber", "targetPort"} & endpoint.keys()  # each keeps pods that declare it, and no others

    def address(ip: str, name: str = container, phase: str = "Running") -> str | None:
        pod = {"pod_ip": ip, "pod_container_name": name, "pod_phase": phase}
        found = {"__address__": ip, **{f"__meta_kubernetes_{key}": value for key, value in pod.items()}}
        labels = relabelled(endpoint["relabelings"], found)
        return labels and labels["__address__"]

    assert address("10.1.2.3") == "10.1.2.3:9999"
    assert address("fd00::7") == "[fd00::7]:9999"
    assert address("10.1.2.3", name="wait") is None
    assert address("10.1.2.3", phase="Succeeded") is None


def test_each_monitor_selects_its_pods() -> None:
    objects = watched()
    step, node = {"pipelines.kubeflow.org/v2_component": "true"}, {"jobset.sigs.k8s.io/jobset-name": "ppo"}
    index = "batch.kubernetes.io/job-completion-index"
    steps, jobs = (
        find(objects, "PodMonitor", f"saferlhf-{name}")["spec"]["selector"] for name in ("steps", "train-jobs")
    )
    assert (selects(steps, step), selects(steps, node)) == (True, False)
    assert (selects(jobs, {**node, index: "0"}), selects(jobs, {**node, index: "1"})) == (True, False)
    assert not selects(jobs, step)


def test_labels_of_the_values_are_on_monitors_and_rules() -> None:
    mine = {"create": True, "labels": {"release": "prometheus"}}
    objects = watched(podMonitor=mine, rules=mine)
    for entry in objects:
        if entry["kind"] in KINDS:
            assert entry["metadata"]["labels"]["release"] == "prometheus"
    assert names(objects, "PodMonitor") == {"saferlhf-steps", "saferlhf-train-jobs"}


def test_every_alert_stands_on_metrics_that_ppo_has() -> None:
    settings = resolve_settings("tiny").ppo
    served = {gauge_name(n) for n in (*tracked_metrics(STEP, 0), *ConstraintGauges(0.0, settings).after(STEP), "step")}
    served |= {"saferlhf_checkpoint_timestamp_seconds", "saferlhf_training_start_timestamp_seconds"}
    asked = {name for rule in alerts() for name in re.findall(r"saferlhf_\w+", rule["expr"])}
    assert asked <= served
    told = (CHART.parent / "INSTALL.md").read_text().partition("## 5. Watching a run")[2]
    assert set(re.findall(r"saferlhf_\w+", told)) <= served | {
        f"saferlhf_{stage}_loss" for stage in ("sft", "reward_model", "cost_model")
    }


def test_every_alert_is_documented_with_what_to_do() -> None:
    told = (CHART.parent / "INSTALL.md").read_text().partition("**Alerts**")[2]
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", told, re.MULTILINE)
    assert rows == [rule["alert"] for rule in alerts()]
    for rule in alerts():
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["annotations"]["summary"].startswith("Run {{ $labels.run }}, round {{ $labels.round }}, ")


@pytest.mark.golden
def test_limits_of_the_values_are_in_the_expressions() -> None:
    limits = {"create": True, "stepsAboveThreshold": 1_000_000, "kl": 0.25, "checkpointAgeSeconds": 10_000_000}
    assert [rule["expr"] for rule in rules(watched(rules=limits))] == [
        "saferlhf_lagrangian_lambda >= 0.999 * saferlhf_lagrangian_lambda_ceiling",
        "saferlhf_lagrangian_steps_above_threshold >= 1000000",
        "saferlhf_kl_mean > 0.25",
        "time() - (saferlhf_checkpoint_timestamp_seconds or saferlhf_training_start_timestamp_seconds) > 10000000",
    ]


def test_steps_above_the_threshold_are_counted_in_a_row() -> None:
    settings = resolve_settings("tiny").ppo
    gauges = ConstraintGauges(0.5, settings)
    costs = (1.0, 0.6, 0.5, 0.7)
    after = [gauges.after(dataclasses.replace(STEP, cost_moving_average=cost)) for cost in costs]
    assert [found["lagrangian/steps_above_threshold"] for found in after] == [1, 2, 0, 1]
    assert after[0]["lagrangian/cost_threshold"] == 0.5
    assert after[0]["lagrangian/lambda_ceiling"] == settings.lambda_max
    fixed = settings.model_copy(update={"reward_shaping": 2.0})
    assert ConstraintGauges(0.5, fixed).after(STEP) == {}


LABELS = '{run="r1", round="1", stage="ppo_lagrangian", rank="0", pod="p"}'


def alert_case(series: dict[str, str], minute: int, firing: list[str]) -> dict[str, Any]:
    """A case of `promtool test rules`: these series a minute apart, and which alerts fire then."""
    fires = {"exp_labels": {"severity": "warning", **dict(re.findall(r'(\w+)="(\w+)"', LABELS))}}
    return {
        "interval": "1m",
        "input_series": [{"series": name + LABELS, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": f"{minute}m", "alertname": rule["alert"], "exp_alerts": [fires] * (rule["alert"] in firing)}
            for rule in alerts()
        ],
    }


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: Debian's package prometheus has it (SAFERLHF_PROMTOOL)")
def test_prometheus_itself_fires_the_alerts_when_it_should(tmp_path: Path) -> None:
    """By Prometheus' own tool: what fires, and what does not, 20 and 40 minutes into a stage."""
    shown = [{key: value for key, value in rule.items() if key != "annotations"} for rule in alerts()]
    for file, kept in (("real.yaml", alerts()), ("rules.yaml", shown)):
        (tmp_path / file).write_text(yaml.safe_dump({"groups": [{"name": "saferlhf", "rules": kept}]}))
    bound = {"saferlhf_lagrangian_lambda_ceiling": "20x60", "saferlhf_training_start_timestamp_seconds": "0x60"}
    at_ceiling = {**bound, "saferlhf_lagrangian_lambda": "20x60", "saferlhf_kl_mean": "0.2x60"}
    far_away = {**bound, "saferlhf_lagrangian_lambda": "19x60", "saferlhf_kl_mean": "1.5x60"}
    above = {"saferlhf_lagrangian_steps_above_threshold": "41+1x60"}
    saving = {**bound, "saferlhf_checkpoint_timestamp_seconds": "0+60x60"}
    stuck = {**bound, "saferlhf_checkpoint_timestamp_seconds": "300x60"}
    cases = [
        alert_case(at_ceiling, 20, ["SaferlhfLambdaAtCeiling"]),
        alert_case(far_away, 20, ["SaferlhfKlHigh"]),
        alert_case(above, 8, []),
        alert_case(above, 9, ["SaferlhfCostAboveThreshold"]),
        alert_case(bound, 40, ["SaferlhfCheckpointOld"]),
        alert_case(saving, 40, []),
        alert_case(stuck, 40, ["SaferlhfCheckpointOld"]),
    ]
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": cases}))
    for command in (["check", "rules", "real.yaml"], ["test", "rules", "cases.yaml"]):
        done = subprocess.run([str(PROMTOOL), *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
