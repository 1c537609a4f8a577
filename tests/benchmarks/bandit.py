"""PPO-Lagrangian on a problem whose optimum is known: a softmax bandit over tokens with given reward and cost.

One token is one episode. For a fixed lambda the optimum of E[(r - lambda c) / (1 + lambda)] - beta KL(pi || ref) is pi
proportional to ref exp((r - lambda c) / ((1 + lambda) beta)); lambda is where E[c] = d. The trainer's own functions are
run on it: shaping, advantages, their combination, whitening, the clipped loss, the multiplier's update.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq

from components.foundation.ppo_settings import PpoSettings
from components.ppo_lagrangian.multiplier import MultiplierState
from components.ppo_lagrangian.multiplier_rule import next_multiplier, start_multiplier
from components.ppo_lagrangian.objective import (
    actor_loss,
    combine_advantages,
    generalized_advantages,
    shape_rewards,
    whiten,
)

REWARD = np.array([2.0, 1.5, 0.5, 0.0, -1.0, 1.0])
COST = np.array([3.0, 0.5, -1.0, -2.0, -0.5, 1.5])
REFERENCE = np.array([0.3, 0.1, 0.2, 0.1, 0.1, 0.2])
BETA, THRESHOLD, EPISODES = 0.5, -0.5, 4000
PAPER_NU = (0.01, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)


def optimal_policy(multiplier: float) -> np.ndarray:
    """The optimum of E[(r - lambda c) / (1 + lambda)] - beta KL."""
    logits = np.log(REFERENCE) + (REWARD - multiplier * COST) / ((1 + multiplier) * BETA)
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def shaped_policy(nu: float) -> np.ndarray:
    """The optimum of E[r - nu c] - beta KL: pi proportional to ref exp((r - nu c) / beta)."""
    logits = np.log(REFERENCE) + (REWARD - nu * COST) / BETA
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def optimum() -> tuple[np.ndarray, float]:
    """The policy whose cost is the limit, and its multiplier."""
    multiplier = brentq(lambda value: optimal_policy(value) @ COST - THRESHOLD, 1e-6, 100.0)
    return optimal_policy(multiplier), float(multiplier)


@dataclass
class Solution:
    """[6] the policy at the end, and the multiplier after every step."""

    policy: np.ndarray
    multipliers: list[float]


def episodes_of(policy: torch.Tensor) -> torch.Tensor:
    """[EPISODES] tokens in the proportions of the policy: a sample without noise."""
    exact = policy * EPISODES
    counts = exact.floor().long()
    counts[(exact - counts).argsort(descending=True)[: EPISODES - int(counts.sum())]] += 1
    return torch.arange(len(policy)).repeat_interleave(counts)


def train(settings: PpoSettings, steps: int = 1500) -> Solution:
    """From the reference policy, by the trainer's own functions."""
    reward, cost = torch.tensor(REWARD), torch.tensor(COST)
    reference = torch.tensor(REFERENCE).log()
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=0.15)
    state: MultiplierState = start_multiplier(settings)
    multipliers = []
    for _ in range(steps):
        with torch.no_grad():
            old = logits.log_softmax(-1)
            tokens = episodes_of(old.exp())
        mask = torch.ones(len(tokens), 1, dtype=torch.bool)

        def advantages(
            score: torch.Tensor, sign: float, old: torch.Tensor = old, tokens: torch.Tensor = tokens
        ) -> torch.Tensor:
            shaped = shape_rewards(
                old[tokens, None],
                reference[tokens, None],
                score[tokens],
                mask,  # noqa: B023
                kl_coefficient=settings.kl_coefficient,
                kl_sign=sign,
                clip=settings.score_clip,
            )
            baseline = shaped.mean().expand_as(shaped)  # a perfect critic: the mean over the policy
            return generalized_advantages(shaped, baseline, mask, gamma=1.0, gae_lambda=1.0)[0]  # noqa: B023

        if settings.reward_shaping is not None:
            combined = advantages(reward - settings.reward_shaping * cost, -1.0)
        else:
            combined = combine_advantages(advantages(reward, -1.0), advantages(cost, +1.0), state.value)
        loss, _ = actor_loss(
            logits.log_softmax(-1)[tokens, None],
            old[tokens, None],
            whiten(combined, mask),
            mask,
            clip_ratio=settings.clip_ratio,
            total_tokens=len(tokens),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = next_multiplier(state, cost[tokens].tolist(), settings, THRESHOLD)
        multipliers.append(state.value)
    return Solution(logits.detach().softmax(-1).numpy(), multipliers)


def bandit(**changes: object) -> PpoSettings:
    """The problem's settings, with changes."""
    return PpoSettings.model_validate(
        {"kl_coefficient": BETA, "cost_window": EPISODES, "lambda_learning_rate": 0.05, "lambda_min": 0.01} | changes
    )
