"""The PPO stage on comparisons alone: from data and the SFT model, with no reward model and no cost model at all."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from components.foundation.results import PpoTrace, read_record
from components.foundation.run_context import open_run
from components.ppo_lagrangian.ppo_lagrangian import PpoInputs, run_ppo_lagrangian
from components.prepare_data.prepare_data import run_prepare_data
from components.prepare_data.start_run import run_start_run
from components.sft.sft import run_sft
from pipelines.local.services import Endpoints

pytestmark = pytest.mark.xdist_group("resume")


def test_the_stage_needs_no_models_and_limits_the_share_of_unsafe_answers(
    services: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SFT model stands in the place of both models: it could be read as neither."""
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path))
    root = f"s3://saferlhf-test/{uuid.uuid4().hex}"
    settings = [
        f"store.uri={root}",
        "ppo.advantage_source=preference_oracle",
        "ppo.threshold_target=0.25",
        "ppo.lambda_init=0.05",
        "ppo.lambda_learning_rate=0.3",
    ]
    run = run_start_run(f"{root}/runs/one", "one", "tiny", 0, json.dumps(settings), 1)
    data = run_prepare_data(run)
    sft = run_sft(run, data)
    policy = run_ppo_lagrangian(run, 1, PpoInputs(data, sft, sft, sft, sft))
    store = open_run(run).store
    trace = read_record(PpoTrace, store.fetch(policy) / "trace.json")
    assert trace.threshold == pytest.approx(0.25)
    assert len(trace.cost) == 2
    expected, costs = 0.05, list[float]()
    for cost, multiplier in zip(trace.cost, trace.multiplier, strict=True):
        assert cost * 8 == pytest.approx(round(cost * 8))  # eight answers a step, each safe or not
        costs.append(cost)
        expected = min(max(expected + 0.3 * (sum(costs) / len(costs) - 0.25), 0.0), 20.0)
        assert multiplier == pytest.approx(expected)
    card = (store.fetch(policy) / "model" / "README.md").read_text(encoding="utf-8")
    assert "an annotator's comparisons" in card and "no fitted models to measure" in card
    (digest,) = (file.sha256 for file in store.manifest(data).files if file.path == "prompts.jsonl")
    assert f"| `prompts.jsonl` | `{digest}` |" in card
