"""Values that cannot be right are refused, with the sentence that Helm's user reads; every value is documented."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python as helm
import pytest
import yaml

from tests.unit.helm_chart import CHART, IMAGE, PLATFORMS, merged, platform_values, render

DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
OPEN = {"annotations", "nodeSelector", "parameters", "matchLabels"}
"""Maps whose keys belong to the user."""


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises((helm.HelmValuesError, helm.HelmRenderError)) as caught:
        render(values)
    return str(caught.value)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"mlfow": {}}, "at '': additional properties 'mlfow' not allowed"),
        ({"mlflow": {"replica": 2}}, "at '/mlflow': additional properties 'replica' not allowed"),
        (
            {"networkPolicy": {"s3": {"to": [{"ipblock": {}}], "port": 443}}},
            "at '/networkPolicy/s3/to/0': additional properties 'ipblock' not allowed",
        ),
        (
            {"images": {"service": "saferlhf/service:latest"}},
            "at '/images/service': 'saferlhf/service:latest' ",
        ),
        ({"images": {"service": f"{IMAGE}0"}}, "@sha256:[0-9a-f]{64}$'"),
        ({"mlflow": {"image": "mlflow:3"}}, "at '/mlflow/image': 'mlflow:3' does not match pattern"),
        ({"mlflow": {"replicas": 0}}, "at '/mlflow/replicas': minimum: got 0, want 1"),
        ({"schedule": {"cron": "0 2 * * 1"}}, "at '/schedule/cron': '0 2 * * 1' does not match pattern"),
        ({"s3": {"storeUri": "gs://bucket"}}, "at '/s3/storeUri': 'gs://bucket' does not match pattern '^s3://"),
        ({"s3": {"endpoint": "minio:9000"}}, "at '/s3/endpoint': 'minio:9000' does not match pattern"),
        ({"seaweedfs": {"size": "big"}}, "at '/seaweedfs/size': 'big' does not match pattern"),
        ({"jobs": {"resources": {"limits": {"cpu": 2}}}}, "at '/jobs/resources/limits/cpu': got number, want string"),
        ({"kfp": {"multiUser": "yes"}}, "at '/kfp/multiUser': got string, want boolean"),
        ({"imagePullSecrets": [{"name": "a"}]}, "at '/imagePullSecrets/0': got object, want string"),
        # what does not go together
        (
            {"mlflow": {"replicas": 2}},
            "mlflow.replicas is 2, but SQLite serves one: set mlflow.database.",
        ),
        ({"mlflow": {"enabled": False}}, "mlflow.trackingUri is empty: runs need an MLflow server"),
        ({"schedule": {"enabled": True}, "pipeline": {"file": ""}}, "there is no pipeline to schedule: add --set-file"),
        ({"pipeline": {"existingConfigMap": "mine"}}, "pipeline.existingConfigMap are both set: choose one"),
        ({"priorityClass": {"create": True}}, "priorityClass.name is empty: name the class that is to be made"),
        ({"priorityClass": {"name": "a" * 64}}, "at '/priorityClass/name': '"),
        ({"kueue": {"create": True}}, "kueue.clusterQueue is empty: name the ClusterQueue"),
        ({"s3": {"existingSecret": "mine"}}, "s3.existingSecret names another store: choose one"),
    ],
)
def test_wrong_values_are_refused_with_their_place(values: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(merged(platform_values("try"), values))


@pytest.mark.fault
def test_without_an_image_nothing_is_rendered() -> None:
    assert "at '/images/service': '' does not match pattern" in refusal({})


def objects_of(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for key, value in schema.items():
            yield from objects_of(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for value in schema:
            yield from objects_of(value, path)


def test_the_schema_is_closed_at_every_level() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    found = list(objects_of(schema))
    assert len(found) > 25
    for path, entry in found:
        if path == "/properties/global":  # belongs to the charts around this one
            continue
        extra = entry.get("additionalProperties", True)
        free = path.rpartition("/")[2] in {"strings", "parameters"}
        assert isinstance(extra, dict) if free else extra is False, path


def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        here = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict) and value and key not in {"requests", "limits"}:
            yield from leaves(value, here)
        else:
            yield here


def test_the_readme_has_every_value_with_its_default() -> None:
    section = (CHART / "README.md").read_text().partition("## Values")[2]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| .+ \|$", section, re.MULTILINE)
    assert [name for name, _ in rows] == list(leaves(DEFAULTS))
    for name, shown in rows:
        value: Any = DEFAULTS
        for part in name.split("."):
            value = value[part]
        assert yaml.safe_load(shown.strip("`") or '""') == value, name


def test_every_default_is_in_the_schema_and_the_other_way_round() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def names(entry: dict[str, Any], path: str = "") -> Iterator[str]:
        if "$ref" in entry:
            entry = schema["$defs"][entry["$ref"].rpartition("/")[2]]
        properties = entry.get("properties", {})
        if not properties or path.endswith((".requests", ".limits")):
            yield path
            return
        for key, value in properties.items():
            yield from names(value, f"{path}.{key}".lstrip("."))

    assert sorted(names(schema)) == sorted([*leaves(DEFAULTS), "global"])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_values_files_set_only_what_differs(platform: str) -> None:
    """A value that repeats the default would hide a later change of it."""
    own = yaml.safe_load((CHART / f"values-{platform}.yaml").read_text())

    def repeated(mine: dict[str, Any], default: Any, path: str) -> Iterator[str]:
        for key, value in mine.items():
            if isinstance(value, dict) and key not in OPEN:
                yield from repeated(value, default[key], f"{path}.{key}")
            elif default.get(key) == value and not path.startswith(".networkPolicy"):
                yield f"{path}.{key}"

    same = list(repeated(own, DEFAULTS, ""))
    assert [path for path in same if path != ".s3.storeUri"] == []
