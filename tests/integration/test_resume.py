"""A training stage that is killed, again and again, ends with the same bits as one that never was."""

from __future__ import annotations

import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import DivergenceError, RolloutError, TrainingError
from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.run_context import finished_uri, open_run, open_stage
from components.foundation.training_checkpoints import TrainingCheckpoints
from pipelines.services import Endpoints
from tests.misbehaving_vllm import fake_vllm

pytestmark = pytest.mark.xdist_group("resume")

STAGES = ("sft", "reward_model", "cost_model", "ppo_lagrangian")
MODULES = [f"components.{stage}.{stage}" for stage in STAGES]
SETTINGS = '["ppo.steps=4", "ppo.critics=head", "ppo.ptx_coefficient=0.5", "checkpoint.every_steps=1"]'

# Without threads there is nothing that a fork could break; the modules are imported once, for all attempts.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([*MODULES, "components.foundation.tracking", "mlflow", "peft"])


@dataclass(frozen=True)
class Death:
    """Where an attempt dies: at which step, at which point of the checkpoint, and of which signal."""

    step: int
    point: str
    number: int = signal.SIGKILL


DEATHS = (
    Death(1, "before the checkpoint"),
    Death(1, "in the middle of its files"),
    Death(1, "before its manifest"),
    Death(2, "before the pointer"),
    Death(2, "after the checkpoint"),
)


