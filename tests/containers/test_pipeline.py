"""The pipeline of the profile `tiny`, every step in a container of its own image, against real servers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.results import PromotionResult, from_json
from components.foundation.run_context import finished_uri, open_run
from components.foundation.tracking import Tracker
from pipelines.local.summary import stage_seconds
from tests.containers.conftest import Images, Servers, needs_rollout
from tests.containers.pipeline_in_containers import StepContainers, StepFailedError, run_pipeline
from tests.containers.podman import FinishedContainer, Podman

pytestmark = pytest.mark.containers

STORE = "s3://saferlhf/pipeline"
ROUNDS = 1
BEFORE = ("start_run", "prepare_data"), ("sft", "evaluate")
ROUND = ("annotate",), ("collect", "reward_model", "cost_model", "ppo_lagrangian", "evaluate")
AFTER = ("register", "gate", "set_alias", "report")
OPEN_GATE = ["gate.max_unsafe_rate=1", "gate.min_win_rate=0", "gate.max_over_refusal_rate=1", "gate.max_wrong_share=1"]


def steps(servers: Servers, folder: Path, run_id: str, settings: list[str]) -> StepContainers:
    folder.mkdir()
    return StepContainers(
        network=servers.network,
        environment=servers.container_environment,
        label=run_id,
        pipeline_root=str(folder),
        rounds=ROUNDS,
        arguments={
            "run_uri": f"{STORE}/runs/{run_id}",
            "run_id": run_id,
            "run_profile": "tiny",
            "run_seed": 0,
            "run_set": json.dumps(settings),
        },
    )


def image_variables(images: Images) -> dict[str, str]:
    return {"SAFERLHF_SERVICE_IMAGE": images.service, "SAFERLHF_TRAINER_IMAGE": images.trainer}


@pytest.fixture(scope="module")
def done(
    podman: Podman, images: Images, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> list[FinishedContainer]:
    CheckpointStore(STORE).ensure_bucket()
    folder = tmp_path_factory.mktemp("kfp") / "root"
    return run_pipeline(podman, image_variables(images), steps(servers, folder, "in-containers", OPEN_GATE))


def test_every_step_ran_in_a_container_of_its_image(done: list[FinishedContainer], images: Images) -> None:
    used = [container.image for container in done]
    assert used.count(images.service) == len(BEFORE[0]) + ROUNDS * len(ROUND[0]) + len(AFTER)
    assert used.count(images.trainer) == len(BEFORE[1]) + ROUNDS * len(ROUND[1])
    assert len(used) == used.count(images.service) + used.count(images.trainer)
    assert [container.exit_code for container in done] == [0] * len(done)
    starts = sorted(container.started - container.created for container in done)
    print(
        f"{len(done)} containers in {done[-1].ended - done[0].created:.0f} s; from made to started "
        f"{starts[len(starts) // 2]:.2f} s (median), {starts[-1]:.2f} s (longest)"
    )


def test_every_stage_left_its_commit_in_the_store(done: list[FinishedContainer], images: Images) -> None:
    """By the code of the image: a manifest names the commit that the image was built from."""
    context = open_run(f"{STORE}/runs/in-containers")
    expected = {f"round-0/{stage}" for stage in ("prepare_data", "sft", "evaluate", "report")}
    expected |= {f"round-{number}/{stage}" for number in range(1, ROUNDS + 1) for group in ROUND for stage in group}
    seconds = stage_seconds(context)
    assert set(seconds) == expected
    for name in expected:
        number, _, stage = name.removeprefix("round-").partition("/")
        manifest = context.store.manifest(finished_uri(context, stage, int(number)))
        assert manifest.git_sha == images.revision
        assert context.store.fetch(manifest.uri).is_dir()  # checks every digest
    alive = sum(container.ended - container.started for container in done)
    print(f"steps: {alive:.0f} s alive, of which {sum(seconds.values()):.0f} s are the stages' own work")


def test_the_gate_promoted_the_registered_policy(done: list[FinishedContainer], servers: Servers) -> None:
    context = open_run(f"{STORE}/runs/in-containers")
    promotion = from_json(PromotionResult, context.store.read_text(f"{context.run_uri}/promotion.json"))
    assert (promotion.decision, promotion.alias) == ("promote", "champion")
    tracker = Tracker(servers.endpoints.tracking_uri, context.settings.experiment)
    champion = tracker.version_of_alias(promotion.model, "champion")
    assert champion is not None and champion[0] == promotion.version


@needs_rollout
def test_the_rollout_image_can_stand_in_for_the_trainer_s(
    podman: Podman, images: Images, servers: Servers, tmp_path: Path
) -> None:
    """In every step: a platform file may give it any of them. Its vLLM needs a GPU, so it is kept out of sight here."""
    CheckpointStore(STORE).ensure_bucket()
    servers = replace(servers, container_environment=servers.container_environment | {"SAFERLHF_VLLM_PYTHON": ""})
    variables = image_variables(images) | {"SAFERLHF_TRAINER_IMAGE": images.rollout}
    run_id = "in-rollout"
    done = run_pipeline(podman, variables, steps(servers, tmp_path / "root", run_id, OPEN_GATE))
    used = [container.image for container in done]
    assert used.count(images.rollout) == len(BEFORE[1]) + ROUNDS * len(ROUND[1])
    context = open_run(f"{STORE}/runs/{run_id}")
    for stage in (*ROUND[0], *ROUND[1]):
        manifest = context.store.manifest(finished_uri(context, stage, ROUNDS))
        assert manifest.git_sha == images.revision
        assert context.store.fetch(manifest.uri).is_dir()


def test_a_step_that_fails_in_its_container_fails_the_run(
    podman: Podman, images: Images, servers: Servers, tmp_path: Path
) -> None:
    refused = steps(servers, tmp_path / "root", "refused", ["ppo.clip_ratio=2"])
    with pytest.raises(StepFailedError, match=r"container 1, of \S+/service:test, ended with status [1-9]"):
        run_pipeline(podman, image_variables(images), refused)
    assert not CheckpointStore(STORE).has_text(f"{STORE}/runs/refused/run.json")


def test_the_doctor_of_the_service_image_reaches_both_servers(
    podman: Podman, images: Images, servers: Servers, done: list[FinishedContainer]
) -> None:
    """As the chart's Jobs run it."""
    environment = servers.container_environment | {"SAFERLHF_STORE_URI": STORE}
    options = [f"--env={name}={value}" for name, value in environment.items()]
    options += ["--read-only", "--tmpfs=/tmp", "--cap-drop=all", f"--network={servers.network}"]
    said = podman("run", "--rm", *options, images.service, "saferlhf", "doctor", "s3", "mlflow").stdout
    assert [line.split()[:2] for line in said.splitlines()] == [["s3:", "ok:"], ["mlflow:", "ok:"]]


def test_a_container_has_no_way_out_of_this_machine(podman: Podman, images: Images, servers: Servers) -> None:
    """No route leads beyond its own network."""
    script = "cut -f2 /proc/net/route"
    routes = podman("run", "--rm", f"--network={servers.network}", images.service, "sh", "-c", script).stdout.split()
    assert routes == ["Destination", "004D590A"]  # 10.89.77.0, in hexadecimal from its last byte
