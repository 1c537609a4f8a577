"""Rates with confidence intervals, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from components.foundation.results import Estimate


def wilson(successes: float, n: int, confidence: float) -> Estimate:
    """Wilson score interval of a proportion (Wilson 1927); (0, 0, 1) when there were no trials.

    Args:
        successes: number of successes; ties may count one half.
        confidence: two-sided, for instance 0.95.
    """
    if n == 0:
        return Estimate(value=0.0, low=0.0, high=1.0, n=0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Estimate(value=p, low=low, high=high, n=n)


def share(flags: Sequence[bool], confidence: float) -> Estimate:
    """Share of true flags."""
    return wilson(sum(flags), len(flags), confidence)


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool], confidence: float) -> Estimate:
    """How much more often our flag is true than theirs, over the same trials; in [-1, 1].

    The interval is that of Agresti and Min (2005): Wald's, with half a trial more in each cell of the 2 x 2 table.
    """
    n = len(ours)
    only_ours = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    if n == 0:
        return Estimate(value=0.0, low=-1.0, high=1.0, n=0)
    total, discordant, surplus = n + 2, only_ours + only_theirs + 1, only_ours - only_theirs
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, half = surplus / total, z * math.sqrt(discordant - surplus**2 / total) / total
    return Estimate(value=surplus / n, low=max(-1.0, centre - half), high=min(1.0, centre + half), n=n)


def win_rate(ours: Sequence[float], theirs: Sequence[float], confidence: float) -> Estimate:
    """Share of comparisons that we win; a tie counts one half."""
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True))
    return wilson(wins, len(ours), confidence)
