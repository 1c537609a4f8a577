"""Losses, scores and policies that are out of hand: what is skipped, what stops training, and what stays as it was."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from components.foundation.backbone import Backbone
from components.foundation.batching import TokenSequence
from components.foundation.errors import DivergenceError
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference_trainer import PreferenceScores, ScoredPair, train_preference_model
from components.foundation.results import PpoTrace
from components.foundation.role_optimizer import UpdateGuard, WholeOptimizer
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.setting_sections import LoraSettings, PreferenceModelSettings, SftSettings
from components.foundation.training_checkpoints import TrainingState
from components.ppo_lagrangian.episode import COST, COST_CRITIC, REWARD, REWARD_CRITIC
from components.ppo_lagrangian.multiplier import CostConstraint
from components.ppo_lagrangian.ppo_lagrangian import train_policy
from components.ppo_lagrangian.trainer import PpoLagrangian
from components.reward_model.loss import reward_loss
from components.sft.sft import train_sft

LoadTiny = Callable[[str], Backbone]
Tensors = dict[str, torch.Tensor]
LORA = LoraSettings(rank=4, alpha=8)
PROMPTS = [(256, 72, 256), (256, 1, 2, 256), (5,), (256, 30, 256)]
SETTINGS = PpoSettings(episodes_per_step=4, minibatch_size=2, max_new_tokens=4, actor_learning_rate=5e-3)
PAIR = ScoredPair(TokenSequence((5, 6), (70, 257)), TokenSequence((5, 6), (80, 257)), +1, -1)

pytestmark = pytest.mark.fault


@pytest.fixture
def backbone(load_tiny: LoadTiny) -> Backbone:
    loaded = load_tiny("tiny-llama")
    loaded.add_role(ACTOR, LORA, scored=False)
    for model, critic in ((REWARD, REWARD_CRITIC), (COST, COST_CRITIC)):
        loaded.add_role(model, LORA, scored=True)
        loaded.add_role(critic, LORA, scored=True)
    return loaded


def tensors(backbone: Backbone, role: str) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in backbone.role_tensors(role).items()}


def equal(first: Tensors, second: Tensors) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def poison(backbone: Backbone, role: str, value: float = math.nan) -> None:
    with torch.no_grad():
        backbone.role_tensors(role)[min(backbone.role_tensors(role))].fill_(value)


def trainer_of(backbone: Backbone, **changes: object) -> PpoLagrangian:
    settings = SETTINGS.model_copy(update=changes)
    return PpoLagrangian(backbone, TransformersEngine(backbone, ACTOR), settings, CostConstraint(0.0), 0)


def test_row_26_a_critic_of_nan_costs_the_updates_of_its_step_and_nothing_else(
    backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    """Its values make the advantages NaN, so the actor's two updates are skipped as well; mended, all goes on."""
    trainer = trainer_of(backbone)
    healthy, actor = tensors(backbone, REWARD_CRITIC), tensors(backbone, ACTOR)
    cost_critic = tensors(backbone, COST_CRITIC)
    poison(backbone, REWARD_CRITIC)
    with caplog.at_level(logging.WARNING, "saferlhf"):
        metrics = trainer.step(PROMPTS, 0)
    assert metrics.skipped_updates == 4
    assert "actor, step 1: loss nan" in caplog.text
    assert "reward_critic, step 1: loss nan" in caplog.text
    assert equal(tensors(backbone, ACTOR), actor)
    assert trainer.optimizers[ACTOR].moments() == {}  # nor has it left a trace in the moments
    assert not equal(tensors(backbone, COST_CRITIC), cost_critic)
    with torch.no_grad():
        for name, tensor in backbone.role_tensors(REWARD_CRITIC).items():
            tensor.copy_(healthy[name])
    assert trainer.step(PROMPTS, 1).skipped_updates == 4
    assert not equal(tensors(backbone, ACTOR), actor)


@pytest.mark.parametrize(("limit", "step"), [(0, 1), (1, 1), (3, 2), (4, 3)])
def test_row_26_one_skipped_update_too_many_stops_training_with_step_and_values(
    backbone: Backbone, limit: int, step: int
) -> None:
    """Two minibatches a step: the update after `limit` skipped ones stands in this step."""
    trainer = trainer_of(backbone, max_skipped_updates=limit)
    actor = tensors(backbone, ACTOR)
    poison(backbone, REWARD_CRITIC)
    with pytest.raises(DivergenceError, match=rf"actor, step {step}: loss nan, gradient norm nan.*{limit} updates"):
        for number in range(9):
            trainer.step(PROMPTS, number)
    assert equal(tensors(backbone, ACTOR), actor)


class OneCheckpoint:
    """Keeps what a stage saved last, and interrupts it once, after a step."""

    def __init__(self, interrupted_after: int = 0) -> None:
        self._state = TrainingState()
        self._interrupted_after = interrupted_after

    def restore(self, trained: object) -> TrainingState:
        return self._state

    def after_step(self, step: int, steps: int, record: Callable[[], str]) -> None:
        self._state = TrainingState(step, record())
        if step == self._interrupted_after:
            raise KeyboardInterrupt


def test_updates_skipped_before_a_restart_count_after_it(backbone: Backbone) -> None:
    """Two in the first step; of the three that are allowed in a row, one is left to the second."""
    poison(backbone, REWARD_CRITIC)
    kept: Any = OneCheckpoint()
    before, after = (trainer_of(backbone, max_skipped_updates=3) for _ in range(2))
    train_policy(before, lambda step: before.step(PROMPTS, step), 1, PpoTrace(0.0), kept)
    with pytest.raises(DivergenceError, match="actor, step 2: loss nan"):
        train_policy(after, lambda step: after.step(PROMPTS, step), 2, PpoTrace(0.0), kept)
    assert after.guard.skipped > before.guard.skipped == 4


