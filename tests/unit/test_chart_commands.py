"""The commands that the chart's containers run are commands that the installed programs understand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from click import Command
from kfp import compiler
from mlflow.cli import cli as mlflow_cli
from mlflow.cli import server as mlflow_server
from mlflow.server.security_utils import is_allowed_host_header
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.safe_rlhf import build_pipeline
from tests.unit.helm_chart import find, platform_values, pods, render
from tests.unit.kfp_server import kfp_server


def server_arguments(**mlflow: Any) -> dict[str, Any]:
    """How MLflow's own command line reads the Deployment's arguments."""
    deployment = find(render(platform_values("eks", mlflow=mlflow)), "Deployment", "saferlhf-mlflow")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["mlflow", "server"]
    return mlflow_server.make_context("server", list(container["args"]), resilient_parsing=False).params


def test_mlflow_serves_artifacts_from_s3_to_all_interfaces() -> None:
    read = server_arguments()
    assert (read["host"], read["port"], read["workers"]) == ("0.0.0.0", 5000, "2")
    assert (read["serve_artifacts"], read["artifacts_destination"]) == (True, "s3://example-saferlhf/mlflow")
    assert server_arguments(artifactsUri="s3://other/place")["artifacts_destination"] == "s3://other/place"


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("saferlhf-mlflow.team-a.svc.cluster.local:5000", True),  # steps
        ("saferlhf-mlflow:5000", True),
        ("localhost:8080", True),  # kubectl port-forward
        ("mlflow.example.com", True),  # allowedHosts
        ("evil.example.com", False),
        ("saferlhf-mlflow.team-b.svc.cluster.local:5000", False),
    ],
)
def test_mlflow_answers_to_the_names_that_it_has_in_the_cluster(host: str, answered: bool) -> None:
    """By default it would refuse the Service's name."""
    allowed = server_arguments()["allowed_hosts"].split(",")
    assert is_allowed_host_header(allowed, host) is answered


def test_mlflows_database_command_exists() -> None:
    job = find(render(platform_values("eks")), "Job", "saferlhf-mlflow-migrate")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command: Command = mlflow_cli
    for word in container["command"][1:]:
        command = command.commands[word]  # type: ignore[attr-defined]
    assert container["args"] == ["$(MLFLOW_BACKEND_STORE_URI)"]
    assert command.make_context("upgrade", ["sqlite:///x"]).params == {"url": "sqlite:///x"}


def test_seaweedfs_knows_every_flag() -> None:
    store = find(render(platform_values("try")), "StatefulSet", "saferlhf-s3")
    (container,) = store["spec"]["template"]["spec"]["containers"]
    weed = Path(sys.executable).with_name(container["command"][0])
    told = subprocess.run([weed, "server", "-h"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^  -([\w.]+)", told.stdout + told.stderr, re.MULTILINE))
    flags = [flag.lstrip("-").partition("=")[0] for flag in container["args"] if flag.startswith("-")]
    assert [flag for flag in flags if flag not in known | {"logtostderr"}] == []


def test_the_upload_job_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Job's own arguments, with the pipeline of its ConfigMap, against a server that speaks KFP's API."""
    file = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(build_pipeline(1), str(file))
    values = platform_values("try", schedule={"enabled": True}, pipeline={"file": file.read_text()})
    objects = render(values)
    file.write_text(find(objects, "ConfigMap", "saferlhf-pipeline")["data"]["pipeline.yaml"])
    (container,) = find(objects, "Job", "saferlhf-upload")["spec"]["template"]["spec"]["containers"]
    arguments = [*container["command"], *container["args"]][1:]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with kfp_server() as server:
        monkeypatch.setenv("KFP_HOST", server.url)
        result = CliRunner().invoke(app, [text.replace("/pipeline/pipeline.yaml", str(file)) for text in arguments])
        assert result.exit_code == 0, result.output
        (version,), (schedule,) = server.versions, server.schedules
    assert version["display_name"].startswith("0.1.0-")
    assert schedule["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * 1"
    assert schedule["service_account"] == "saferlhf"
    assert schedule["runtime_config"]["parameters"] == {
        "run_id": "[[RunUUID]]",
        "run_uri": "s3://saferlhf/runs/[[RunUUID]]",
    }


def test_the_doctor_of_every_pod_exists() -> None:
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    asked = set()
    for pod in pods(render(platform_values("try"))):
        for container in pod.containers:
            if container["command"][:2] == ["saferlhf", "doctor"]:
                asked |= set(commands["doctor"].make_context("doctor", container["command"][2:]).params["checks"])
    assert asked == {"s3", "mlflow", "kfp"}
