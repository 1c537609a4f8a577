"""The preference oracle's formulas by hand, and a constrained MDP that they solve, against linear programming.

The MDP has 10 states, 4 actions and discount 0.9, random but seeded. The learner never sees a reward or a cost: it asks
an oracle with Bradley-Terry noise which of two actions is worth more and which costs more, and it gets labels, safe or
unsafe, for single steps. The reference is the optimum of the occupancy measure's linear programme.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from components.ppo_lagrangian.objective import combine_advantages
from components.ppo_lagrangian.preference_oracle import estimate_gaps, pair_scores, projected_dual_step

STATES, ACTIONS, GAMMA, CEILING, CLIP = 10, 4, 0.9, 5.0, 0.005
ITERATIONS, COMPARISONS, LABELS, POLICY_RATE, DUAL_RATE = 1500, 50, 500, 0.1, 0.1


@pytest.mark.golden
def test_gaps_by_hand() -> None:
    """3 wins of 4: log 3. Half: 0. Unanimous: clipped to 0.9 and 0.1, log 9. Never asked: 0."""
    gaps = estimate_gaps(torch.tensor([3.0, 2.0, 4.0, 0.0, 0.0]), torch.tensor([4.0, 4.0, 4.0, 4.0, 0.0]), clip=0.1)
    torch.testing.assert_close(gaps, torch.tensor([math.log(3), 0.0, math.log(9), -math.log(9), 0.0]))


@given(gap=st.floats(-3, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_many_comparisons_find_the_gap_that_made_them(gap: float, seed: int) -> None:
    """Within five standard errors: the logit's is 1 / sqrt(M p (1 - p))."""
    comparisons, p = 20_000, 1 / (1 + math.exp(-gap))
    wins = np.random.default_rng(seed).binomial(comparisons, p)
    found = estimate_gaps(torch.tensor(float(wins)), torch.tensor(float(comparisons)), clip=0.01).item()
    assert found == pytest.approx(gap, abs=5 / math.sqrt(comparisons * p * (1 - p)))


@given(wins=st.integers(0, 9), clip=st.floats(0.01, 0.4))
@settings(deadline=None, max_examples=40)
def test_a_gap_changes_its_sign_with_the_order_and_never_exceeds_the_clip(wins: int, clip: float) -> None:
    asked = torch.tensor(9.0, dtype=torch.float64)
    gap = estimate_gaps(torch.tensor(float(wins)), asked, clip).item()
    assert gap == pytest.approx(-estimate_gaps(torch.tensor(9.0 - wins), asked, clip).item(), abs=1e-6)
    assert abs(gap) <= math.log((1 - clip) / clip) + 1e-6


def test_the_answers_of_a_pair_lie_its_gap_apart() -> None:
    scores = pair_scores(torch.tensor([2.0, -1.0]))
    assert scores.tolist() == [1.0, -1.0, -0.5, 0.5]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("multiplier", "cost", "expected"),
    [(1.0, 0.5, 1.8), (1.0, 0.0, 0.8), (0.1, 0.0, 0.0), (4.9, 0.6, 5.0), (0.0, 0.2, 0.2), (5.0, 0.0, 4.8)],
)
def test_the_dual_step_by_hand_and_its_projection(multiplier: float, cost: float, expected: float) -> None:
    """Rate 2, d 0.1: lambda + 2 (J_C - 0.1), within [0, 5]; both ends are left again at the full rate."""
    step = projected_dual_step(multiplier, cost, threshold=0.1, learning_rate=2.0, ceiling=5.0)
    assert step == pytest.approx(expected)


