"""The PPO-Lagrangian training loop (paper section 3.3, algorithm in appendix B).

Each step: 1 roll out, 2 score, 3 shape, 4 advantages, 5 update actor and critics, 6 multiplier, 7 log.
Several ranks share a rollout batch: each generates and scores its own episodes, and what depends on all of them (costs,
whitening, losses, means) is summed over ranks, so lambda is the same on every one.
Shapes: B episodes (of this rank), P prompt tokens, T answer tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from components.foundation import distributed
from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.batching import (
    SequenceBatch,
    TokenSequence,
    answer_cross_entropy,
    answer_tokens,
    collate,
    last_answer_token,
    token_log_probs,
)
from components.foundation.optimization import cosine_factor
from components.foundation.policy import ACTOR
from components.foundation.role_optimizer import UpdateGuard, make_optimizers
from components.foundation.rollout import Rollout, RolloutEngine, Sampling
from components.foundation.settings import PpoSettings
from components.ppo_lagrangian.health import check_kl, check_scores
from components.ppo_lagrangian.multiplier import CostConstraint
from components.ppo_lagrangian.multiplier_rule import next_multiplier, start_multiplier
from components.ppo_lagrangian.objective import (
    actor_loss,
    aggregate_cost,
    combine_advantages,
    critic_loss,
    generalized_advantages,
    importance_weights,
    macro_action_advantages,
    ngram_actions,
    perplexity_actions,
    rollout_drift,
    shape_rewards,
    whiten,
)
from components.ppo_lagrangian.share import Minibatch, Share

REWARD, COST = "reward", "cost"
REWARD_CRITIC, COST_CRITIC = "reward_critic", "cost_critic"

# No gradient is kept for log-probabilities that only measure: a few rows at a time bound the [B, T, V] logits.
_ROWS_PER_FORWARD = 16


@dataclass(frozen=True)
class Appraisal:
    """What one model and its critic say of a rollout batch.

    Attributes:
        score: [B] of the whole answers; rewards hold the missing-EOS penalty, costs are aggregated.
        values: [B, T] the critic's values *before* each answer token.
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
class Advantages:
    """[B, T] combined advantages and the critics' targets; None for a critic that is not in use."""

    combined: Tensor
    reward_returns: Tensor
    cost_returns: Tensor | None


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
    ptx_loss: float
    reward_critic_loss: float
    cost_critic_loss: float
    rollout_tokens_per_second: float
    ended_share: float
    skipped_updates: int
    drift: float


