"""PPO while S3, MLflow or both are away: it goes on, and nothing is missing afterwards.

In the suite a server comes back once it was asked for three times in vain; `make outage` lets a minute pass.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components.foundation.run_context import open_run, open_stage
from components.foundation.tracking import STAGE_TAG
from pipelines.local.services import Endpoints
from tests.faults.gate_to_server import GateToServer, gate_to_server
from tests.stage_attempts import TrainingRun

pytestmark = [pytest.mark.fault, pytest.mark.xdist_group("resume")]

SECONDS = float(os.environ.get("SAFERLHF_OUTAGE_SECONDS", "0"))
STEPS = 12 + round(3 * SECONDS)
STAGE = "ppo_lagrangian"
_PATIENCE = 600.0


@pytest.fixture(scope="module")
def run(services: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRun]:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_CACHE", str(cache))
        run = TrainingRun({**services.environment, "SAFERLHF_CACHE": str(cache)}, f"ppo.steps={STEPS}")
        run.bring_to(STAGE)
        yield run


@pytest.fixture(scope="module")
def in_peace(run: TrainingRun) -> dict[str, str]:
    """Digests of what the stage commits when nobody is away."""
    assert run.attempt(STAGE) == 0
    return run.digests(STAGE)


@pytest.mark.parametrize("away", [("S3",), ("MLflow",), ("S3", "MLflow")], ids="-".join)
def test_row_34_ppo_goes_on_while_a_server_is_away_and_nothing_is_missing(
    run: TrainingRun, in_peace: dict[str, str], services: Endpoints, away: tuple[str, ...]
) -> None:
    run.forget(STAGE)
    variables = {"S3": "AWS_ENDPOINT_URL", "MLflow": "MLFLOW_TRACKING_URI"}
    codes: list[int | None] = []
    with ExitStack() as stack:
        gates = {name: stack.enter_context(gate_to_server(services.environment[variables[name]])) for name in away}
        environment = {variables[name]: gate.url for name, gate in gates.items()}
        stage = threading.Thread(target=lambda: codes.append(run.attempt(STAGE, environment=environment)))
        stage.start()
        while not any(re.match(r"step-([2-9]|\d\d)", name) for name in run.checkpoints(STAGE)):
            stage.join(0.02)
            assert stage.is_alive()
        for gate in gates.values():
            gate.shut()
        for gate in gates.values():
            gate.wait_until_asked_in_vain(3, _PATIENCE)
        stage.join(SECONDS)
        for gate in gates.values():
            gate.open()
        stage.join(_PATIENCE)
    assert codes == [0]
    assert run.digests(STAGE) == in_peace
    assert run.checkpoints(STAGE) == []
    assert newest_steps(run, services, "lagrangian/lambda") == list(range(1, STEPS + 1))


def test_row_34_what_a_stage_has_made_waits_for_servers_that_are_away_at_its_end(
    run: TrainingRun, services: Endpoints, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_text("the work of hours")
    with (
        gate_to_server(services.environment["AWS_ENDPOINT_URL"]) as store,
        gate_to_server(services.environment["MLFLOW_TRACKING_URI"]) as tracking,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", store.url)
        patch.setenv("MLFLOW_TRACKING_URI", tracking.url)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        with open_stage(run.uri, "handed_over", 1) as stage:
            stage.report({"last": 7.0}, step=3)
            open_when_asked(store, 6)
            uri = stage.commit(tmp_path, step=3, parents=[])
            opens = open_when_asked(tracking, 5)
        opens.join()
        assert (stage.context.store.fetch(uri) / "weights").read_text() == "the work of hours"
    assert newest_steps(run, services, "last", "handed_over") == [3]


def open_when_asked(gate: GateToServer, times: int) -> threading.Thread:
    """Shut the gate until so many have asked in vain: more often than a client tries by itself."""
    gate.shut()

    def wait_and_open() -> None:
        gate.wait_until_asked_in_vain(times, _PATIENCE)
        gate.open()

    opens = threading.Thread(target=wait_and_open)
    opens.start()
    return opens


def newest_steps(run: TrainingRun, services: Endpoints, metric: str, stage: str = STAGE) -> list[int]:
    """Steps of a metric in MLflow's newest run of a stage, which has ended well."""
    client = MlflowClient(services.tracking_uri)
    parent = open_run(run.uri).mlflow_run_id
    condition = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`{STAGE_TAG}` = '{stage}'"
    newest = client.search_runs([client.get_run(parent).info.experiment_id], condition)[0]
    assert newest.info.status == "FINISHED"
    return [point.step for point in client.get_metric_history(newest.info.run_id, metric)]
