"""Bradley-Terry ratings of all policies on the Elo scale, from their answers to the same held-out prompts.

Policy i beats policy j with probability 1 / (1 + exp(theta_j - theta_i)). Two ladders are kept apart, as the paper
keeps helpfulness and harmlessness apart. A difference of 400 points means odds of 10 to 1.

Every two policies get one virtual tie (half a win each). Without it a policy that never loses would be infinitely
strong; with it, 140 wins to nothing count as 140.5 to 0.5, which is about 980 points.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ANCHOR = 1000.0
"""Rating of the first policy, the SFT model."""

POINTS_PER_NAT = 400.0 / math.log(10.0)
_VIRTUAL_TIES = 1.0
_RESAMPLES = 200
_TOLERANCE = 1e-10
_MAX_ITERATIONS = 20_000


@dataclass(frozen=True)
class Rating:
    """Elo rating with the interval of a bootstrap over prompts; the anchor has no width."""

    value: float
    low: float
    high: float


def ladder(scores: Sequence[Mapping[str, float]], confidence: float, seed: int = 0) -> list[Rating]:
    """Ratings of policies, the first one anchored.

    Args:
        scores: for each policy, prompt -> score; of two policies, the higher score wins and equal scores tie.
        confidence: two-sided, for instance 0.95.
        seed: of the bootstrap.
    """
    prompts = sorted(set().union(*scores))
    values = elo(count_wins(scores, prompts))
    rng = random.Random(seed)
    samples = [
        elo(count_wins(scores, rng.choices(prompts, k=len(prompts)))) for _ in range(_RESAMPLES if prompts else 0)
    ]
    tail = (1.0 - confidence) / 2.0
    ratings = []
    for policy, value in enumerate(values):
        drawn = sorted(sample[policy] for sample in samples) or [value]
        low, high = _quantile(drawn, tail), _quantile(drawn, 1.0 - tail)
        ratings.append(Rating(value, min(low, value), max(high, value)))
    return ratings


def count_wins(scores: Sequence[Mapping[str, float]], prompts: Sequence[str]) -> list[list[float]]:
    """wins[i][j] = comparisons that policy i won against j, ties half; a prompt counts where both answered it."""
    wins = [[0.0] * len(scores) for _ in scores]
    for prompt in prompts:
        known = [(i, mine[prompt]) for i, mine in enumerate(scores) if prompt in mine]
        for position, (i, ours) in enumerate(known):
            for j, theirs in known[position + 1 :]:
                won = 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
                wins[i][j] += won
                wins[j][i] += 1.0 - won
    return wins


def elo(wins: Sequence[Sequence[float]]) -> list[float]:
    """Wins -> ratings, the first policy at ANCHOR."""
    strengths = bradley_terry(wins)
    return [ANCHOR + POINTS_PER_NAT * (theta - strengths[0]) for theta in strengths]


def bradley_terry(wins: Sequence[Sequence[float]], virtual_ties: float = _VIRTUAL_TIES) -> list[float]:
    """Most likely log-strengths, with mean zero, by minorisation-maximisation (Hunter 2004).

    Args:
        wins: [P, P] wins of the row's policy against the column's; at least two policies.
        virtual_ties: added between every two policies; greater than zero.
    """
    count = len(wins)
    others = [[j for j in range(count) if j != i] for i in range(count)]
    won = [sum(wins[i][j] + virtual_ties / 2 for j in others[i]) for i in range(count)]
    games = [[wins[i][j] + wins[j][i] + virtual_ties for j in range(count)] for i in range(count)]
    theta = [0.0] * count
    for _ in range(_MAX_ITERATIONS):
        strength = [math.exp(t) for t in theta]
        raw = [
            math.log(won[i]) - math.log(sum(games[i][j] / (strength[i] + strength[j]) for j in others[i]))
            for i in range(count)
        ]
        mean = sum(raw) / count
        new = [value - mean for value in raw]
        moved = max(abs(a - b) for a, b in zip(new, theta, strict=True))
        theta = new
        if moved < _TOLERANCE:
            break
    return theta


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
