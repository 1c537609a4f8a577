"""The PPO-Lagrangian training loop (paper section 3.3, algorithm in appendix B).

Each step: 1 roll out, 2 score, 3 shape, 4 advantages, 5 update actor and critics, 6 multiplier, 7 log. Critics that
are heads are fitted between 3 and 4, and have no part in 5.
Several ranks share a rollout batch: each generates and scores its own episodes, and what depends on all of them (costs,
whitening, losses, means) is summed over ranks, so lambda is the same on every one.
Shapes: B episodes (of this rank), P prompt tokens, T answer tokens.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from components.foundation import distributed
from components.foundation.backbone import Backbone
from components.foundation.batching import (
    SequenceBatch,
    TokenSequence,
    answer_cross_entropy,
    answer_tokens,
    token_log_probs,
)
from components.foundation.optimization import cosine_factor, trapezoid_factor
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.role_optimizer import TrainedRole, UpdateGuard, make_optimizers
from components.foundation.rollout import Rollout, RolloutEngine, Sampling
from components.ppo_lagrangian.averaged_role import AveragedRole
from components.ppo_lagrangian.draws import take
from components.ppo_lagrangian.episode import (
    COST_CRITIC,
    REWARD_CRITIC,
    Advantages,
    Appraisal,
    Episode,
    Score,
    Signals,
    collated,
    compute_advantages,
    score_episode,
    shape_signals,
    token_values,
    weigh_tokens,
)
from components.ppo_lagrangian.head_critic import FOLDS, HeadCritic
from components.ppo_lagrangian.health import check_kl, check_scores
from components.ppo_lagrangian.multiplier import CostConstraint
from components.ppo_lagrangian.multiplier_rule import next_multiplier, start_multiplier
from components.ppo_lagrangian.objective import (
    actor_loss,
    critic_loss,
    position_weights,
    returns_to_go,
    total_weight,
)
from components.ppo_lagrangian.share import Minibatch, Share

log = logging.getLogger("saferlhf")


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
    """Holds the six roles, how the trained ones are trained (by role) and the multiplier.

    `demonstrations` are what the actor must not forget: with `ppo.ptx_coefficient` above 0, each of its updates also
    lowers the language-model loss on as many of them as there are episodes in the minibatch. Where
    `attack_demonstrations` are set, answers to attacks that it shall give, `ppo.red_team_share` of those are such.
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
        self.demonstrations = demonstrations
        self.attack_demonstrations: Sequence[TokenSequence] = ()
        self.guard = UpdateGuard(settings.max_skipped_updates)
        self.multiplier = start_multiplier(settings)
        rates = {ACTOR: settings.actor_learning_rate}
        critics = (REWARD_CRITIC, COST_CRITIC) if settings.advantage_source == "models" else ()
        rates |= {critic: settings.critic_learning_rate for critic in critics if backbone.has_adapter(critic)}
        self.optimizers = make_optimizers(backbone, rates)
        self.actor_mean = AveragedRole(backbone, ACTOR, self.optimizers[ACTOR])
        self.head_critics = {
            critic: HeadCritic(backbone, critic, settings.critic_ridge, settings.critic_memory)
            for critic in critics
            if critic not in rates
        }

    @property
    def trained(self) -> dict[str, TrainedRole]:
        """What a checkpoint must keep, by role."""
        return {**self.optimizers, ACTOR: self.actor_mean, **self.head_critics}

    def finish(self) -> None:
        """After a round's last step: from now on the actor is the mean of `ppo.average_steps` of it. All ranks call."""
        if self._settings.average_steps > 1:
            count = min(self._settings.average_steps, self._settings.steps)
            log.info("the policy is the mean of the actor after each of the last %d steps", count)
            self.actor_mean.put_in_place()

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
        signals = shape_signals(episode, s)
        episode = self._fit_heads(episode, signals, own, step)
        advantages = compute_advantages(episode, signals, s, self.multiplier.value)
        # 5 update
        losses = self._update(episode, advantages, Share(own, lengths), step)
        if s.average_steps > 1 and step >= s.steps - s.average_steps:
            self.actor_mean.take()
        # 6 multiplier
        costs = distributed.every_number(episode.costs, own, len(prompts))
        order = self._order(len(costs), step, epoch=0)  # attacks come first, and the window may hold part of a batch
        shuffled = [costs[i] for i in order.tolist()]
        self.multiplier = next_multiplier(self.multiplier, shuffled, s, self._constraint.threshold)
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
            skipped_updates=self.guard.skipped,
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

    def _order(self, count: int, step: int, epoch: int) -> Tensor:
        """The order in which an epoch takes the episodes of all ranks."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step * 101 + epoch)
        return torch.randperm(count, generator=generator)

    def _own_places(self, count: int, step: int) -> list[int]:
        """Places of this rank's episodes in the rollout batch; of each minibatch of the first epoch every rank has as
        many, or one more."""
        world = distributed.world()
        return sorted(self._order(count, step, epoch=0)[world.rank :: world.size].tolist())

    def _fit_heads(self, episode: Episode, signals: Signals, places: Tensor, step: int) -> Episode:
        """The episode with the values of critics that are heads; `places` are those of this rank's episodes."""
        mask = episode.batch.answer_mask
        order = self._order(self._settings.episodes_per_step, step, epoch=0)
        folds = order.argsort()[places] % FOLDS

        def valued(critic: str, appraisal: Appraisal, signal: Tensor | None) -> Appraisal:
            if critic not in self.head_critics or signal is None or appraisal.features is None:
                return appraisal
            returns = returns_to_go(signal, mask, self._settings.gamma)
            values = self.head_critics[critic].fit(appraisal.features, returns, mask, folds)
            return replace(appraisal, values=values)

        return replace(
            episode,
            reward=valued(REWARD_CRITIC, episode.reward, signals.reward),
            cost=valued(COST_CRITIC, episode.cost, signals.cost),
        )

    def _update(self, episode: Episode, advantages: Advantages, share: Share, step: int) -> dict[str, float]:
        """Every epoch passes once over the episodes in minibatches; returns the last losses and clipped tokens, of
        which each rank has its part."""
        s = self._settings
        losses = {"clipped": 0.0, "ptx": 0.0, REWARD_CRITIC: 0.0, COST_CRITIC: 0.0}
        critics = (
            (REWARD_CRITIC, episode.reward, advantages.reward_returns),
            (COST_CRITIC, episode.cost, advantages.cost_returns),
        )
        if s.actor_schedule != "constant":
            schedule = cosine_factor if s.actor_schedule == "cosine" else trapezoid_factor
            factor = schedule(step, s.steps, s.actor_warmup_share)
            self.optimizers[ACTOR].set_learning_rate(s.actor_learning_rate * factor)
        for epoch in range(s.epochs):
            order = self._order(len(share.tokens), step, epoch)
            demonstrations = self._draw_demonstrations(share, step * s.epochs + epoch) if s.ptx_coefficient else None
            for places in order.split(s.minibatch_size):
                minibatch = share.minibatch(places)
                update = self._update_actor(episode, advantages.combined, minibatch, demonstrations, step)
                losses |= update | {"clipped": losses["clipped"] + update["clipped"]}
                for critic, appraisal, returns in critics:
                    if critic in self.optimizers and returns is not None:
                        losses[critic] = self._update_critic(critic, episode.batch, appraisal, returns, minibatch, step)
        for critic, appraisal, returns in critics:
            if critic in self.head_critics and returns is not None:
                losses[critic] = self._critic_loss(
                    appraisal.values, appraisal.values, returns, episode.batch, int(share.tokens.sum())
                ).item()
        return losses

    def _draw_demonstrations(self, share: Share, number: int) -> tuple[SequenceBatch, Tensor]:
        """Portion `number` of the demonstrations, one for each episode -> (this rank's, answer tokens of all)."""
        count = len(share.tokens)
        n_attacks = round(self._settings.red_team_share * count) if self.attack_demonstrations else 0
        sequences = [
            *take(self.attack_demonstrations, number, n_attacks, f"{self._seed}/attacks"),
            *take(self.demonstrations, number, count - n_attacks, f"{self._seed}/harmless"),
        ]
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
        tokens = slice(batch.answer_length)
        weights = self._position_weights(batch)
        if episode.weights is not None:
            weights = weights * episode.weights[rows, tokens]
        ptx = 0.0
        with self._backbone.role(ACTOR, train=True):
            loss, clipped = actor_loss(
                token_log_probs(self._answer_logits(batch), batch.answers, self._settings.temperature),
                episode.log_probs[rows, tokens],
                advantages[rows, tokens],
                batch.answer_mask,
                clip_ratio=self._settings.clip_ratio,
                total_tokens=self._total_weight(minibatch.lengths),
                weights=weights,
            )
            loss = minibatch.counts * loss
            optimizer.backward(loss)
            if demonstrations is not None:
                demonstrated = demonstrations[0].rows(rows)
                ptx_loss = minibatch.counts * answer_cross_entropy(
                    self._answer_logits(demonstrated),
                    demonstrated,
                    self._total_weight(demonstrations[1][minibatch.places]),
                    self._position_weights(demonstrated),
                )
                optimizer.backward(self._settings.ptx_coefficient * ptx_loss)
                ptx = ptx_loss.item()
        self._step_optimizer(ACTOR, loss.item() + self._settings.ptx_coefficient * ptx, step)
        return {ACTOR: loss.item(), "ptx": ptx, "clipped": minibatch.counts * clipped.item()}

    def _position_weights(self, batch: SequenceBatch) -> Tensor:
        """[T] what each place in an answer counts in the actor's losses."""
        s = self._settings
        return position_weights(batch.answer_length, s.opening_tokens, s.continuation_weight).to(batch.answers.device)

    def _total_weight(self, lengths: Tensor) -> float:
        return total_weight(lengths, self._settings.opening_tokens, self._settings.continuation_weight)

    def _step_optimizer(self, role: str, loss: float, step: int) -> None:
        norm = self._settings.max_gradient_norm
        self.guard.update(role, self.optimizers[role], loss=loss, max_gradient_norm=norm, step=step + 1)

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
            values = token_values(self._backbone, critic, batch)
            tokens = slice(batch.answer_length)
            loss = self._critic_loss(
                values, appraisal.values[rows, tokens], returns[rows, tokens], batch, minibatch.tokens
            )
            loss = minibatch.counts * loss
            optimizer.backward(loss)
        self._step_optimizer(critic, loss.item(), step)
        return loss.item()

    def _critic_loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, batch: SequenceBatch, tokens: int
    ) -> Tensor:
        value_clip = self._settings.value_clip
        return critic_loss(values, old_values, returns, batch.answer_mask, value_clip=value_clip, total_tokens=tokens)
