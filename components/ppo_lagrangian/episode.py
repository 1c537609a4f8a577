"""A rollout batch, and everything that its update needs to know of it, measured without gradients.

Shapes: B episodes (of this rank), T answer tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from components.foundation import distributed
from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.batching import (
    SequenceBatch,
    TokenSequence,
    answer_score,
    batches_by_length,
    collate,
    measure_in_parts,
    token_log_probs,
)
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference_trainer import answer_scores
from components.foundation.rollout import Rollout
from components.ppo_lagrangian.objective import (
    aggregate_cost,
    combine_advantages,
    generalized_advantages,
    importance_weights,
    macro_action_advantages,
    ngram_actions,
    perplexity_actions,
    rollout_drift,
    shape_rewards,
    whiten,
)

REWARD, COST = "reward", "cost"
REWARD_CRITIC, COST_CRITIC = "reward_critic", "cost_critic"

_ROWS_PER_FORWARD = 8
"""Of passes that only measure: few enough to be of like length, and to bound the [B, T, V] logits."""


@dataclass(frozen=True)
class Appraisal:
    """What one model and its critic say of a rollout batch.

    Attributes:
        score: [B] of the whole answers; rewards hold the missing-EOS penalty, costs are aggregated.
        values: [B, T] the critic's values *before* each answer token; 0 until a critic that is a head has been fitted.
        features: [B, T, D] what the values are linear in, where the critic is a head on the model's hidden states.
    """

    score: Tensor
    values: Tensor
    features: Tensor | None


@dataclass(frozen=True)
class Episode:
    """A rollout batch with everything that its update needs.

    Attributes:
        batch: prompts and sampled answers.
        log_probs, reference_log_probs: [B, T].
        reward, cost: the two appraisals of the answers.
        costs: one each answer, or each that was judged; the multiplier constrains their mean.
        mean_reward: of the answers, for people to read.
        weights: [B, T] importance weights, where the engine drew from another distribution than the actor's.
        drift: mean |log pi - log q| of the answer tokens, q what the engine drew from.
    """

    batch: SequenceBatch
    log_probs: Tensor
    reference_log_probs: Tensor
    reward: Appraisal
    cost: Appraisal
    costs: list[float]
    mean_reward: float
    weights: Tensor | None = None
    drift: float = 0.0

    @property
    def total_kl(self) -> float:
        """Sum over answer tokens of log pi - log pi_ref, in nats."""
        return float(((self.log_probs - self.reference_log_probs) * self.batch.answer_mask).sum())


Score = Callable[[Sequence[TokenSequence]], Episode]
"""Prompts and sampled answers -> the episode that the update works on."""


@dataclass(frozen=True)
class Signals:
    """[B, T] rewards and costs of each token, with their KL terms; no cost where one signal holds both."""

    reward: Tensor
    cost: Tensor | None


@dataclass(frozen=True)
class Advantages:
    """[B, T] combined advantages and the critics' targets; None for a critic that is not in use."""

    combined: Tensor
    reward_returns: Tensor
    cost_returns: Tensor | None


def score_episode(
    backbone: Backbone, sequences: Sequence[TokenSequence], settings: PpoSettings, cost_floor: float | None = None
) -> Episode:
    """Everything the update needs to know of a rollout batch, measured without gradients."""
    batch = collated(backbone, sequences)
    reward = appraise(backbone, REWARD, REWARD_CRITIC, batch)
    cost = appraise(backbone, COST, COST_CRITIC, batch)
    reward = replace(reward, score=reward.score - missing_eos(backbone, sequences, settings.missing_eos_penalty))
    cost = replace(cost, score=aggregate_cost(cost.score, cost_floor))
    return Episode(
        batch=batch,
        log_probs=measure_log_probs(backbone, ACTOR, batch, settings.temperature),
        reference_log_probs=measure_log_probs(backbone, REFERENCE, batch, settings.temperature),
        reward=reward,
        cost=cost,
        costs=cost.score.tolist(),
        mean_reward=float(reward.score.mean()),
    )


def missing_eos(backbone: Backbone, sequences: Sequence[TokenSequence], penalty: float) -> Tensor:
    """[B] the penalty for each answer that was cut off, 0 for the others."""
    cut_off = [s.answer[-1] != backbone.eos_token_id for s in sequences]
    return penalty * torch.tensor(cut_off, dtype=torch.float32, device=backbone.device)


def weigh_tokens(episode: Episode, rollout: Rollout, cap: float) -> Episode:
    """The episode with its drift, and with importance weights where the rollout was not exact."""
    drawn = torch.zeros_like(episode.log_probs)
    for row, log_probs in zip(drawn, rollout.log_probs, strict=True):
        row[: len(log_probs)] = torch.tensor(log_probs)
    mask = episode.batch.answer_mask
    weights = None if rollout.exact else importance_weights(episode.log_probs, drawn, mask, cap=cap)
    return replace(episode, weights=weights, drift=float(rollout_drift(episode.log_probs, drawn, mask)))


def collated(backbone: Backbone, sequences: Sequence[TokenSequence]) -> SequenceBatch:
    """A batch with the trunk's output, which all roles share."""
    batch = collate(sequences, backbone.eos_token_id, backbone.device)
    return replace(batch, trunk=backbone.trunk_states(batch.input_ids, batch.attention_mask))


