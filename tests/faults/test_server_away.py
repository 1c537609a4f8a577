"""PPO while S3, MLflow or both are away: it goes on, and nothing is missing afterwards.

In the suite a server comes back once it was asked for three times in vain; `make outage` lets a minute pass.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from mlflow import MlflowClient

from components.foundation.run_context import open_run
from components.foundation.tracking import STAGE_TAG
from pipelines.services import Endpoints
from tests.faults.gate_to_server import gate_to_server
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


def newest_steps(run: TrainingRun, services: Endpoints, metric: str) -> list[int]:
    """Steps of a metric in MLflow's newest run of the stage, which has ended well."""
    client = MlflowClient(services.tracking_uri)
    parent = open_run(run.uri).mlflow_run_id
    condition = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`{STAGE_TAG}` = '{STAGE}'"
    newest = client.search_runs([client.get_run(parent).info.experiment_id], condition)[0]
    assert newest.info.status == "FINISHED"
    return [point.step for point in client.get_metric_history(newest.info.run_id, metric)]
