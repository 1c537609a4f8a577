"""Where a stage runs: on ranks that torchrun starts here, or on the nodes of a TrainJob, as the platform says."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.foundation import launch as launching
from components.foundation import train_job
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import JobFailedError, SettingsError, StoreError
from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.launch import launch, stage_and_round
from components.foundation.results import to_json
from components.foundation.run_context import RunDescription
from components.foundation.settings import resolve_settings
from components.foundation.train_job import train_job_command
from components.prepare_data.start_run import run_start_run
from pipelines.cluster.executors import steps_of
from pipelines.cluster.platform_file import read_platform
from pipelines.safe_rlhf import build_pipeline
from tests.integration.kubernetes_server import KubernetesServer
from tests.integration.train_jobs import cluster, completes, ended, fails

SFT = "components.sft.sft:run_sft"
REWARD = "components.reward_model.reward_model:run_reward_model"
PPO = "components.ppo_lagrangian.ppo_lagrangian:run_from_uris"
GKE = Path(__file__).parents[2] / "pipelines" / "platforms" / "gke.yaml"


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Stage -> what a platform with two nodes of 8 GPUs for all training but PPO, with 4 GPUs, puts into its pod."""
    tree = yaml.safe_load(GKE.read_text())
    tree["pools"]["train"] |= {"nodes": 2, "accelerator": {"count": 8}, "capacity": "on_demand"}
    tree["pools"]["ppo"]["accelerator"]["count"] = 4
    tree["form_pool"] = "ppo"
    file = tmp_path_factory.mktemp("platform") / "two_nodes.yaml"
    file.write_text(yaml.safe_dump(tree))
    with ThreadPoolExecutor(1) as stack:  # KFP reads the source of the whole stack at each setting
        pipeline = stack.submit(build_pipeline, 1, read_platform(str(file))).result()
    return {
        step.stage: {variable.name: variable.value for variable in step.container.env}
        for step in steps_of(pipeline.pipeline_spec, pipeline.platform_spec)
    }


