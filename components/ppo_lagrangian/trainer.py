"""The PPO-Lagrangian training loop (paper section 3.3, algorithm in appendix B).

Each step: 1 roll out, 2 score, 3 shape, 4 advantages, 5 update actor and critics, 6 multiplier, 7 log.
Shapes: B episodes, P prompt tokens, T answer tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.batching import (
    SequenceBatch,
    TokenSequence,
    collate,
    token_log_probs,
)
from components.foundation.optimization import make_optimizer, optimizer_step
from components.foundation.policy import ACTOR
from components.foundation.preference_trainer import answer_scores
from components.foundation.rollout import RolloutEngine, Sampling
from components.foundation.settings import PpoSettings
from components.ppo_lagrangian.multiplier import MultiplierState, update_multiplier
from components.ppo_lagrangian.objective import (
    actor_loss,
    aggregate_cost,
    combine_advantages,
    critic_loss,
    generalized_advantages,
    shape_rewards,
    whiten,
)

REWARD, COST = "reward", "cost"
REWARD_CRITIC, COST_CRITIC = "reward_critic", "cost_critic"

# No gradient is kept for log-probabilities that only measure: a few rows at a time bound the [B, T, V] logits.
_ROWS_PER_FORWARD = 16


@dataclass(frozen=True)
class Episode:
    """A rollout batch with everything that its update needs.

    Attributes:
        batch: prompts and sampled answers.
        log_probs, reference_log_probs: [B, T].
        reward_values, cost_values: [B, T] critics' values *before* each answer token.
        reward, cost: [B] scores of the whole answers; `reward` holds the missing-EOS penalty, `cost` is aggregated.
    """

    batch: SequenceBatch
    log_probs: Tensor
    reference_log_probs: Tensor
    reward_values: Tensor
    cost_values: Tensor
    reward: Tensor
    cost: Tensor


@dataclass(frozen=True)
class Advantages:
    """[B, T] combined advantages and the critics' targets."""

    combined: Tensor
    reward_returns: Tensor
    cost_returns: Tensor


@dataclass(frozen=True)
class StepMetrics:
    """What one step did. `kl` is the mean over answer tokens of log pi - log pi_ref, in nats."""

    multiplier: float
    cost_moving_average: float
    cost: float
    reward: float
    kl: float
    clip_fraction: float
    actor_loss: float
    reward_critic_loss: float
    cost_critic_loss: float
    rollout_tokens_per_second: float
    ended_share: float


class PpoLagrangian:
    """Holds the six roles, their optimisers and the multiplier."""

    def __init__(
        self, backbone: Backbone, engine: RolloutEngine, settings: PpoSettings, threshold: float, seed: int
    ) -> None:
        self._backbone = backbone
        self._engine = engine
        self._settings = settings
        self._threshold = threshold
        self._seed = seed
        self.multiplier = MultiplierState(nu=math.log(settings.lambda_init))
        self._optimizers = {
            ACTOR: make_optimizer(backbone.trainable_parameters(ACTOR), settings.actor_learning_rate),
            REWARD_CRITIC: make_optimizer(backbone.trainable_parameters(REWARD_CRITIC), settings.critic_learning_rate),
            COST_CRITIC: make_optimizer(backbone.trainable_parameters(COST_CRITIC), settings.critic_learning_rate),
        }

    def step(self, prompts: Sequence[tuple[int, ...]], step: int) -> StepMetrics:
        """One rollout batch and its update."""
        s = self._settings
        # 1 roll out
        sampling = Sampling(s.temperature, s.max_new_tokens, seed=self._seed * 1_000_003 + step)
        started = time.perf_counter()
        answers = self._engine.generate(prompts, sampling)
        rollout_seconds = time.perf_counter() - started
        sequences = [TokenSequence(tuple(p), a) for p, a in zip(prompts, answers, strict=True)]
        # 2 score
        episode = score_episode(self._backbone, sequences, s)
        # 3 shape, 4 advantages
        advantages = compute_advantages(episode, s, self.multiplier.value)
        # 5 update
        losses = self._update(episode, advantages, step)
        # 6 multiplier
        self.multiplier = update_multiplier(
            self.multiplier,
            episode.cost.tolist(),
            threshold=self._threshold,
            learning_rate=s.lambda_learning_rate,
            floor=s.lambda_min,
            ceiling=s.lambda_max,
            window=s.cost_window,
        )
        # 7 log
        mask = episode.batch.answer_mask
        tokens = int(mask.sum())
        return StepMetrics(
            multiplier=self.multiplier.value,
            cost_moving_average=self.multiplier.cost_moving_average,
            cost=float(episode.cost.mean()),
            reward=float(episode.reward.mean()),
            kl=float(((episode.log_probs - episode.reference_log_probs) * mask).sum() / tokens),
            clip_fraction=losses["clipped"] / (tokens * s.epochs),
            actor_loss=losses[ACTOR],
            reward_critic_loss=losses[REWARD_CRITIC],
            cost_critic_loss=losses[COST_CRITIC],
            rollout_tokens_per_second=tokens / rollout_seconds,
            ended_share=sum(a[-1] == self._backbone.eos_token_id for a in answers) / len(answers),
        )

    def _update(self, episode: Episode, advantages: Advantages, step: int) -> dict[str, float]:
        """Every epoch passes once over the episodes in minibatches; returns the last losses and clipped tokens."""
        s = self._settings
        losses = {"clipped": 0.0}
        for epoch in range(s.epochs):
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step * 101 + epoch)
            order = torch.randperm(len(episode.reward), generator=generator)
            for rows in order.split(s.minibatch_size):
                losses |= self._update_actor(episode, advantages.combined, rows, losses["clipped"])
                losses[REWARD_CRITIC] = self._update_critic(
                    REWARD_CRITIC, episode.batch, episode.reward_values, advantages.reward_returns, rows
                )
                losses[COST_CRITIC] = self._update_critic(
                    COST_CRITIC, episode.batch, episode.cost_values, advantages.cost_returns, rows
                )
        return losses

    def _update_actor(
        self, episode: Episode, advantages: Tensor, rows: Tensor, clipped_before: float
    ) -> dict[str, float]:
        batch = episode.batch.rows(rows)
        with self._backbone.role(ACTOR, train=True):
            logits = self._backbone.answer_logits(
                batch.input_ids, batch.attention_mask, batch.answer_length, batch.trunk
            )
            loss, clipped = actor_loss(
                token_log_probs(logits / self._settings.temperature, batch.answers),
                episode.log_probs[rows],
                advantages[rows],
                batch.answer_mask,
                clip_ratio=self._settings.clip_ratio,
                total_tokens=int(batch.answer_mask.sum()),
            )
            loss.backward()
        optimizer_step(self._optimizers[ACTOR], self._settings.max_gradient_norm)
        return {ACTOR: loss.item(), "clipped": clipped_before + clipped.item()}

    def _update_critic(
        self, role: str, all_rows: SequenceBatch, old_values: Tensor, returns: Tensor, rows: Tensor
    ) -> float:
        batch = all_rows.rows(rows)
        with self._backbone.role(role, train=True):
            loss = critic_loss(
                token_values(self._backbone, role, batch),
                old_values[rows],
                returns[rows],
                batch.answer_mask,
                value_clip=self._settings.value_clip,
                total_tokens=int(batch.answer_mask.sum()),
            )
            loss.backward()
        optimizer_step(self._optimizers[role], self._settings.max_gradient_norm)
        return loss.item()


