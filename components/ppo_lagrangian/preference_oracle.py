"""Safe RLHF without fitted models: value gaps from comparisons (policy-gradient primal-dual, arXiv 2604.19024).

An annotator is asked M times which of two answers is better, and which is more harmful. By the Bradley-Terry model
P(first wins) = sigmoid(gap), so the logit of the share of wins estimates how far the two values lie apart. Comparisons
cannot say how harmful a policy is on the whole: for that the dual step needs absolute labels, safe or unsafe.

Shapes: P pairs, B = 2 P answers; the answers of pair i are 2 i and 2 i + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def estimate_gaps(wins: Tensor, comparisons: Tensor, clip: float) -> Tensor:
    """`logit(clip(wins / comparisons))`: by how much the first of each pair is worth more, in nats.

    Args:
        wins, comparisons: of one shape; how often the first won, and how often it was asked. Not asked means gap 0.
        clip: the share of wins is clipped to [clip, 1 - clip], 0 < clip < 1/2, so that unanimity is no infinite gap.
    """
    share = torch.where(comparisons > 0, wins / comparisons.clamp(min=1), 0.5)
    return torch.logit(share.clamp(clip, 1 - clip))


def pair_scores(gaps: Tensor) -> Tensor:
    """[P] gaps -> [B] scores of the answers: half the gap above and half below their pair's mean, which is unknown."""
    return torch.stack([gaps, -gaps], dim=-1).flatten() / 2


def projected_dual_step(
    multiplier: float, cost: float, *, threshold: float, learning_rate: float, ceiling: float
) -> float:
    """`lambda + learning_rate (J_C - d)`, projected on [0, ceiling]. At 0 it is free to rise again: no floor is needed.

    Args:
        cost: estimate of J_C, from absolute labels.
    """
    return min(max(multiplier + learning_rate * (cost - threshold), 0.0), ceiling)
