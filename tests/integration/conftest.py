"""A Kubernetes API per test; S3 and MLflow are in the conftest above."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from tests.integration.kubernetes_server import KubernetesServer
from tests.integration.train_jobs import Run


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
