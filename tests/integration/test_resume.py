"""What a training stage keeps while it trains, when it does, and what it goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import DivergenceError, RolloutError, StoreUnavailableError, TrainingError
from components.foundation.run_context import finished_uri, open_run, open_stage
from components.foundation.training_checkpoints import TrainingCheckpoints
from pipelines.local.services import Endpoints
from tests.misbehaving_vllm import fake_vllm
from tests.stage_attempts import TrainingRun

pytestmark = pytest.mark.xdist_group("resume")


@pytest.fixture(scope="module")
def run(services: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingRun]:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_CACHE", str(cache))
        yield TrainingRun({**services.environment, "SAFERLHF_CACHE": str(cache)})


@pytest.mark.fault
def test_row_08_a_checkpoint_made_from_other_inputs_is_refused(run: TrainingRun, tmp_path: Path) -> None:
    """The same stage, but its data are others: both are named, and nothing is trained on."""
    import torch

    from components.foundation.backbone import Backbone
    from components.foundation.base_model import resolve_base_model
    from components.foundation.role_optimizer import make_optimizers

    with open_stage(run.uri, "sft", 7) as stage:
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
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch
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

    with open_stage(run.uri, "sft", 9) as stage:
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
        open_stage(run.uri, "sft", 10) as stage,
        pytest.raises(DivergenceError, match=r"out of hand; no checkpoint had been saved yet$"),
        TrainingCheckpoints(stage, backbone, []),
    ):
        raise DivergenceError("out of hand")

    def away(*_: Any) -> None:
        raise StoreUnavailableError("S3 does not answer")

    with open_stage(run.uri, "sft", 11) as stage:
        monkeypatch.setattr(CheckpointStore, "latest", away)
        with (
            pytest.raises(DivergenceError, match=r"out of hand; the last checkpoint could not be looked up: S3 does"),
            TrainingCheckpoints(stage, backbone, []),
        ):
            raise DivergenceError("out of hand")


@pytest.mark.fault
def test_a_rollout_server_that_dies_costs_the_step_it_died_in(run: TrainingRun, tmp_path: Path) -> None:
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

    with open_stage(run.uri, "ppo_lagrangian", 9) as stage:
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


def test_a_checkpoint_is_due_by_steps_or_by_time(run: TrainingRun) -> None:
    """Every step here; and with steps switched off, once two minutes have passed since the last one."""
    from components.foundation.backbone import Backbone
    from components.foundation.base_model import resolve_base_model
    from components.foundation.role_optimizer import make_optimizers

    now = 0.0
    with open_stage(run.uri, "sft", 8) as stage:
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


def test_a_later_round_goes_on_from_the_model_before_where_that_is_set(run: TrainingRun) -> None:
    """Profile tiny: the cost model does and names it as a parent, the reward model begins anew."""
    run.bring_to("ppo_lagrangian")
    context = open_run(run.uri)
    for stage, goes_on in (("cost_model", True), ("reward_model", False)):
        assert run.attempt(stage, round_number=2) == 0
        first, second = (finished_uri(context, stage, number) for number in (1, 2))
        assert (first in context.store.manifest(second).parents) == goes_on
