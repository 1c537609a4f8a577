"""The reward model's loss (paper equation 5, with a regulariser)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from components.foundation.preference_trainer import PreferenceScores


def reward_loss(scores: PreferenceScores, regularization: float) -> tuple[Tensor, dict[str, float]]:
    """`L_R = -log sigma(R_w - R_l) + eta * mean(R^2)`, averaged over the batch.

    Args:
        scores: of the better (`high`) and the worse (`low`) answers, [B] each.
        regularization: eta.
    """
    ranking = -F.logsigmoid(scores.high - scores.low).mean()
    penalty = 0.5 * (scores.high.square() + scores.low.square()).mean()
    loss = ranking + regularization * penalty
    return loss, {"loss": loss.item(), "ranking_loss": ranking.item()}
