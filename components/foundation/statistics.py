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


def win_rate(ours: Sequence[float], theirs: Sequence[float], confidence: float) -> Estimate:
    """Share of comparisons that we win; a tie counts one half."""
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True))
    return wilson(wins, len(ours), confidence)
