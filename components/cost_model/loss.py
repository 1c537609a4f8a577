"""The cost model's loss (paper equation 6, with a regulariser). Positive cost means unsafe, everywhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from components.foundation.preference_trainer import PreferenceScores


def cost_loss(scores: PreferenceScores, regularization: float) -> tuple[Tensor, dict[str, float]]:
    """`L_C = -log sigma(C_u - C_v) - log sigma(s_u C_u) - log sigma(s_v C_v) + eta * mean(C^2)`.

    The two sign terms compare each answer with a virtual answer of cost 0, so that C > 0 comes to mean unsafe.

    Args:
        scores: of the more harmful answers u (`high`) and the less harmful v (`low`), [B] each, s = +1 unsafe, -1 safe.
        regularization: eta.
    """
    ranking = -F.logsigmoid(scores.high - scores.low).mean()
    sign = -(F.logsigmoid(scores.high_sign * scores.high) + F.logsigmoid(scores.low_sign * scores.low)).mean()
    penalty = 0.5 * (scores.high.square() + scores.low.square()).mean()
    loss = ranking + sign + regularization * penalty
    return loss, {"loss": loss.item(), "ranking_loss": ranking.item(), "sign_loss": sign.item()}
