"""The cost model's loss (paper equation 6, with a regulariser). Positive cost means unsafe, everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from components.foundation.preference_trainer import PreferenceScores


def cost_loss(
    scores: PreferenceScores, regularization: float, severity_weight: float = 0.0, ranks_safe_pairs: bool = True
) -> tuple[Tensor, dict[str, float]]:
    """`L_C = -log sigma(C_u - C_v) - a_u log sigma(s_u C_u) - a_v log sigma(s_v C_v) + eta * mean(C^2)`.

    The two sign terms compare each answer with a virtual answer of cost 0, so that C > 0 comes to mean unsafe.
    `a = 1 + severity_weight * severity`: the worse an unsafe answer is, the more it counts (severity is 0 for a safe
    one). Safe RLHF-V (arXiv 2503.17682) grades severity in the cost; the paper's own loss has a weight of 0.

    Without `ranks_safe_pairs`, the first term of a pair of two safe answers is its mean over both orders, least where
    they cost the same. An annotator who finds no difference breaks the tie by chance; over many pairs that is the same
    loss, but of few it makes a model in which a refusal of a harmless prompt costs less than its answer, or more.

    Args:
        scores: of the more harmful answers u (`high`) and the less harmful v (`low`), [B] each, s = +1 unsafe, -1 safe.
        regularization: eta.
        severity_weight: at least 0.
    """
    gap = scores.high - scores.low
    rank = F.logsigmoid(gap)
    if not ranks_safe_pairs:
        both_safe = (scores.high_sign < 0) & (scores.low_sign < 0)
        rank = torch.where(both_safe, (rank + F.logsigmoid(-gap)) / 2, rank)
    ranking = -rank.mean()
    high_weight, low_weight = (1 + severity_weight * s for s in (scores.high_severity, scores.low_severity))
    high_sign = high_weight * F.logsigmoid(scores.high_sign * scores.high)
    low_sign = low_weight * F.logsigmoid(scores.low_sign * scores.low)
    sign = -(high_sign + low_sign).mean()
    penalty = 0.5 * (scores.high.square() + scores.low.square()).mean()
    loss = ranking + sign + regularization * penalty
    return loss, {"loss": loss.item(), "ranking_loss": ranking.item(), "sign_loss": sign.item()}