@pytest.fixture
def pod(
    server: KubernetesServer, environments: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Makes this process the pod of a stage on that platform."""
    monkeypatch.setattr(train_job, "in_cluster", lambda: cluster(server))

    def become(stage: str) -> None:
        for name, value in environments[stage].items():
            monkeypatch.setenv(name, value)

    return become


@pytest.fixture
def run_uri(store: CheckpointStore) -> str:
    """A run that has started, with `distributed.processes=1`."""
    settings = resolve_settings("tiny", 0, [f"store.uri={store.root_uri}"])
    uri = f"{store.root_uri}/runs/r1"
    store.write_text(f"{uri}/run.json", to_json(RunDescription("r1", "", settings.model_dump_json())))
    return uri


class Ranks:
    """The nodes of a TrainJob, which commit what the stage makes."""

    def __init__(self, store: CheckpointStore, stage_uri: str, folder: Path) -> None:
        (folder / "result").write_text("weights")
        self.store, self.stage_uri, self.folder = store, stage_uri, folder

    def __call__(self, server: KubernetesServer, job: dict[str, Any]) -> None:
        uri = f"{self.stage_uri}/step-6"
        self.store.commit(uri, self.folder, parents=[], labels={}, settings_digest="")
        self.store.set_latest(self.stage_uri, uri)
        completes(server, job)


def test_a_stage_on_two_nodes_is_a_train_job_and_what_it_committed(
    server: KubernetesServer, pod: Callable[[str], None], store: CheckpointStore, run_uri: str, tmp_path: Path
) -> None:
    server.controller = Ranks(store, f"{run_uri}/round-2/reward_model", tmp_path)
    pod("reward_model")
    arguments = (run_uri, 2, "s3://sft", "s3://preferences")
    assert launch(REWARD, *arguments) == f"{run_uri}/round-2/reward_model/step-6"
    (job,) = server.created
    assert job["metadata"]["name"].startswith("saferlhf-reward-model-r2-r1-")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "saferlhf"
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["image"] == yaml.safe_load(GKE.read_text())["images"]["trainer"]
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "8", "memory": "96Gi", "nvidia.com/gpu": "8"},
        "limits": {"cpu": "12", "memory": "128Gi", "nvidia.com/gpu": "8"},
    }
    assert trainer["command"][-3:] == ["components.foundation.launch", REWARD, json.dumps(arguments)]
    names = [variable["name"] for variable in trainer["env"]]
    assert {"SAFERLHF_STORE_URI", "MLFLOW_TRACKING_URI", "AWS_ACCESS_KEY_ID"} <= set(names)
    assert not {"SAFERLHF_TRAIN_JOB", "SAFERLHF_PROCESSES"} & set(names)  # or the ranks would launch again
    (digest,) = [variable["value"] for variable in trainer["env"] if variable["name"] == "SAFERLHF_IMAGE_DIGEST"]
    assert digest == trainer["image"].partition("@")[2]


def test_row_10_a_stage_that_has_finished_does_not_queue_for_nodes_again(
    server: KubernetesServer, pod: Callable[[str], None], store: CheckpointStore, run_uri: str, tmp_path: Path
) -> None:
    server.controller = Ranks(store, f"{run_uri}/round-0/sft", tmp_path)
    pod("sft")
    first, again = (launch(SFT, run_uri, "s3://data") for _ in range(2))
    assert first == again == f"{run_uri}/round-0/sft/step-6"
    assert len(server.created) == 1


@pytest.mark.fault
def test_a_job_that_fails_or_commits_nothing_is_no_result(
    server: KubernetesServer, pod: Callable[[str], None], run_uri: str
) -> None:
    pod("sft")
    server.controller = lambda server, job: fails(server, job, (ended(1), ended(1)))
    with pytest.raises(JobFailedError, match="exit code 1"):
        launch(SFT, run_uri, "s3://data")
    server.controller = completes
    with pytest.raises(StoreError, match="holds no finished sft"):
        launch(SFT, run_uri, "s3://data")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "SAFERLHF_TRAIN_JOB='{' is no JSON object"),
        ("[1]", r"SAFERLHF_TRAIN_JOB='\[1\]' is no JSON object"),
        ('{"image": "i", "nodes": "two", "processes_per_node": 1, "resources": {}}', "nodes='two' is refused"),
        ('{"image": "i", "nodes": 2, "processes_per_node": 1}', "SAFERLHF_TRAIN_JOB: resources is missing"),
        ('{"image": "i", "nodes": 2, "processes_per_node": 1, "resources": {}, "gpus": 8}', "unknown field 'gpus'"),
    ],
)
def test_a_description_of_another_version_is_refused_by_field(
    run_uri: str, monkeypatch: pytest.MonkeyPatch, text: str, sentence: str
) -> None:
    monkeypatch.setenv("SAFERLHF_TRAIN_JOB", text)
    with pytest.raises(SettingsError, match=sentence):
        launch(SFT, run_uri, "s3://data")


def test_a_pool_decides_the_number_of_ranks(
    pod: Callable[[str], None], run_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun itself is in the way of a quick test: here something says what it was asked for."""

    def torchrun(processes: int, stage: str, arguments: Sequence[str | int], outcome: Path) -> int:
        outcome.write_text(json.dumps({"uri": f"{processes} ranks of {stage}"}))
        return 0

    monkeypatch.setattr(launching, "_run_torchrun", torchrun)
    monkeypatch.setenv("SAFERLHF_TRAIN_JOB", "")
    pod("ppo_lagrangian")
    assert launch("a:b", run_uri) == "4 ranks of a:b"
    monkeypatch.setattr(launching, "_run_torchrun", lambda *_: PREEMPTED_EXIT_CODE)
    with pytest.raises(SystemExit) as end:
        launch("a:b", run_uri)
    assert end.value.code == PREEMPTED_EXIT_CODE
    monkeypatch.setenv("SAFERLHF_PROCESSES", "1")
    assert launch("builtins:str", run_uri) == run_uri
    monkeypatch.setenv("SAFERLHF_PROCESSES", "none")
    with pytest.raises(SettingsError, match="SAFERLHF_PROCESSES='none' is no number of processes"):
        launch("a:b", run_uri)


@pytest.mark.fault
def test_two_nodes_of_one_process_are_two_ranks_whatever_the_settings_say(store: CheckpointStore) -> None:
    """As the runtime `torch-distributed` starts them; PPO then refuses by name what two ranks cannot do."""
    settings = [f"store.uri={store.root_uri}", "ppo.engine=vllm", "distributed.processes=1"]
    run = run_start_run(f"{store.root_uri}/runs/r1", "r1", "tiny", 0, json.dumps(settings), 1)
    _, *command = train_job_command(PPO, [run, 1, *["s3://none"] * 5])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    runtime = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
    }
    nodes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | runtime | {"PET_NODE_RANK": str(node)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    outputs = [node.communicate(timeout=180)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1]
    assert "SettingsError: ppo.engine=vllm serves one process" in "".join(outputs)


@pytest.mark.parametrize(
    ("stage", "arguments", "round_number"),
    [
        (SFT, ("s3://run", "s3://data"), 0),
        (REWARD, ("s3://run", 3, "s3://sft", "s3://preferences"), 3),
        ("components.cost_model.cost_model:run_cost_model", ("s3://run", 1, "s3://sft", "s3://preferences"), 1),
        (PPO, ("s3://run", 2, "s3://data"), 2),
    ],
)
def test_a_stage_is_looked_for_where_it_commits(
    stage: str, arguments: tuple[str | int, ...], round_number: int
) -> None:
    commits_as = importlib.import_module(stage.partition(":")[0]).STAGE
    assert stage_and_round(stage, arguments) == (commits_as, round_number)
