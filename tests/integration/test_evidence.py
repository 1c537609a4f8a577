"""The programs behind `make evidence`, on a run of profile tiny."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from xml.etree import ElementTree

import pytest

from components.cost_model.cost_model import run_cost_model
from components.evaluate.evaluate import EvaluationInputs, run_evaluate
from components.foundation.checkpoint_store import Manifest
from components.foundation.results import PpoTrace, read_record
from components.foundation.run_context import finished_uri, open_run
from components.ppo_lagrangian.ppo_lagrangian import PpoInputs, run_ppo_lagrangian
from components.prepare_data.prepare_data import run_prepare_data
from components.prepare_data.start_run import run_start_run
from components.reward_model.reward_model import run_reward_model
from components.sft.sft import run_sft
from pipelines.local.services import Endpoints
from tests.benchmarks.fixed_nu_policies import compare, picture, table

pytestmark = pytest.mark.xdist_group("evidence")


@pytest.fixture
def finished_round(services: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a run whose first round is done, but for the collected answers."""
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "cache"))
    run_id = uuid.uuid4().hex
    root = f"s3://saferlhf-test/{run_id}"
    run = run_start_run(f"{root}/runs/{run_id}", run_id, "tiny", 0, json.dumps([f"store.uri={root}"]), 2)
    data = run_prepare_data(run)
    sft = run_sft(run, data)
    baseline = run_evaluate(run, 0, EvaluationInputs(data, sft, sft))
    models = (run_reward_model(run, 1, sft, data), run_cost_model(run, 1, sft, data))
    policy = run_ppo_lagrangian(run, 1, PpoInputs(data, sft, sft, *models))
    run_evaluate(run, 1, EvaluationInputs(data, sft, policy, *models, baseline))
    return run


def test_fixed_weights_are_compared_with_the_run_s_own_policy(finished_round: str) -> None:
    """Each weight is a run of its own, trained with that weight; a second comparison trains nothing."""
    store = open_run(finished_round).store
    compared = compare(finished_round, [0.5, 10.0])
    assert [policy.label for policy in compared] == ["nu 0.5", "nu 10", "multiplier"]

    def trained(suffix: str) -> tuple[Manifest, PpoTrace]:
        uri = finished_uri(open_run(f"{finished_round}-nu-{suffix}"), "ppo_lagrangian", 1)
        return store.manifest(uri), read_record(PpoTrace, store.fetch(uri) / "trace.json")

    before = {suffix: trained(suffix) for suffix in ("0-5", "10")}
    for suffix, weight in (("0-5", 0.5), ("10", 10.0)):
        assert before[suffix][1].multiplier == pytest.approx([weight, weight])
    assert compare(finished_round, [0.5, 10.0]) == compared
    assert {suffix: trained(suffix) for suffix in ("0-5", "10")} == before
    assert [row.split(" | ")[0] for row in table(compared).splitlines()[2:]] == ["| nu 0.5", "| nu 10", "| multiplier"]
    assert len(ElementTree.fromstring(picture(compared)).findall("{http://www.w3.org/2000/svg}circle")) == 3
