from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from components.foundation.errors import TrackingError, TrackingUnavailableError
from components.foundation.tracking import StageRun, Tracker
from pipelines.local.services import Endpoints


@pytest.fixture
def tracker(services: Endpoints) -> Tracker:
    """A tracker with an experiment of its own."""
    return Tracker(services.tracking_uri, f"test-{uuid.uuid4().hex}")


@pytest.fixture
def client(services: Endpoints) -> MlflowClient:
    return MlflowClient(services.tracking_uri, services.tracking_uri)


@pytest.fixture
def parent_id(tracker: Tracker) -> str:
    return tracker.start_pipeline_run("run-1", "a pipeline run", {"seed": "1"})


@pytest.fixture
def stage(tracker: Tracker, parent_id: str) -> Iterator[StageRun]:
    with tracker.stage(parent_id, "ppo", 1) as run:
        yield run


def test_check_passes_and_makes_the_experiment(tracker: Tracker, client: MlflowClient) -> None:
    tracker.check()
    assert client.get_experiment_by_name(tracker._experiment) is not None


def test_an_unreachable_server_is_named_without_its_password() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(
            TrackingError, match=f"cannot reach MLflow at http://{address} to open experiment 'x'"
        ) as error:
            Tracker(f"http://user:hunter2@{address}", "x").check()
    assert "hunter2" not in str(error.value)