class PpoLagrangian:
    """Holds the six roles, the optimisers of the trained ones (by role) and the multiplier.

    `demonstrations` are what the actor must not forget: with `ppo.ptx_coefficient` above 0, each of its updates also
    lowers the language-model loss on as many of them as there are episodes in the minibatch.
    """

    def __init__(
        self,
        backbone: Backbone,
        engine: RolloutEngine,
        settings: PpoSettings,
        constraint: CostConstraint,
        seed: int,
        demonstrations: Sequence[TokenSequence] = (),
    ) -> None:
        self._backbone = backbone
        self._engine = engine
        self._settings = settings
        self._constraint = constraint
        self._seed = seed
        self._demonstrations = demonstrations
        self._guard = UpdateGuard(settings.max_skipped_updates)
        self.multiplier = start_multiplier(settings)
        rates = {ACTOR: settings.actor_learning_rate}
        if settings.advantage_source == "models":
            rates |= dict.fromkeys((REWARD_CRITIC, COST_CRITIC), settings.critic_learning_rate)
        self.optimizers = make_optimizers(backbone, rates)

    def step(self, prompts: Sequence[tuple[int, ...]], step: int, score: Score | None = None) -> StepMetrics:
        """One rollout batch and its update. `score` judges the answers; without it, the reward and the cost model do.

        Raises:
            DivergenceError: a score or too many updates are not finite, or KL is above `ppo.max_kl`.
        """
        s = self._settings
        # 1 roll out
        sampling = Sampling(s.temperature, s.max_new_tokens, self._seed * 1_000_003 + step, s.top_p, s.top_k)
        started = time.perf_counter()
        places = self._own_places(len(prompts), step)
        rollout = self._engine.generate(prompts, sampling, places)
        rollout_seconds = time.perf_counter() - started
        sequences = [TokenSequence(tuple(prompts[i]), a) for i, a in zip(places, rollout.answers, strict=True)]
        # 2 score
        episode = score(sequences) if score else score_episode(self._backbone, sequences, s, self._constraint.floor)
        episode = weigh_tokens(episode, rollout, s.importance_cap)
        check_scores("reward", episode.reward.score.tolist(), step)
        check_scores("cost", episode.cost.score.tolist(), step)
        own = torch.tensor(places)
        lengths = distributed.every_row(answer_tokens(sequences), own, len(prompts))
        means = self._means(episode, rollout, int(lengths.sum()), len(prompts))
        check_kl(means["kl"], s.max_kl, step)
        # 3 shape, 4 advantages
        advantages = compute_advantages(episode, s, self.multiplier.value)
        # 5 update
        losses = self._update(episode, advantages, Share(own, lengths), step)
        # 6 multiplier
        costs = distributed.every_number(episode.costs, own, len(prompts))
        self.multiplier = next_multiplier(self.multiplier, costs, s, self._constraint.threshold)
        # 7 log
        losses = distributed.total_of(losses)
        tokens = int(lengths.sum())
        return StepMetrics(
            multiplier=self.multiplier.value,
            cost_moving_average=self.multiplier.cost_moving_average,
            cost=math.fsum(costs) / len(costs),
            reward=means["reward"],
            kl=means["kl"],
            clip_fraction=losses["clipped"] / (tokens * s.epochs),
            actor_loss=losses[ACTOR],
            ptx_loss=losses["ptx"],
            reward_critic_loss=losses[REWARD_CRITIC],
            cost_critic_loss=losses[COST_CRITIC],
            rollout_tokens_per_second=tokens / rollout_seconds,
            ended_share=means["ended"],
            skipped_updates=self._guard.skipped,
            drift=means["drift"],
        )

    def _means(self, episode: Episode, rollout: Rollout, tokens: int, episodes: int) -> dict[str, float]:
        """What is reported of all ranks' episodes: means over `tokens` (kl, drift) and over `episodes`."""
        own, eos = len(rollout.answers), self._backbone.eos_token_id
        sums = distributed.total_of(
            {
                "kl": episode.total_kl,
                "drift": episode.drift * int(episode.batch.answer_mask.sum()),
                "reward": episode.mean_reward * own,
                "ended": sum(answer[-1] == eos for answer in rollout.answers),
            }
        )
        return {name: value / (tokens if name in ("kl", "drift") else episodes) for name, value in sums.items()}

    def _order(self, count: int, step: int, epoch: int) -> tuple[Tensor, torch.Generator]:
        """The order in which an epoch takes the episodes of all ranks, and the generator for what else it draws."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step * 101 + epoch)
        return torch.randperm(count, generator=generator), generator

    def _own_places(self, count: int, step: int) -> list[int]:
        """Places of this rank's episodes in the rollout batch; of each minibatch of the first epoch every rank has as
        many, or one more."""
        world = distributed.world()
        return sorted(self._order(count, step, epoch=0)[0][world.rank :: world.size].tolist())

    def _update(self, episode: Episode, advantages: Advantages, share: Share, step: int) -> dict[str, float]:
        """Every epoch passes once over the episodes in minibatches; returns the last losses and clipped tokens, of
        which each rank has its part."""
        s = self._settings
        losses = {"clipped": 0.0, "ptx": 0.0, REWARD_CRITIC: 0.0, COST_CRITIC: 0.0}
        critics = (
            (REWARD_CRITIC, episode.reward, advantages.reward_returns),
            (COST_CRITIC, episode.cost, advantages.cost_returns),
        )
        if s.actor_schedule == "cosine":
            factor = cosine_factor(step, s.steps, warmup_share=0.0)
            self.optimizers[ACTOR].set_learning_rate(s.actor_learning_rate * factor)
        for epoch in range(s.epochs):
            order, generator = self._order(len(share.tokens), step, epoch)
            demonstrations = self._draw_demonstrations(share, generator) if s.ptx_coefficient else None
            for places in order.split(s.minibatch_size):
                minibatch = share.minibatch(places)
                update = self._update_actor(episode, advantages.combined, minibatch, demonstrations, step)
                losses |= update | {"clipped": losses["clipped"] + update["clipped"]}
                for critic, appraisal, returns in critics:
                    if critic in self.optimizers and returns is not None:
                        losses[critic] = self._update_critic(critic, episode.batch, appraisal, returns, minibatch, step)
        return losses

    def _draw_demonstrations(self, share: Share, generator: torch.Generator) -> tuple[SequenceBatch, Tensor]:
        """One demonstration for each episode, drawn with replacement -> (this rank's, answer tokens of all)."""
        drawn = torch.randint(len(self._demonstrations), (len(share.tokens),), generator=generator).tolist()
        sequences = [self._demonstrations[i] for i in drawn]
        return collated(self._backbone, [sequences[i] for i in share.places.tolist()]), answer_tokens(sequences)

    def _update_actor(
        self,
        episode: Episode,
        advantages: Tensor,
        minibatch: Minibatch,
        demonstrations: tuple[SequenceBatch, Tensor] | None,
        step: int,
    ) -> dict[str, float]:
        rows, optimizer = minibatch.rows, self.optimizers[ACTOR]
        batch = episode.batch.rows(rows)
        ptx = 0.0
        with self._backbone.role(ACTOR, train=True):
            loss, clipped = actor_loss(
                token_log_probs(self._answer_logits(batch), batch.answers, self._settings.temperature),
                episode.log_probs[rows],
                advantages[rows],
                batch.answer_mask,
                clip_ratio=self._settings.clip_ratio,
                total_tokens=minibatch.tokens,
                weights=None if episode.weights is None else episode.weights[rows],
            )
            loss = minibatch.counts * loss
            optimizer.backward(loss)
            if demonstrations is not None:
                demonstrated = demonstrations[0].rows(rows)
                ptx_loss = minibatch.counts * answer_cross_entropy(
                    self._answer_logits(demonstrated), demonstrated, demonstrations[1][minibatch.places].sum()
                )
                optimizer.backward(self._settings.ptx_coefficient * ptx_loss)
                ptx = ptx_loss.item()
        self._step_optimizer(ACTOR, loss.item() + self._settings.ptx_coefficient * ptx, step)
        return {ACTOR: loss.item(), "ptx": ptx, "clipped": minibatch.counts * clipped.item()}

    def _step_optimizer(self, role: str, loss: float, step: int) -> None:
        norm = self._settings.max_gradient_norm
        self._guard.update(role, self.optimizers[role], loss=loss, max_gradient_norm=norm, step=step + 1)

    def _answer_logits(self, batch: SequenceBatch) -> Tensor:
        return self._backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length, batch.trunk)

    def _update_critic(
        self,
        critic: str,
        all_rows: SequenceBatch,
        appraisal: Appraisal,
        returns: Tensor,
        minibatch: Minibatch,
        step: int,
    ) -> float:
        rows, optimizer = minibatch.rows, self.optimizers[critic]
        batch = all_rows.rows(rows)
        with self._backbone.role(critic, train=True):
            if appraisal.features is not None:
                values = self._backbone.head_outputs(critic, appraisal.features[rows])
            else:
                values = token_values(self._backbone, critic, batch)
            loss = critic_loss(
                values,
                appraisal.values[rows],
                returns[rows],
                batch.answer_mask,
                value_clip=self._settings.value_clip,
                total_tokens=minibatch.tokens,
            )
            loss = minibatch.counts * loss
            optimizer.backward(loss)
        self._step_optimizer(critic, loss.item(), step)
        return loss.item()


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
    """Score a batch by a model and value it by the model's critic: one pass where the critic is a head, else two."""
    with backbone.role(model):
        hidden = backbone.hidden_states(batch.input_ids, batch.attention_mask, batch.trunk)
        answer_scores = backbone.head_outputs(model, hidden[:, -batch.answer_length :])
        features = None if backbone.has_adapter(critic) else _before_answer_tokens(hidden, batch)
    with backbone.role(critic):
        values = token_values(backbone, critic, batch) if features is None else backbone.head_outputs(critic, features)
    return Appraisal(last_answer_token(answer_scores, batch.answer_mask), values * batch.answer_mask, features)


