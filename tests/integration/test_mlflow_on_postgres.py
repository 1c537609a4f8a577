"""MLflow on a real PostgreSQL, migrated and started by the commands of the chart: what SQLite lets pass, it may not."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.tracking import Tracker
from pipelines.local.server_process import free_ports, start_server, stop_servers, wait_until_healthy
from tests.integration.promotions import context_of, race
from tests.unit.helm_chart import find, platform_values, render

PASSWORD = secrets.token_urlsafe(16)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """SQLAlchemy's address of an empty database. PostgreSQL refuses to run as root: then it runs as `nobody`."""
    programs, user = postgres_programs(), "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="saferlhf-postgres-") as name:
        folder, (port,) = Path(name), free_ports(1)
        (folder / "password").write_text(PASSWORD)
        for path in (folder, folder / "password"):
            if user:
                shutil.chown(path, user)
        initdb = [programs / "initdb", f"--pgdata={folder}/data", "--username=mlflow", f"--pwfile={folder}/password"]
        subprocess.run([*initdb, "--auth=scram-sha-256"], user=user, check=True, capture_output=True, cwd=folder)
        command = [f"{programs}/postgres", "-D", f"{folder}/data", "-h", "127.0.0.1", "-p", str(port), "-k", name]
        if user:
            command = ["setpriv", f"--reuid={user}", "--clear-groups", *command]
        address = f"postgresql://mlflow:{PASSWORD}@127.0.0.1:{port}"

        def answers() -> bool:
            try:
                with closing(psycopg.connect(f"{address}/postgres", autocommit=True)) as connection:
                    connection.execute("CREATE DATABASE mlflow")
            except psycopg.OperationalError:
                return False
            return True

        with server("PostgreSQL", command, folder, os.environ, answers):
            yield f"{address}/mlflow".replace("postgresql://", "postgresql+psycopg://")


def postgres_programs() -> Path:
    """The folder of initdb and postgres; Debian keeps it off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        pytest.skip("no PostgreSQL: Debian's package postgresql has it")
    return folders[-1]


@contextmanager
def server(
    name: str, command: list[str], folder: Path, environment: Mapping[str, str], answers: Callable[[], bool]
) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        process = start_server(
            name, command, log=folder / "server.log", ports=[], environment=environment, lock=lock.fileno()
        )
    try:
        wait_until_healthy([(process, answers)], 120)
        yield
    finally:
        stop_servers([process])


@pytest.fixture(scope="module")
def tracking_uri(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The chart's migration Job, then its server, with the port and the artifacts of this machine."""
    folder, (port,) = tmp_path_factory.mktemp("mlflow"), free_ports(1)
    objects = render(platform_values("eks"))
    (migrate,) = find(objects, "Job", "saferlhf-mlflow-migrate")["spec"]["template"]["spec"]["containers"]
    (mlflow,) = find(objects, "Deployment", "saferlhf-mlflow")["spec"]["template"]["spec"]["containers"]
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": database}
    environment |= {entry["name"]: entry["value"] for entry in mlflow["env"] if entry["name"].startswith("MLFLOW_S")}
    subprocess.run([sys.executable, *migrate["command"][1:]], env=environment, check=True, capture_output=True)
    here = ["--host=127.0.0.1", f"--port={port}", f"--artifacts-destination={folder.as_uri()}", "--workers=2"]
    kept = [arg for arg in mlflow["args"] if arg.partition("=")[0] not in {flag.partition("=")[0] for flag in here}]
    uri = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    command = [sys.executable, "-m", *mlflow["command"], *kept, *here]
    with server("MLflow", command, folder, environment, answers):
        yield uri
    assert PASSWORD not in (folder / "server.log").read_text()


def test_a_run_its_metrics_and_its_model(tracking_uri: str, database: str) -> None:
    tracker = Tracker(tracking_uri, "postgres")
    tracker.check()
    parent = tracker.start_pipeline_run("a run", "run-1", {"ppo.steps": "3"})
    with tracker.stage(parent, "ppo_lagrangian", 1) as stage:
        for step in range(200):
            stage.log_metrics({"lagrangian/lambda": 1.0 + step / 100, "cost/mean": -1.0 / (step + 1)}, step)
    version = tracker.register_model("policy", "s3://bucket/policy/model", parent, {"round": "1"})
    tracker.set_alias("policy", "champion", version)
    assert Tracker(tracking_uri, "postgres").aliases("policy") == {"champion": version}
    with closing(psycopg.connect(database.replace("+psycopg", ""))) as connection:
        rows = connection.execute("SELECT step, value FROM metrics WHERE key = 'lagrangian/lambda' ORDER BY step")
        assert rows.fetchall() == [(step, pytest.approx(1.0 + step / 100)) for step in range(200)]
        (source,) = connection.execute("SELECT source FROM model_versions").fetchone() or ("",)
        assert source == "s3://bucket/policy/model"


@pytest.mark.fault
def test_row_15_of_two_processes_that_race_on_postgres_the_better_policy_is_champion_each_time(
    tracking_uri: str, store: CheckpointStore, tmp_path: Path
) -> None:
    """Two server processes and row locks, where SQLite has one writer."""
    context = context_of(store.root_uri, tracking_uri, tmp_path / "cache")
    assert race(context, tracking_uri, tmp_path, racers=2, times=20, seed=0) == 20