@pytest.mark.parametrize("model", [REWARD, COST])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_named_before_anything_is_learned(
    backbone: Backbone, model: str, value: float
) -> None:
    trainer = trainer_of(backbone)
    before = {role: tensors(backbone, role) for role in (ACTOR, REWARD_CRITIC, COST_CRITIC)}
    with torch.no_grad():
        backbone.role_tensors(model)["head.bias"].fill_(value)
    with pytest.raises(
        DivergenceError, match=rf"step 1: 4 of 4 {model} scores .*{value}.*{model}_model\.learning_rate"
    ):
        trainer.step(PROMPTS, 0)
    assert all(equal(tensors(backbone, role), old) for role, old in before.items())


def test_a_policy_of_nan_is_named(backbone: Backbone) -> None:
    trainer = trainer_of(backbone, max_kl=None)
    poison(backbone, ACTOR)
    with pytest.raises(DivergenceError, match="KL divergence from the reference is nan"):
        trainer.step(PROMPTS, 0)


def test_row_26_a_policy_that_left_its_reference_far_behind_stops_training(backbone: Backbone) -> None:
    """A random adapter: above the limit nothing is learned, under it or without one training goes on."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in backbone.role_tensors(ACTOR).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 2)
    actor = tensors(backbone, ACTOR)
    kl = trainer_of(backbone, max_kl=None, actor_learning_rate=1e-12).step(PROMPTS, 0).kl
    assert kl > 0.01
    with torch.no_grad():
        for name, tensor in backbone.role_tensors(ACTOR).items():
            tensor.copy_(actor[name])
    with pytest.raises(DivergenceError, match=rf"step 1: .* is {kl:.4g} nats a token .*{kl / 2}.*kl_coefficient"):
        trainer_of(backbone, max_kl=kl / 2).step(PROMPTS, 0)
    assert equal(tensors(backbone, ACTOR), actor)
    assert trainer_of(backbone, max_kl=kl * 2).step(PROMPTS, 0).kl == pytest.approx(kl)


def _broken_at(*steps: int) -> Callable[[PreferenceScores], tuple[torch.Tensor, dict[str, float]]]:
    calls = 0

    def loss(scores: PreferenceScores) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        value, metrics = reward_loss(scores, 0.01)
        return (value * math.nan if calls in steps else value), metrics

    return loss


def test_a_preference_model_skips_a_bad_batch_and_learns_from_the_others(backbone: Backbone) -> None:
    """Of 12 batches, 4 not in a row are bad: the norms of those alone are NaN, and the weights stay finite."""
    norms: list[float] = []
    wish = PreferenceModelSettings(batch_size=1, epochs=12)
    bad, before = (2, 5, 8, 11), tensors(backbone, REWARD)
    train_preference_model(
        backbone, REWARD, [PAIR], wish, _broken_at(*bad), 0, lambda step, total, m: norms.append(m["gradient_norm"])
    )
    assert tuple(i for i, norm in enumerate(norms, start=1) if math.isnan(norm)) == bad
    assert all(tensor.isfinite().all() for tensor in tensors(backbone, REWARD).values())
    assert not equal(tensors(backbone, REWARD), before)


def test_a_preference_model_that_is_beyond_mending_stops_and_is_as_it_was(backbone: Backbone) -> None:
    before = tensors(backbone, REWARD)
    wish = PreferenceModelSettings(batch_size=1, epochs=12)
    with pytest.raises(DivergenceError, match=r"reward, step 4: loss nan.*3 updates before"):
        train_preference_model(backbone, REWARD, [PAIR], wish, _broken_at(1, 2, 3, 4), 0, lambda *step: None)
    assert equal(tensors(backbone, REWARD), before)


def test_fine_tuning_that_is_beyond_mending_stops(backbone: Backbone) -> None:
    backbone.add_role("sft", LORA, scored=False)
    poison(backbone, "sft")
    with pytest.raises(DivergenceError, match=r"sft, step 4: loss nan.*learning rate"):
        train_sft(backbone, "sft", [PAIR.high], SftSettings(batch_size=1, epochs=9), 0, lambda *step: None)


@pytest.mark.parametrize("role", [REWARD, "sft"])
def test_updates_skipped_before_an_interruption_count_after_it(backbone: Backbone, role: str) -> None:
    """Else a stage on nodes that are taken away often would never find out that it is beyond mending."""
    backbone.add_role("sft", LORA, scored=False)
    poison(backbone, role)
    kept: Any = OneCheckpoint(interrupted_after=2)

    def train() -> None:
        if role == REWARD:
            wish = PreferenceModelSettings(batch_size=1, epochs=9)
            train_preference_model(backbone, role, [PAIR], wish, _broken_at(), 0, lambda *step: None, kept)
        else:
            train_sft(backbone, role, [PAIR.high], SftSettings(batch_size=1, epochs=9), 0, lambda *step: None, kept)

    with pytest.raises(KeyboardInterrupt):
        train()
    with pytest.raises(DivergenceError, match=f"{role}, step 4: loss nan.*3 updates before"):
        train()


def test_an_infinite_loss_with_a_finite_gradient_is_skipped_too() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer, guard = WholeOptimizer([weight], 0.1), UpdateGuard(limit=1)
    weight.sum().backward()
    assert guard.update("role", optimizer, loss=math.inf, max_gradient_norm=1.0, step=1) == pytest.approx(1.0)
    assert weight.item() == 1.0
    assert weight.grad is None
    weight.sum().backward()
    guard.update("role", optimizer, loss=1.0, max_gradient_norm=1.0, step=2)
    assert weight.item() == pytest.approx(0.9)
    assert guard.skipped == 1