def compute_advantages(episode: Episode, settings: PpoSettings, multiplier: float) -> Advantages:
    """Shape both signals, estimate both advantages, combine them by the multiplier, then whiten.

    With `ppo.reward_shaping` nu there is one signal, reward - nu cost, and one critic, the reward's.
    """
    mask = episode.batch.answer_mask
    # without critics there is no value to stop at: the advantage of a token is all that follows
    gae_lambda = settings.gae_lambda if settings.advantage_source == "models" else 1.0
    discounts = {"gamma": settings.gamma, "gae_lambda": gae_lambda}

    def estimate(appraisal: Appraisal, kl_sign: float) -> tuple[Tensor, Tensor]:
        shaped = shape_rewards(
            episode.log_probs,
            episode.reference_log_probs,
            appraisal.score,
            mask,
            kl_coefficient=settings.kl_coefficient,
            kl_sign=kl_sign,
            clip=settings.score_clip,
        )
        if settings.macro_action == "none":
            return generalized_advantages(shaped, appraisal.values, mask, **discounts)
        if settings.macro_action == "ngram":
            actions = ngram_actions(mask, settings.macro_action_length)
        else:
            actions = perplexity_actions(episode.log_probs, mask)
        return macro_action_advantages(shaped, appraisal.values, mask, actions, **discounts)

    cost_returns = None
    if settings.reward_shaping is not None:
        score = episode.reward.score - settings.reward_shaping * episode.cost.score
        combined, reward_returns = estimate(replace(episode.reward, score=score), -1.0)
    else:
        reward_advantages, reward_returns = estimate(episode.reward, -1.0)
        cost_advantages, cost_returns = estimate(episode.cost, +1.0)
        combined = combine_advantages(reward_advantages, cost_advantages, multiplier)
    if settings.whiten_advantages:
        combined = whiten(combined, mask, distributed.total)
    return Advantages(combined, reward_returns, cost_returns)