@pytest.mark.fault
def test_a_server_that_does_not_answer_is_away() -> None:
    """As behind a network policy, or on a node that died: what needs it may wait for it."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TrackingUnavailableError, match="cannot reach MLflow"):
            Tracker(f"http://127.0.0.1:{silent.getsockname()[1]}", "x").check()


def test_a_uri_that_is_no_server_is_refused() -> None:
    with pytest.raises(TrackingError, match="'nonsense://x' is no MLflow server"):
        Tracker("nonsense://x", "x").check()


def test_a_pipeline_run_is_found_again(tracker: Tracker, client: MlflowClient) -> None:
    params = {"seed": "1", "ppo.steps": "16"}
    first = tracker.start_pipeline_run("run-1", "name", params, {"profile": "tiny"})
    tracker.finish_pipeline_run(first, "FAILED")
    assert client.get_run(first).info.status == "FAILED"
    assert tracker.start_pipeline_run("run-1", "name", params) == first
    assert tracker.start_pipeline_run("run-2", "name", params) != first
    run = client.get_run(first)
    assert (run.info.status, run.info.run_name, run.data.params) == ("RUNNING", "name", params)
    assert run.data.tags["profile"] == "tiny"


def test_a_run_is_not_continued_with_other_settings(tracker: Tracker) -> None:
    tracker.start_pipeline_run("run-1", "name", {"seed": "1"})
    with pytest.raises(TrackingError, match="seed"):
        tracker.start_pipeline_run("run-1", "name", {"seed": "2"})


def test_a_stage_is_a_nested_run(tracker: Tracker, client: MlflowClient, parent_id: str) -> None:
    with tracker.stage(parent_id, "ppo", 2) as stage:
        assert client.get_run(stage.run_id).info.status == "RUNNING"
    run = client.get_run(stage.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "ppo (round 2)")
    tags = {key: run.data.tags[key] for key in ("mlflow.parentRunId", "saferlhf.run_id", "saferlhf.round")}
    assert tags == {"mlflow.parentRunId": parent_id, "saferlhf.run_id": "run-1", "saferlhf.round": "2"}


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_row_13_an_unfinished_stage_is_gone_on_with(
    tracker: Tracker, client: MlflowClient, parent_id: str, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), tracker.stage(parent_id, "ppo", 1) as first:
        first.log_metrics({"loss": 2.0}, step=1)
        raise error
    assert client.get_run(first.run_id).info.status == client.get_run(parent_id).info.status == status
    with tracker.stage(parent_id, "ppo", 1) as second:
        second.log_metrics({"loss": 1.0}, step=2)
    assert second.run_id == first.run_id
    assert steps(client, first.run_id, "loss") == {1: 2.0, 2: 1.0}
    with tracker.stage(parent_id, "ppo", 1) as third:
        assert third.run_id != first.run_id  # a finished run stays as it is


def test_a_stage_whose_work_is_done_has_no_run_of_its_own_and_ends_one_that_was_left_open(
    tracker: Tracker, client: MlflowClient, parent_id: str
) -> None:
    with pytest.raises(SystemExit), tracker.stage(parent_id, "ppo", 1) as first:
        raise SystemExit
    for _ in range(2):
        with tracker.stage(parent_id, "ppo", 1, is_done=True):
            assert tracker.end_of_pipeline_run(parent_id)[0] == "RUNNING"
        nested = f"tags.`mlflow.parentRunId` = '{parent_id}'"
        (run,) = client.search_runs([client.get_run(parent_id).info.experiment_id], nested)
        assert (run.info.run_id, run.info.status) == (first.run_id, "FINISHED")


def test_a_stage_lets_a_run_that_waited_or_had_ended_early_go_on(
    tracker: Tracker, client: MlflowClient, parent_id: str
) -> None:
    """So it is where a run goes on at that stage, without being started anew. A run that had finished stays so."""
    for status, ended, then in (
        ("SCHEDULED", "", ("RUNNING", "")),
        ("FINISHED", "nothing new", ("RUNNING", "")),
        ("FAILED", "", ("RUNNING", "")),
        ("KILLED", "", ("RUNNING", "")),
        ("FINISHED", "", ("FINISHED", "")),
    ):
        tracker.finish_pipeline_run(parent_id, status, ended)
        assert tracker.end_of_pipeline_run(parent_id) == (status, ended)
        with tracker.stage(parent_id, "ppo", 1):
            assert tracker.end_of_pipeline_run(parent_id) == then


def test_stages_rounds_and_pipeline_runs_are_kept_apart(tracker: Tracker, parent_id: str) -> None:
    other_parent = tracker.start_pipeline_run("run-2", "another", {})
    ids = set()
    for parent, stage, number in [
        (parent_id, "ppo", 1),
        (parent_id, "ppo", 2),
        (parent_id, "sft", 1),
        (other_parent, "ppo", 1),
    ]:
        with pytest.raises(ValueError), tracker.stage(parent, stage, number) as run:
            raise ValueError
        ids.add(run.run_id)
    assert len(ids) == 4


def test_many_long_parameters(stage: StageRun, client: MlflowClient) -> None:
    params = {f"p{number}": "é" * 6001 if number == 0 else str(number) for number in range(230)}
    stage.log_params(params)
    logged = client.get_run(stage.run_id).data.params
    assert len(logged) == 230
    assert logged["p0"] == "é" * 6000
    assert logged["p229"] == "229"


def test_row_33_secrets_are_masked(stage: StageRun, client: MlflowClient) -> None:
    stage.log_params(
        {
            "annotate.api_key": "hunter2",
            "db.password": "hunter2",
            "hub_token": "hunter2",
            "data.url": "https://user:hunter2@example.org/data",
            "ppo.max_new_tokens": "40",
            "annotate.judge_key_env": "SAFERLHF_JUDGE_KEY",
        }
    )
    stage.log_dataset("prompts", "0" * 64, "https://user:hunter2@example.org/data", rows=3)
    run = client.get_run(stage.run_id)
    assert "hunter2" not in json.dumps(run.to_dictionary(), default=str)
    assert run.data.params["data.url"] == "https://example.org/data"
    assert run.data.params["ppo.max_new_tokens"] == "40"
    assert run.data.params["annotate.judge_key_env"] == "SAFERLHF_JUDGE_KEY"


def test_more_metrics_than_a_batch_holds(stage: StageRun, client: MlflowClient) -> None:
    for step in range(3):
        stage.log_metrics({f"m{number}": float(number + step) for number in range(900)}, step)
    stage.flush()
    assert len(client.get_run(stage.run_id).data.metrics) >= 900
    assert steps(client, stage.run_id, "m899") == {0: 899.0, 1: 900.0, 2: 901.0}


def test_metrics_wait_for_a_server_that_is_away(
    stage: StageRun, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise MlflowException("the server is away")

    stage.log_metrics({"loss": 3.0}, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", away)
        patch.setattr(time, "monotonic", lambda: float("inf"))  # every batch is due
        stage.log_metrics({"loss": 2.0}, step=2)
    stage.flush()
    assert steps(client, stage.run_id, "loss") == {1: 3.0, 2: 2.0}


def test_an_error_of_the_stage_is_not_hidden_by_one_of_the_server(
    tracker: Tracker, parent_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise MlflowException("the server is away")

    with pytest.raises(ZeroDivisionError), tracker.stage(parent_id, "ppo", 1):
        monkeypatch.setattr(MlflowClient, "set_terminated", away)
        raise ZeroDivisionError
    with pytest.raises(TrackingError, match="away"), tracker.stage(parent_id, "ppo", 1):
        pass


def test_data_sets_and_texts(stage: StageRun, client: MlflowClient) -> None:
    stage.log_dataset("preferences", "ab" * 32, "s3://bucket/preferences.parquet", rows=12)
    stage.log_dataset("preferences", "ab" * 32, "s3://bucket/preferences.parquet", rows=12)
    inputs = run_of(client, stage).inputs
    assert inputs is not None
    (entry,) = inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("preferences", ("ab" * 32)[:36])
    assert json.loads(entry.dataset.source) == {"uri": "s3://bucket/preferences.parquet"}
    assert json.loads(entry.dataset.profile or "") == {"num_rows": 12, "digest": "ab" * 32}
    stage.log_text("résumé\n", "reports/summary.md")
    assert [file.path for file in client.list_artifacts(stage.run_id, "reports")] == ["reports/summary.md"]


def test_system_metrics_are_sampled_quietly(
    tracker: Tracker,
    client: MlflowClient,
    parent_id: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    deadline = time.monotonic() + 20
    with tracker.stage(parent_id, "ppo", 1) as stage:
        while not any(key.startswith("system/") for key in run_of(client, stage).data.metrics):
            assert time.monotonic() < deadline
    assert capfd.readouterr() == ("", "")


def test_a_model_is_registered_once_and_by_reference(tracker: Tracker, client: MlflowClient, stage: StageRun) -> None:
    name = f"policy-{uuid.uuid4().hex}"
    uri = "s3://saferlhf/runs/1/ppo/step-9"
    version = tracker.register_model(name, uri, stage.run_id, {"unsafe_rate": "0.1", "hub_token": "hunter2"})
    assert tracker.register_model(name, uri, stage.run_id, {"unsafe_rate": "0.1"}) == version
    other = tracker.register_model(name, f"{uri}0", stage.run_id, {})
    assert other != version
    stored = client.get_model_version(name, version)
    assert (stored.source, stored.run_id) == (uri, stage.run_id)
    assert "hunter2" not in str(stored.tags)


def test_aliases(tracker: Tracker, stage: StageRun) -> None:
    name = f"policy-{uuid.uuid4().hex}"
    assert tracker.version_of_alias(name, "champion") is None
    first = tracker.register_model(name, "s3://saferlhf/1", stage.run_id, {"round": "1"})
    second = tracker.register_model(name, "s3://saferlhf/2", stage.run_id, {"round": "2"})
    assert tracker.version_of_alias(name, "champion") is None
    for version, number in [(first, "1"), (second, "2"), (first, "1")]:
        tracker.set_alias(name, "champion", version)
        assert tracker.version_of_alias(name, "champion") == (version, {"round": number})
    with pytest.raises(TrackingError, match="set alias champion"):
        tracker.set_alias(name, "champion", "99")


def test_a_name_that_would_break_a_search_is_refused(tracker: Tracker) -> None:
    with pytest.raises(TrackingError, match="without '"):
        tracker.start_pipeline_run("x' or 'a' = 'a", "name", {})


def run_of(client: MlflowClient, stage: StageRun) -> Run:
    return client.get_run(stage.run_id)


def steps(client: MlflowClient, run_id: str, metric: str) -> dict[int, float]:
    return {point.step: point.value for point in client.get_metric_history(run_id, metric)}