def appraise(backbone: Backbone, model: str, critic: str, batch: SequenceBatch) -> Appraisal:
    """Score a batch by a model; value it by the model's critic, or keep what a critic that is a head will read."""

    def last_hidden(part: SequenceBatch) -> Tensor:
        """[b, T + 1, D] of the answer tokens, and of the token before them."""
        hidden = backbone.hidden_states(part.input_ids, part.attention_mask, part.trunk)
        return hidden[:, -part.answer_length - 1 :]

    with backbone.role(model), backbone.prepared(model):
        hidden = measure_in_parts(batch, _ROWS_PER_FORWARD, last_hidden)
        outputs = backbone.head_outputs(model, hidden)
    score = answer_score(outputs, batch.answer_mask, reads_prompt=backbone.reads_prompt(model))
    if not backbone.has_adapter(critic):
        return Appraisal(score, torch.zeros_like(outputs[:, 1:]), hidden[:, :-1])
    with backbone.role(critic), backbone.prepared(critic):
        values = measure_in_parts(batch, _ROWS_PER_FORWARD, partial(token_values, backbone, critic))
    return Appraisal(score, values * batch.answer_mask, None)


def safe_sequences(backbone: Backbone, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Those that the cost model calls safe: a cost of at most 0, the boundary that its sign loss draws. All ranks call.

    What the first rank finds counts: on unlike devices a cost near 0 may fall to either side.
    """
    costs: list[tuple[int, float]] = []
    with backbone.role(COST), backbone.prepared(COST), torch.no_grad():
        for rows in batches_by_length([len(sequence) for sequence in sequences], _ROWS_PER_FORWARD):
            batch = collate([sequences[i] for i in rows], backbone.eos_token_id, backbone.device)
            costs += zip(rows, answer_scores(backbone, COST, batch).tolist(), strict=True)
    safe = distributed.from_main(lambda: {i for i, cost in costs if cost <= 0})
    return [sequence for i, sequence in enumerate(sequences) if i in safe]


def shape_signals(episode: Episode, settings: PpoSettings) -> Signals:
    """The rewards and the costs of each token.

    With `ppo.reward_shaping` nu there is one signal, reward - nu cost, and one critic, the reward's.
    """

    def shape(score: Tensor, kl_sign: float) -> Tensor:
        return shape_rewards(
            episode.log_probs,
            episode.reference_log_probs,
            score,
            episode.batch.answer_mask,
            kl_coefficient=settings.kl_coefficient,
            kl_sign=kl_sign,
            clip=settings.score_clip,
        )

    if settings.reward_shaping is not None:
        return Signals(shape(episode.reward.score - settings.reward_shaping * episode.cost.score, -1.0), None)
    return Signals(shape(episode.reward.score, -1.0), shape(episode.cost.score, +1.0))


def compute_advantages(episode: Episode, signals: Signals, settings: PpoSettings, multiplier: float) -> Advantages:
    """Estimate the advantages of both signals, combine them by the multiplier, then whiten."""
    mask = episode.batch.answer_mask
    # without critics there is no value to stop at: the advantage of a token is all that follows
    gae_lambda = settings.gae_lambda if settings.advantage_source == "models" else 1.0
    discounts = {"gamma": settings.gamma, "gae_lambda": gae_lambda}

    def estimate(shaped: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if settings.macro_action == "none":
            return generalized_advantages(shaped, values, mask, **discounts)
        if settings.macro_action == "ngram":
            actions = ngram_actions(mask, settings.macro_action_length)
        else:
            actions = perplexity_actions(episode.log_probs, mask)
        return macro_action_advantages(shaped, values, mask, actions, **discounts)

    combined, reward_returns = estimate(signals.reward, episode.reward.values)
    cost_returns = None
    if signals.cost is not None:
        cost_advantages, cost_returns = estimate(signals.cost, episode.cost.values)
        combined = combine_advantages(combined, cost_advantages, multiplier)
    if settings.whiten_advantages:
        combined = whiten(combined, mask, distributed.total)
    return Advantages(combined, reward_returns, cost_returns)


def token_values(backbone: Backbone, critic: str, batch: SequenceBatch) -> Tensor:
    """[B, T] value before each answer token, by a critic with an adapter. Call within `backbone.role(critic)`."""
    hidden = backbone.hidden_states(batch.input_ids, batch.attention_mask, batch.trunk)
    return backbone.head_outputs(critic, hidden[:, -batch.answer_length - 1 : -1])


def measure_log_probs(backbone: Backbone, role: str, batch: SequenceBatch, temperature: float) -> Tensor:
    """[B, T] log-probability of each answer token by a role, without gradients."""

    def measure(part: SequenceBatch) -> Tensor:
        logits = backbone.answer_logits(part.input_ids, part.attention_mask, part.answer_length, part.trunk)
        return token_log_probs(logits, part.answers, temperature)

    with backbone.role(role), backbone.prepared(role):
        return measure_in_parts(batch, _ROWS_PER_FORWARD, measure) * batch.answer_mask