def score_episode(backbone: Backbone, sequences: Sequence[TokenSequence], settings: PpoSettings) -> Episode:
    """Everything the update needs to know of a rollout batch, measured without gradients."""
    batch = collate(sequences, backbone.eos_token_id, backbone.device)
    batch = replace(batch, trunk=backbone.trunk_states(batch.input_ids, batch.attention_mask))
    ended = torch.tensor([s.answer[-1] == backbone.eos_token_id for s in sequences], device=backbone.device)
    reward = _answer_scores(backbone, REWARD, batch)
    return Episode(
        batch=batch,
        log_probs=_measure_log_probs(backbone, ACTOR, batch, settings.temperature),
        reference_log_probs=_measure_log_probs(backbone, REFERENCE, batch, settings.temperature),
        reward_values=_values(backbone, REWARD_CRITIC, batch),
        cost_values=_values(backbone, COST_CRITIC, batch),
        reward=reward - settings.missing_eos_penalty * (~ended).float(),
        cost=aggregate_cost(_answer_scores(backbone, COST, batch), settings.cost_aggregation),
    )


def compute_advantages(episode: Episode, settings: PpoSettings, multiplier: float) -> Advantages:
    """Shape both signals, estimate both advantages, combine them by the multiplier, then whiten."""
    mask = episode.batch.answer_mask

    def estimate(score: Tensor, values: Tensor, kl_sign: float) -> tuple[Tensor, Tensor]:
        shaped = shape_rewards(
            episode.log_probs,
            episode.reference_log_probs,
            score,
            mask,
            kl_coefficient=settings.kl_coefficient,
            kl_sign=kl_sign,
            clip=settings.score_clip,
        )
        return generalized_advantages(shaped, values, mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda)

    reward_advantages, reward_returns = estimate(episode.reward, episode.reward_values, -1.0)
    cost_advantages, cost_returns = estimate(episode.cost, episode.cost_values, +1.0)
    combined = combine_advantages(reward_advantages, cost_advantages, multiplier)
    if settings.whiten_advantages:
        combined = whiten(combined, mask)
    return Advantages(combined, reward_returns, cost_returns)


def token_values(backbone: Backbone, role: str, batch: SequenceBatch) -> Tensor:
    """[B, T] value before each answer token: the head's output at the token before it."""
    return backbone.scores(role, batch.input_ids, batch.attention_mask, batch.trunk)[:, -batch.answer_length - 1 : -1]


def _values(backbone: Backbone, role: str, batch: SequenceBatch) -> Tensor:
    with backbone.role(role):
        return token_values(backbone, role, batch) * batch.answer_mask


def _answer_scores(backbone: Backbone, role: str, batch: SequenceBatch) -> Tensor:
    with backbone.role(role):
        return answer_scores(backbone, role, batch)


def _measure_log_probs(backbone: Backbone, role: str, batch: SequenceBatch, temperature: float) -> Tensor:
    def measure(rows: Tensor) -> Tensor:
        part = batch.rows(rows)
        logits = backbone.answer_logits(part.input_ids, part.attention_mask, part.answer_length, part.trunk)
        return token_log_probs(logits / temperature, part.answers)

    with backbone.role(role):
        chunks = torch.arange(len(batch.input_ids), device=backbone.device).split(_ROWS_PER_FORWARD)
        return torch.cat([measure(rows) for rows in chunks]) * batch.answer_mask