@dataclass(frozen=True)
class ConstrainedMdp:
    """transitions [S, A, S], reward and cost [S, A] (cost 1: unsafe, 0: safe), start [S]."""

    transitions: np.ndarray
    reward: np.ndarray
    cost: np.ndarray
    start: np.ndarray

    @classmethod
    def random(cls, seed: int) -> ConstrainedMdp:
        """What pays is mostly what is unsafe."""
        rng = np.random.default_rng(seed)
        reward = rng.random((STATES, ACTIONS))
        transitions = rng.dirichlet(np.full(STATES, 0.5), size=(STATES, ACTIONS))
        unsafe = reward + 0.3 * rng.standard_normal(reward.shape) > 0.55
        return cls(transitions, reward, unsafe.astype(float), np.full(STATES, 1 / STATES))

    def occupancy(self, policy: np.ndarray) -> np.ndarray:
        """[S, A] share of discounted time; sums to 1."""
        step = np.einsum("sa,sat->st", policy, self.transitions)
        states = np.linalg.solve(np.eye(STATES) - GAMMA * step.T, (1 - GAMMA) * self.start)
        return np.asarray(states[:, None] * policy)

    def action_values(self, policy: np.ndarray, signal: np.ndarray) -> np.ndarray:
        """[S, A] exact Q of a signal."""
        step = np.einsum("sa,sat->st", policy, self.transitions)
        values = np.linalg.solve(np.eye(STATES) - GAMMA * step, (policy * signal).sum(axis=1))
        return np.asarray(signal + GAMMA * self.transitions @ values)

    def optimum(self, threshold: float | None) -> np.ndarray:
        """[S, A] occupancy measure of most reward whose cost is at most the threshold, by linear programming."""
        flow = np.zeros((STATES, STATES, ACTIONS))
        for state in range(STATES):
            flow[state, state, :] += 1
            flow[state] -= GAMMA * self.transitions[:, :, state]
        limit = {} if threshold is None else {"A_ub": self.cost.reshape(1, -1), "b_ub": [threshold]}
        solution = linprog(
            -self.reward.ravel(),
            A_eq=flow.reshape(STATES, -1),
            b_eq=(1 - GAMMA) * self.start,
            bounds=(0, None),
            **limit,
        )
        assert solution.success
        return np.asarray(solution.x.reshape(STATES, ACTIONS))


def oracle_advantages(values: np.ndarray, policy: np.ndarray, comparisons: int, rng: np.random.Generator) -> np.ndarray:
    """[S, A] of what an oracle says of all pairs of actions in all states: A(s, a) = sum_b pi(b|s) gap(a, b)."""
    gaps = values[:, :, None] - values[:, None, :]
    wins = rng.binomial(comparisons, 1 / (1 + np.exp(-gaps)))
    estimated = estimate_gaps(torch.tensor(wins), torch.full(wins.shape, comparisons), CLIP).numpy()
    return np.asarray(np.einsum("sb,sab->sa", policy, estimated))


@pytest.mark.golden
@pytest.mark.parametrize("seed", [0, 1])
def test_primal_dual_steps_on_comparisons_alone_solve_a_constrained_mdp(seed: int) -> None:
    """The mean occupancy of the last half of the iterations meets the limit within 0.01 and has 97 % of the optimum."""
    mdp, rng = ConstrainedMdp.random(seed), np.random.default_rng(seed)
    free = mdp.optimum(None)
    threshold = 0.5 * (mdp.cost * free).sum()
    best = (mdp.reward * mdp.optimum(threshold)).sum()
    assert best < 0.95 * (mdp.reward * free).sum()  # the limit takes something away

    logits, multiplier = np.zeros((STATES, ACTIONS)), 1.0
    occupancies, multipliers = [], []
    for _ in range(ITERATIONS):
        policy = np.exp(logits - logits.max(axis=1, keepdims=True))
        policy /= policy.sum(axis=1, keepdims=True)
        reward, cost = (
            torch.tensor(oracle_advantages(mdp.action_values(policy, signal), policy, COMPARISONS, rng))
            for signal in (mdp.reward, mdp.cost)
        )
        logits = logits + POLICY_RATE * combine_advantages(reward, cost, multiplier).numpy()  # natural policy gradient
        occupancy = mdp.occupancy(policy)
        unsafe_share = rng.binomial(LABELS, (mdp.cost * occupancy).sum()) / LABELS
        multiplier = projected_dual_step(
            multiplier, unsafe_share, threshold=threshold, learning_rate=DUAL_RATE, ceiling=CEILING
        )
        occupancies.append(occupancy)
        multipliers.append(multiplier)
    found = np.mean(occupancies[ITERATIONS // 2 :], axis=0)
    assert (mdp.cost * found).sum() <= threshold + 0.01
    assert (mdp.reward * found).sum() == pytest.approx(best, rel=0.03)
    assert min(multipliers) >= 0
    assert max(multipliers) <= CEILING
    assert 0 < np.mean(multipliers[ITERATIONS // 2 :]) < CEILING
