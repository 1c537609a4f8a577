"""The first step on a cluster: nobody says where the run goes, or how it is called."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from kubernetes.client import Configuration

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ClusterError, SettingsError
from components.foundation.run_context import open_run
from components.foundation.train_job.kubernetes_api import Cluster, new_client
from components.prepare_data.component import start_run
from pipelines.local.services import Endpoints
from tests.access_reviews import reviewer


def start(**given: Any) -> str:
    arguments = {
        "run_uri": "",
        "run_id": "",
        "kfp_run_id": str(uuid.uuid4()),
        "profile": "tiny",
        "seed": 0,
        "overrides": "[]",
        "rounds": 1,
        "pool_node_selector": {},
        "pool_tolerations": [],
    }
    uri: str = start_run.python_func(**arguments | given)
    return uri


@pytest.fixture
def platform_store(services: Endpoints, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store's URI as the platform's ConfigMap gives it."""
    uri = f"s3://saferlhf-test/{uuid.uuid4().hex}"
    monkeypatch.setenv("SAFERLHF_STORE_URI", uri)
    return uri


def test_a_run_is_named_after_kubeflows_and_lies_in_the_platforms_store(platform_store: str) -> None:
    kfp_run_id = str(uuid.uuid4())
    uri = start(kfp_run_id=kfp_run_id)
    assert uri == f"{platform_store}/runs/{kfp_run_id}"
    context = open_run(uri)
    assert (context.run_id, context.settings.store.uri) == (kfp_run_id, platform_store)


def test_what_is_given_counts_more(platform_store: str) -> None:
    other = f"s3://saferlhf-test/{uuid.uuid4().hex}"
    there = f'["store.uri={other}"]'
    assert start(run_id="mine", overrides=there) == f"{other}/runs/mine"
    assert start(run_uri=f"{other}/runs/here", run_id="here", overrides=there) == f"{other}/runs/here"
    uri = start(run_uri=f"{other}/runs/named-by-its-place")
    assert open_run(uri).run_id == "named-by-its-place"  # the registry finds a run by its id


@pytest.mark.fault
def test_a_place_and_an_id_of_two_runs_are_refused(platform_store: str) -> None:
    with pytest.raises(SettingsError, match="is of another run than run_id=there"):
        start(run_uri=f"{platform_store}/runs/here", run_id="there")


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("annotate.annotator", "human", "human"),
        ("base_model", "tiny-gpt2", "tiny-gpt2"),
        ("data.preferences", 's3://mine/new = old, "x".jsonl', 's3://mine/new = old, "x".jsonl'),
        ("ppo.kl_coefficient", "2e-1", "0.2"),
        ("ppo.steps", " 3 ", "3"),
        ("ppo.threshold_target", "0.3", "0.3"),
    ],
)
def test_a_field_of_the_form_counts_more_than_the_list(
    platform_store: str, setting: str, text: str, value: str
) -> None:
    in_list = json.dumps(["ppo.steps=7", "base_model=tiny-qwen2"])
    settings = open_run(start(overrides=in_list, **{setting.replace(".", "_"): text})).settings.flat()
    assert settings[setting] == value
    others = {"ppo.steps": "7", "base_model": "tiny-qwen2"} | {setting: value}
    assert {key: settings[key] for key in others} == others


@pytest.mark.fault
def test_a_run_that_is_to_deploy_and_cannot_is_refused_before_anything_is_written(
    platform_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterError, match=r"serving\.apply, need a pod with a service account"):
        start(run_id="elsewhere", overrides=json.dumps(["serving.apply=true"]))
    assert not CheckpointStore(platform_store).has_text(f"{platform_store}/runs/elsewhere/run.json")


@pytest.mark.fault
def test_a_run_that_may_not_deploy_is_refused_with_what_it_lacks(
    platform_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {"patch"}
    with reviewer(lambda right: right["verb"] not in refused) as (url, asked):
        cluster = Cluster(new_client(Configuration(host=url)), "team", "start-run", "a-uid")
        monkeypatch.setattr("components.foundation.train_job.kubernetes_api.in_cluster", lambda: cluster)
        to_deploy = {"run_id": "deploys", "overrides": json.dumps(["serving.apply=true"])}
        words = "in namespace team this account may not patch inferenceservices.serving.kserve.io: install the chart"
        with pytest.raises(ClusterError, match=words):
            start(**to_deploy)
        assert not CheckpointStore(platform_store).has_text(f"{platform_store}/runs/deploys/run.json")
        refused.clear()
        assert open_run(start(**to_deploy)).settings.serving.apply
    assert {(right["verb"], right["resource"]) for right in asked} == {
        ("create", "inferenceservices"),
        ("patch", "inferenceservices"),
    }


@pytest.mark.fault
def test_row_31_a_pool_that_no_node_can_match_is_refused_before_anything_is_written(platform_store: str) -> None:
    with pytest.raises(SettingsError, match="pool_node_selector: gpu=True is refused"):
        start(run_id="refused", pool_node_selector={"gpu": True})
    assert not CheckpointStore(platform_store).has_text(f"{platform_store}/runs/refused/run.json")
    assert start(run_id="refused", pool_node_selector={"gpu": "true"}) == f"{platform_store}/runs/refused"
