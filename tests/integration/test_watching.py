"""A training stage that is watched: its log as JSON, its metrics over HTTP while it runs."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
import uuid
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from components.foundation.backbone import Backbone
from components.foundation.base_model import resolve_base_model
from components.foundation.errors import TrainingError
from components.foundation.role_optimizer import make_optimizers
from components.foundation.run_context import create_run, open_stage
from components.foundation.settings import resolve_settings
from components.foundation.training_checkpoints import TrainingCheckpoints
from components.notify.notify import Notification, gather
from pipelines.local.services import Endpoints


@pytest.fixture
def run_uri(services: Endpoints) -> str:
    store = f"s3://saferlhf-test/{uuid.uuid4().hex}"
    settings = resolve_settings("tiny", 0, [f"store.uri={store}", "checkpoint.every_steps=2"])
    return create_run(f"{store}/runs/watched", f"watched-{uuid.uuid4().hex[:8]}", settings).run_uri


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    monkeypatch.setenv("SAFERLHF_METRICS_PORT", str(number))
    return number


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    assert {(s.labels["stage"], s.labels["round"], s.labels["rank"]) for s in samples} == {("sft", "1", "0")}
    return {sample.name: sample.value for sample in samples}


def test_metrics_tell_the_step_and_when_a_checkpoint_was_saved(run_uri: str, port: int) -> None:
    begun = time.time()
    with open_stage(run_uri, "sft", 1) as stage:
        backbone = Backbone.load(resolve_base_model("tiny", stage.context.store), "float32", seed=0)
        backbone.add_role("sft", stage.context.settings.lora, scored=False)
        with TrainingCheckpoints(stage, backbone, []) as checkpoints:
            checkpoints.restore(make_optimizers(backbone, {"sft": 1e-3}))
            for step, saved in ((1, False), (2, True), (3, True)):
                stage.report({"sft/loss": 4.0 - step}, step)
                checkpoints.after_step(step, 9)
                found = scrape(port)
                assert (found["saferlhf_step"], found["saferlhf_sft_loss"]) == (step, 4.0 - step)
                assert ("saferlhf_checkpoint_timestamp_seconds" in found) == saved
    started, checkpoint = (found[f"saferlhf_{what}_timestamp_seconds"] for what in ("training_start", "checkpoint"))
    assert begun <= started <= checkpoint <= time.time()


@pytest.mark.fault
def test_a_stage_that_fails_says_so_in_one_event(
    run_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAFERLHF_LOG_FORMAT", "json")
    with pytest.raises(TrainingError), open_stage(run_uri, "cost_model", 2) as stage:
        stage.report({"cost_model/loss": 1.0}, 7)
        raise TrainingError("it went\nwrong")
    events: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["message"] for event in events] == ["round 2 cost_model: started", "round 2 cost_model: failed"]
    place = {"run": stage.context.run_id, "round": 2, "stage": "cost_model", "step": 7, "rank": 0, "level": "ERROR"}
    assert place.items() <= events[1].items()
    assert events[1]["exception"].endswith("TrainingError: it went\nwrong")
    assert "step" not in events[0]


@pytest.mark.fault
def test_a_notification_tells_what_a_run_got_to(run_uri: str) -> None:
    """A run that failed at once, and one that was never started."""
    told = gather(run_uri, "watched", "failed")
    assert (told.decision, told.round, told.unsafe_rate, told.win_rate) == (None, None, None, None)
    assert told.links.keys() == {"store", "mlflow"}
    absent = gather(f"{run_uri}-absent", "absent", "failed")
    assert absent == Notification("absent", "failed", links={"store": f"{run_uri}-absent"})
