"""Servers for the integration tests: one S3 and one MLflow server per test process, a Kubernetes API per test."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from components.foundation.checkpoint_store import CheckpointStore
from pipelines.services import Endpoints, local_services
from tests.integration.kubernetes_server import KubernetesServer
from tests.integration.s3_identities import BUCKET, write_identities
from tests.integration.train_jobs import Run


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """Endpoints of running servers; their addresses and keys are in the environment until the end of the tests."""
    work_dir = tmp_path_factory.mktemp("servers")
    write_identities(work_dir)
    with local_services(work_dir) as endpoints, pytest.MonkeyPatch.context() as patch:
        for name, value in endpoints.environment.items():
            patch.setenv(name, value)
        yield endpoints


@pytest.fixture(scope="session")
def s3(services: Endpoints) -> Any:
    """A plain boto3 client, to look at and to damage what is stored."""
    client = boto3.client("s3", endpoint_url=services.s3_url)
    CheckpointStore(f"s3://{BUCKET}").ensure_bucket()
    return client


@pytest.fixture
def store(s3: Any, tmp_path: Path) -> CheckpointStore:
    """A store with a prefix and a cache of its own."""
    return CheckpointStore(f"s3://{BUCKET}/{uuid.uuid4().hex}", cache_dir=tmp_path / "cache")


@pytest.fixture
def no_given_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that names no servers."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[KubernetesServer]:
    server = KubernetesServer()
    yield server
    server.stop()
    assert server.problems == []


@pytest.fixture
def run(server: KubernetesServer, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    caplog.set_level(logging.INFO, logger="saferlhf")
    run = Run(server)
    logging.getLogger().addHandler(run)  # after the one of caplog
    yield run
    logging.getLogger().removeHandler(run)
