"""Renders the chart with Helm's own engine (Helm 4 as a library), and gives its objects and pods to the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

CHART = Path(__file__).resolve().parents[2] / "charts" / "saferlhf"
PLATFORMS = tuple(sorted(path.stem.removeprefix("values-") for path in CHART.glob("values-*.yaml")))
IMAGE = "registry.example.com/saferlhf/service@sha256:" + "a" * 64
NAMESPACE = "team-a"
_WORKLOADS = {"Deployment", "StatefulSet", "Job"}
Values = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod that the chart makes: its owner's name, its labels and its spec."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def merged(values: Values, more: Values) -> Values:
    """`more` over `values`, as Helm lays values files over each other."""
    result = dict(values)
    for key, value in more.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def platform_values(platform: str, **more: Any) -> Values:
    """Values of a values file with what its head says that the user gives."""
    own = helm.values_from_yaml((CHART / f"values-{platform}.yaml").read_text())
    given = {"images": {"service": IMAGE}, "pipeline": {"file": "pipelineInfo: {name: safe-rlhf}\n"}}
    return merged(merged(own, given), more)


def render_text(values: Values, *, name: str = "saferlhf") -> dict[str, str]:
    with helm.Chart.load(CHART) as chart:
        return chart.render(values, name=name, namespace=NAMESPACE)


def render(values: Values) -> list[dict[str, Any]]:
    """All objects, in the order of their files."""
    texts = render_text(values)
    files = [text for path, text in texts.items() if path.endswith(".yaml")]
    return [entry for text in files for entry in yaml.safe_load_all(text) if entry]


def pods(objects: list[dict[str, Any]]) -> Iterator[Pod]:
    for entry in objects:
        name = f"{entry['kind']}/{entry['metadata']['name']}"
        if entry["kind"] == "Pod":
            yield Pod(name, entry["metadata"]["labels"], entry["spec"])
        elif entry["kind"] in _WORKLOADS:
            template = entry["spec"]["template"]
            yield Pod(name, template["metadata"]["labels"], template["spec"])


def find(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [entry for entry in objects if (entry["kind"], entry["metadata"]["name"]) == (kind, name)]
    return found


def names(objects: list[dict[str, Any]], kind: str) -> set[str]:
    return {entry["metadata"]["name"] for entry in objects if entry["kind"] == kind}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Does a Kubernetes label selector match?"""
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    tests = {
        "In": lambda rule: labels.get(rule["key"]) in rule["values"],
        "Exists": lambda rule: rule["key"] in labels,
    }
    return exact and all(tests[rule["operator"]](rule) for rule in selector.get("matchExpressions", []))
