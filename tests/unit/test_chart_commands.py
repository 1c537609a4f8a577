"""The commands that the chart's containers run are commands that the installed programs understand."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer.main
from mlflow.cli import server as mlflow_server
from mlflow.server.security_utils import is_allowed_host_header

from pipelines.cli import app
from tests.unit.helm_chart import find, names, platform_values, pods, render
from tests.unit.kfp_server import KfpServer
from tests.unit.kubeflow_command import saferlhf


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


def test_mlflows_database_is_migrated_without_its_address_in_the_arguments(tmp_path: Path) -> None:
    """On SQLite, in an init container; tests/integration/test_mlflow_on_postgres.py runs the Job's on PostgreSQL."""
    server = find(render(platform_values("try")), "Deployment", "saferlhf-mlflow")
    (container,) = server["spec"]["template"]["spec"]["initContainers"]
    database = tmp_path / "mlflow.db"
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{database}"}
    subprocess.run([sys.executable, *container["command"][1:]], env=environment, check=True, capture_output=True)
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
    assert "args" not in container


def test_seaweedfs_knows_every_flag() -> None:
    store = find(render(platform_values("try")), "StatefulSet", "saferlhf-s3")
    (container,) = store["spec"]["template"]["spec"]["containers"]
    weed = Path(sys.executable).with_name(container["command"][0])
    told = subprocess.run([weed, "server", "-h"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^  -([\w.]+)", told.stdout + told.stderr, re.MULTILINE))
    flags = [flag.lstrip("-").partition("=")[0] for flag in container["args"] if flag.startswith("-")]
    assert [flag for flag in flags if flag not in known | {"logtostderr"}] == []


def test_the_upload_job_does_what_it_says(kfp: KfpServer, compiled_pipeline: Path, tmp_path: Path) -> None:
    """The Job's own commands with the files of its ConfigMaps, against a server that speaks KFP's API."""
    pipeline = {"file": compiled_pipeline.read_text()}
    run_job(platform_values("try", schedule={"enabled": True}, pipeline=pipeline), tmp_path)
    (version,), (schedule,) = kfp.versions, kfp.schedules
    assert version["display_name"].startswith("0.1.0-")
    assert schedule["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert schedule["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * 1"
    assert schedule["service_account"] == "saferlhf"
    assert schedule["runtime_config"]["parameters"] == {
        "run_id": "[[RunUUID]]",
        "run_profile": "smol",
        "run_seed": 0,
        "run_set": '["store.uri=s3://saferlhf"]',
    }
    run_job(platform_values("try", schedule={"enabled": False}, pipeline=pipeline), tmp_path)
    assert (len(kfp.versions), kfp.schedules) == (1, [])


def run_job(values: dict[str, Any], folder: Path) -> None:
    """What the kubelet does: files where the volumes are mounted, then each container's command, in their order."""
    objects = render(values)
    mounts = {"/pipeline/pipeline.yaml": "saferlhf-pipeline", "/schedules/schedules.yaml": "saferlhf-schedules"}
    for path, config_map in mounts.items():
        if config_map in names(objects, "ConfigMap"):
            name, file = path.rpartition("/")[2], folder / path[1:]
            file.parent.mkdir(exist_ok=True)
            text = find(objects, "ConfigMap", config_map)["data"][name]
            file.write_text(text.replace("/pipeline/", f"{folder}/pipeline/"))
    spec = find(objects, "Job", "saferlhf-upload")["spec"]["template"]["spec"]
    for container in [*spec["initContainers"], *spec["containers"]]:
        arguments = [*container["command"], *container["args"]][1:]
        status, said = saferlhf(*(re.sub("(/pipeline/|/schedules/)", rf"{folder}\1", text) for text in arguments))
        assert status == 0, said


def test_the_doctor_of_every_pod_exists() -> None:
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    asked = set()
    for pod in pods(render(platform_values("try"))):
        for container in pod.containers:
            if container["command"][:2] == ["saferlhf", "doctor"]:
                asked |= set(commands["doctor"].make_context("doctor", container["command"][2:]).params["checks"])
    assert asked == {"s3", "mlflow", "kfp"}