def token_values(backbone: Backbone, critic: str, batch: SequenceBatch) -> Tensor:
    """[B, T] value before each answer token, by a critic with an adapter. Call within `backbone.role(critic)`."""
    hidden = backbone.hidden_states(batch.input_ids, batch.attention_mask, batch.trunk)
    return backbone.head_outputs(critic, _before_answer_tokens(hidden, batch))


def _before_answer_tokens(per_token: Tensor, batch: SequenceBatch) -> Tensor:
    """[B, L, ...] -> [B, T, ...] entries at the token before each answer token."""
    return per_token[:, -batch.answer_length - 1 : -1]


def measure_log_probs(backbone: Backbone, role: str, batch: SequenceBatch, temperature: float) -> Tensor:
    def measure(rows: Tensor) -> Tensor:
        part = batch.rows(rows)
        logits = backbone.answer_logits(part.input_ids, part.attention_mask, part.answer_length, part.trunk)
        return token_log_probs(logits, part.answers, temperature)

    with backbone.role(role):
        chunks = list(torch.arange(len(batch.input_ids), device=backbone.device).split(_ROWS_PER_FORWARD))
        measured = [measure(rows) for rows in chunks]
        for _ in range(distributed.maximum(len(chunks)) - len(chunks)):
            measure(chunks[0])  # partitioned weights are gathered by all ranks or by none
        return torch.cat(measured) * batch.answer_mask
