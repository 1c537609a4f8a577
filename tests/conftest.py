"""Servers for all tests that need them: one S3 and one MLflow server per test process.

Counts what ran, too: a suite that silently skipped its end-to-end tests would otherwise look green.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import settings

from components.foundation.checkpoint_store import CheckpointStore
from pipelines.local.services import Endpoints, local_services
from tests.s3_identities import BUCKET, write_identities

# the tests' servers are on this machine, whatever proxy its owner has
_given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [_given, "127.0.0.1,localhost"]))

KINDS = ("golden", "end_to_end", "fault", "containers")

# whether a test passes must depend neither on chance nor on how busy the machine is; `make fuzz` searches on
settings.register_profile("same each time", derandomize=True, deadline=None, database=None)
settings.load_profile("same each time")


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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--at-least",
        action="append",
        default=[],
        metavar="KIND=COUNT",
        help=f"fail unless so many tests of a kind passed ({', '.join(KINDS)})",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`, pytest-xdist appends the group to a test's id; where it cannot, groups fall apart."""
    grouped = [item.nodeid for item in items if item.get_closest_marker("xdist_group")]
    if getattr(config.option, "loadgroup", False) and not all("@" in nodeid for nodeid in grouped):
        raise pytest.UsageError(f"this pytest-xdist does not keep the xdist_group of {grouped[0]} in one process")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = _passed(terminalreporter)
    terminalreporter.write_line("passed by kind: " + ", ".join(f"{kind} {count}" for kind, count in counts.items()))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    counts = _passed(reporter)
    for wish in session.config.getoption("at_least"):
        kind, _, least = wish.partition("=")
        if counts[kind] < int(least):
            reporter.write_line(f"only {counts[kind]} tests marked {kind} passed, expected at least {least}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _passed(reporter: pytest.TerminalReporter) -> dict[str, int]:
    reports = reporter.stats.get("passed", [])
    return {kind: sum(kind in report.keywords for report in reports) for kind in KINDS}
