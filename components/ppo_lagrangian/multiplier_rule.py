"""Which rule moves the multiplier, by the settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from components.foundation.ppo_settings import PpoSettings
from components.ppo_lagrangian.multiplier import (
    MultiplierState,
    PidGains,
    observe_costs,
    start_pid,
    update_multiplier,
    update_multiplier_pid,
)
from components.ppo_lagrangian.preference_oracle import projected_dual_step


def start_multiplier(settings: PpoSettings) -> MultiplierState:
    """The multiplier's state before the first step."""
    if settings.reward_shaping is not None:
        return MultiplierState(nu=math.log(settings.reward_shaping))
    if settings.lagrangian == "pid":
        return start_pid(settings.lambda_init, _gains(settings))
    return MultiplierState(nu=math.log(settings.lambda_init))


def next_multiplier(
    state: MultiplierState, episode_costs: Sequence[float], settings: PpoSettings, threshold: float
) -> MultiplierState:
    """The multiplier's state after a step with these costs, by the set rule; the weight of reward shaping stays."""
    if settings.reward_shaping is not None:
        return observe_costs(state, episode_costs, settings.cost_window)
    if settings.advantage_source == "preference_oracle":
        state = observe_costs(state, episode_costs, settings.cost_window)
        value = projected_dual_step(
            state.value,
            state.cost_moving_average,
            threshold=threshold,
            learning_rate=settings.lambda_learning_rate,
            ceiling=settings.lambda_max,
        )
        return replace(state, nu=math.log(value) if value else -math.inf)
    bounds = {"floor": settings.lambda_min, "ceiling": settings.lambda_max}
    if settings.lagrangian == "pid":
        return update_multiplier_pid(
            state, episode_costs, threshold=threshold, gains=_gains(settings), window=settings.cost_window, **bounds
        )
    return update_multiplier(
        state,
        episode_costs,
        threshold=threshold,
        learning_rate=settings.lambda_learning_rate,
        window=settings.cost_window,
        **bounds,
    )


def _gains(settings: PpoSettings) -> PidGains:
    return PidGains(settings.pid_proportional, settings.pid_integral, settings.pid_derivative)
