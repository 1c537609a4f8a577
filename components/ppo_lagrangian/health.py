"""What must hold of a rollout batch before anything is learned from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from components.foundation.errors import DivergenceError


def check_scores(name: str, scores: Sequence[float], step: int) -> None:
    """`name` is reward or cost; `step` counts from 0.

    Raises:
        DivergenceError: a score is not finite.
    """
    bad = [score for score in scores if not math.isfinite(score)]
    if bad:
        raise DivergenceError(
            f"step {step + 1}: {len(bad)} of {len(scores)} {name} scores are not finite (the first is {bad[0]}): the "
            f"{name} model diverged; train it again with a lower {name}_model.learning_rate"
        )


def check_kl(kl: float, max_kl: float | None, step: int) -> None:
    """`kl` is the policy's divergence from the reference in nats a token.

    Raises:
        DivergenceError: it is not finite, or above `max_kl` where that is set.
    """
    if not math.isfinite(kl) or (max_kl is not None and kl > max_kl):
        raise DivergenceError(
            f"step {step + 1}: the policy's KL divergence from the reference is {kl:.4g} nats a token (ppo.max_kl is "
            f"{max_kl}): lower ppo.actor_learning_rate or raise ppo.kl_coefficient"
        )