def die_at(death: Death) -> None:
    """Let this process send itself the signal at that point."""

    def send(*_: object) -> None:
        os.kill(os.getpid(), death.number)

    def before(owner: type, name: str, concerns: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            if concerns(*args, **kwargs):
                send()
            return original(self, *args, **kwargs)

        setattr(owner, name, replacement)

    from components.foundation.s3 import S3

    checkpoint = f"/checkpoints/step-{death.step}"
    if death.point == "before the checkpoint":
        before(TrainingCheckpoints, "after_step", lambda step, *_: step == death.step)
    elif death.point == "in the middle of its files":
        before(S3, "upload", lambda path, uri: uri.endswith(f"{checkpoint}/state.safetensors"))
    elif death.point == "before its manifest":
        before(CheckpointStore, "write_text", lambda uri, *_, **__: uri.endswith(f"{checkpoint}/MANIFEST.json"))
    elif death.point == "before the pointer":
        before(CheckpointStore, "set_latest", lambda _, step_uri: step_uri.endswith(checkpoint))
    elif death.point == "after the checkpoint":
        before(TrainingCheckpoints, "after_step", lambda step, *_: step == death.step + 1)
    else:
        raise ValueError(death.point)


def attempt(run_uri: str, stage: str, environment: Mapping[str, str], death: Death | None, round_number: int) -> None:
    """One attempt at a stage, in a process of its own; a later round's models need nothing but those before them."""
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    if death is not None:
        die_at(death)
    from components.cost_model.cost_model import run_cost_model
    from components.ppo_lagrangian.ppo_lagrangian import PpoInputs, run_ppo_lagrangian
    from components.reward_model.reward_model import run_reward_model
    from components.sft.sft import run_sft

    context = open_run(run_uri)
    data = finished_uri(context, "prepare_data", 0)
    if stage == "sft":
        run_sft(run_uri, data)
        return
    sft = finished_uri(context, "sft", 0)
    if stage == "reward_model":
        run_reward_model(run_uri, round_number, sft, data)
    elif stage == "cost_model":
        run_cost_model(run_uri, round_number, sft, data)
    else:
        models = (finished_uri(context, name, 1) for name in ("reward_model", "cost_model"))
        run_ppo_lagrangian(run_uri, 1, PpoInputs(data, sft, sft, *models))


class Runs:
    """Two runs with the same seed and settings: one in peace, one that is killed."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        from components.prepare_data.prepare_data import run_prepare_data
        from components.prepare_data.start_run import run_start_run

        self._environment = environment
        root = f"s3://saferlhf-test/{uuid.uuid4().hex}"
        settings = SETTINGS.replace("[", f'["store.uri={root}", ')
        self.peaceful, self.killed = (
            run_start_run(f"{root}/runs/{name}", name, "tiny", 0, settings, 1) for name in ("peaceful", "killed")
        )
        for run in (self.peaceful, self.killed):
            run_prepare_data(run)

    def bring_to(self, stage: str) -> None:
        """Let both runs finish, in peace, what comes before a stage."""
        for earlier in STAGES[: STAGES.index(stage)]:
            for run in (self.peaceful, self.killed):
                context = open_run(run)
                if context.store.latest(context.stage_uri(earlier, _round(earlier))) is None:
                    assert self.attempt(run, earlier) == 0

    def attempt(self, run_uri: str, stage: str, death: Death | None = None, round_number: int = 1) -> int | None:
        """Exit code of one attempt; minus the signal's number where it was killed."""
        process = _PROCESSES.Process(
            target=attempt, args=(run_uri, stage, dict(self._environment), death, round_number)
        )
        process.start()
        process.join()
        return process.exitcode

    def checkpoints(self, run_uri: str, stage: str) -> list[str]:
        """Names of the objects that a stage keeps while it trains."""
        context = open_run(run_uri)
        uri = f"{context.stage_uri(stage, _round(stage))}/checkpoints/"
        return [found.removeprefix(uri) for found in context.store._s3.list(uri)]

    def result(self, run_uri: str, stage: str) -> dict[str, str]:
        """Digests of what a stage committed, but for files that name the run: model card, and the adapter's base."""
        context = open_run(run_uri)
        uri = context.store.latest(context.stage_uri(stage, _round(stage)))
        assert uri is not None
        files = context.store.manifest(uri).files
        named = ("README.md", "adapter_config.json")
        return {file.path: file.sha256 for file in files if not file.path.endswith(named)}


def _round(stage: str) -> int:
    return 0 if stage == "sft" else 1


@pytest.fixture(scope="module")
def runs(services: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_CACHE", str(cache))
        yield Runs({**services.environment, "SAFERLHF_CACHE": str(cache)})


@pytest.mark.fault
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_every_point_of_a_checkpoint_ends_bit_for_bit_the_same(runs: Runs, stage: str) -> None:
    runs.bring_to(stage)
    assert runs.attempt(runs.peaceful, stage) == 0
    for death in DEATHS:
        assert runs.attempt(runs.killed, stage, death) == -signal.SIGKILL, death
    kept = runs.checkpoints(runs.killed, stage)
    assert sorted(kept) == ["LATEST", "step-2/MANIFEST.json", "step-2/state.json", "step-2/state.safetensors"]
    assert runs.attempt(runs.killed, stage, Death(3, "before the checkpoint", signal.SIGTERM)) == PREEMPTED_EXIT_CODE
    assert runs.attempt(runs.killed, stage) == 0
    assert runs.result(runs.killed, stage) == runs.result(runs.peaceful, stage)
    assert any(name.endswith(".safetensors") for name in runs.result(runs.killed, stage))
    assert runs.checkpoints(runs.killed, stage) == []


@pytest.mark.fault
def test_row_08_a_checkpoint_made_from_other_inputs_is_refused(runs: Runs, tmp_path: Path) -> None:
    """The same stage, but its data are others: both are named, and nothing is trained on."""
    import torch

    from components.foundation.backbone import Backbone
    from components.foundation.base_model import resolve_base_model
    from components.foundation.role_optimizer import make_optimizers

    with open_stage(runs.peaceful, "sft", 7) as stage:
        backbone = Backbone.load(resolve_base_model("tiny", stage.context.store), "float32", seed=0)
        backbone.add_role("sft", stage.context.settings.lora, scored=False)
        optimizers = make_optimizers(backbone, {"sft": 1e-3})
        with TrainingCheckpoints(stage, backbone, ["s3://these/data"]) as checkpoints:
            assert checkpoints.restore(optimizers).step == 0
            checkpoints.after_step(1, 9)
            before = {name: tensor.clone() for name, tensor in backbone.role_tensors("sft").items()}
        with (
            TrainingCheckpoints(stage, backbone, ["s3://other/data"]) as checkpoints,
            pytest.raises(TrainingError, match=r"other inputs \(\['s3://these/data'\]\).*s3://other/data"),
        ):
            checkpoints.restore(optimizers)
        assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.role_tensors("sft").items())


@pytest.mark.fault
def test_row_26_training_that_diverges_names_its_last_checkpoint_which_stays(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third step on the loss is NaN: what is kept are the weights after the second."""
    import torch

    from components.foundation.backbone import Backbone
    from components.foundation.base_model import resolve_base_model
    from components.foundation.batching import TokenSequence
    from components.foundation.role_optimizer import make_optimizers
    from components.foundation.setting_sections import SftSettings
    from components.sft import sft

    losses, calls = sft.answer_cross_entropy, 0

    def broken(*batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return losses(*batch) * (1.0 if calls <= 2 else float("nan"))

    monkeypatch.setattr(sft, "answer_cross_entropy", broken)
    examples, settings = [TokenSequence((5, 6), (70, 257))], SftSettings(batch_size=1, epochs=9)
    good: dict[str, Any] = {}

    def keep(step: int, *_: Any) -> None:
        if step == 2:
            good.update({name: tensor.clone() for name, tensor in backbone.role_tensors("sft").items()})

    with open_stage(runs.peaceful, "sft", 9) as stage:
        backbone = Backbone.load(resolve_base_model("tiny", stage.context.store), "float32", seed=0)
        backbone.add_role("sft", stage.context.settings.lora, scored=False)
        with (
            pytest.raises(DivergenceError, match=r"sft, step 6: loss nan.*checkpoint is kept: s3://.*/step-5$"),
            TrainingCheckpoints(stage, backbone, []) as checkpoints,
        ):
            sft.train_sft(backbone, "sft", examples, settings, 0, keep, checkpoints)
        with torch.no_grad():
            for tensor in backbone.role_tensors("sft").values():
                tensor.fill_(7.0)
        with TrainingCheckpoints(stage, backbone, []) as checkpoints:
            assert checkpoints.restore(make_optimizers(backbone, {"sft": 1e-3})).step == 5
        assert all(torch.equal(tensor, good[name]) for name, tensor in backbone.role_tensors("sft").items())

    with (
        open_stage(runs.peaceful, "sft", 10) as stage,
        pytest.raises(DivergenceError, match=r"out of hand; no checkpoint had been saved yet$"),
        TrainingCheckpoints(stage, backbone, []),
    ):
        raise DivergenceError("out of hand")


@pytest.mark.fault
def test_a_rollout_server_that_dies_costs_the_step_it_died_in(runs: Runs, tmp_path: Path) -> None:
    """It answers the first batch and dies in the second: the stage ends with an error that says so, and the checkpoint
    of the first step is whole."""
    import torch

    from components.foundation.backbone import Backbone
    from components.foundation.base_model import resolve_base_model
    from components.foundation.policy import ACTOR
    from components.foundation.results import PpoTrace
    from components.foundation.rollout.vllm_engine import VllmEngine
    from components.ppo_lagrangian.episode import COST, COST_CRITIC, REWARD, REWARD_CRITIC
    from components.ppo_lagrangian.multiplier import CostConstraint
    from components.ppo_lagrangian.ppo_lagrangian import train_policy
    from components.ppo_lagrangian.trainer import PpoLagrangian

    with open_stage(runs.peaceful, "ppo_lagrangian", 9) as stage:
        settings = stage.context.settings
        folder = resolve_base_model("tiny", stage.context.store)
        ppo = settings.ppo.model_copy(
            update={"vllm_python": fake_vllm(tmp_path, "dies in the second batch"), "ptx_coefficient": 0.0}
        )

        def trainer() -> tuple[Backbone, PpoLagrangian]:
            backbone = Backbone.load(folder, "float32", seed=0)
            backbone.add_role(ACTOR, settings.lora, scored=False)
            for role in (REWARD, COST, REWARD_CRITIC, COST_CRITIC):
                backbone.add_role(role, settings.lora, scored=True)
            return backbone, PpoLagrangian(
                backbone, VllmEngine(backbone, ACTOR, folder, ppo), ppo, CostConstraint(0.0), 0
            )

        prompts = [(256, 72, 105, 256)] * 4
        backbone, dying = trainer()
        with (
            closing(dying._engine),
            TrainingCheckpoints(stage, backbone, []) as checkpoints,
            pytest.raises(RolloutError, match="died or hung up"),
        ):
            train_policy(dying, lambda step: dying.step(prompts, step), 3, PpoTrace(0.0), checkpoints)
        saved = {role: backbone.role_tensors(role) for role in dying.trained}
        backbone, fresh = trainer()
        with TrainingCheckpoints(stage, backbone, []) as checkpoints:
            assert checkpoints.restore(fresh.trained).step == 1
        for role, tensors in saved.items():
            assert all(torch.equal(tensors[name], t) for name, t in backbone.role_tensors(role).items())
        fresh._engine.close()


def test_a_checkpoint_is_due_by_steps_or_by_time(runs: Runs) -> None:
    """Every step here; and with steps switched off, once two minutes have passed since the last one."""
    from components.foundation.backbone import Backbone
    from components.foundation.base_model import resolve_base_model
    from components.foundation.role_optimizer import make_optimizers

    now = 0.0
    with open_stage(runs.peaceful, "sft", 8) as stage:
        settings = stage.context.settings
        by_time = settings.model_copy(
            update={"checkpoint": settings.checkpoint.model_copy(update={"every_steps": 0, "every_minutes": 2.0})}
        )
        object.__setattr__(stage.context, "settings", by_time)
        backbone = Backbone.load(resolve_base_model("tiny", stage.context.store), "float32", seed=0)
        backbone.add_role("sft", settings.lora, scored=False)
        optimizers = make_optimizers(backbone, {"sft": 1e-3})
        with TrainingCheckpoints(stage, backbone, [], clock=lambda: now) as checkpoints:
            checkpoints.restore(optimizers)
            saved = []
            for step, now in enumerate((60.0, 119.0, 120.0, 200.0, 240.0, 9999.0), start=1):  # noqa: B007
                checkpoints.after_step(step, 6)
                latest = stage.context.store.latest(stage.checkpoints_uri)
                saved.append(latest and latest.rpartition("-")[2])
    assert saved == [None, None, "3", "3", "5", "5"]  # after the last step the stage commits its result


def test_a_later_round_goes_on_from_the_model_before_where_that_is_set(runs: Runs) -> None:
    """Profile tiny: the cost model does and names it as a parent, the reward model begins anew."""
    runs.bring_to("ppo_lagrangian")
    context = open_run(runs.peaceful)
    for stage, goes_on in (("cost_model", True), ("reward_model", False)):
        assert runs.attempt(runs.peaceful, stage, round_number=2) == 0
        first, second = (finished_uri(context, stage, number) for number in (1, 2))
        assert (first in context.store.manifest(second).parents) == goes_on
