"""The Lagrange multiplier and the cost threshold that it enforces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from components.foundation.errors import ConstraintError


@dataclass(frozen=True)
class MultiplierState:
    """All that the multiplier remembers.

    Attributes:
        nu: log lambda.
        costs: scores of the most recent episodes, oldest first (positive = unsafe).
        integral: of the violation over the steps so far (PID only).
        previous_cost: J_C at the step before (PID only); None before the first step.
    """

    nu: float
    costs: tuple[float, ...] = ()
    integral: float = 0.0
    previous_cost: float | None = None

    @property
    def value(self) -> float:
        """lambda >= 0."""
        return math.exp(self.nu)

    @property
    def cost_moving_average(self) -> float:
        """Estimate of J_C, the expected cost; 0 before the first episode."""
        return math.fsum(self.costs) / len(self.costs) if self.costs else 0.0


@dataclass(frozen=True)
class CostConstraint:
    """E[C] <= threshold, where C is a cost score, or max(score, floor) where there is a floor."""

    threshold: float
    floor: float | None = None


@dataclass(frozen=True)
class PidGains:
    """Kp, Ki and Kd of PID control of the multiplier."""

    proportional: float
    integral: float
    derivative: float


def update_multiplier(
    state: MultiplierState,
    episode_costs: Sequence[float],
    *,
    threshold: float,
    learning_rate: float,
    floor: float,
    ceiling: float,
    window: int,
) -> MultiplierState:
    """One step of dual ascent in log space: `nu += learning_rate * (J_C - d)`, then clamp lambda.

    The paper's code multiplies the step by lambda, so that a small multiplier hardly ever recovers; in log space
    the step is already proportional to lambda, and we leave the second factor out.
    """
    state = observe_costs(state, episode_costs, window)
    nu = state.nu + learning_rate * (state.cost_moving_average - threshold)
    return replace(state, nu=min(max(nu, math.log(floor)), math.log(ceiling)))


def start_pid(multiplier: float, gains: PidGains) -> MultiplierState:
    """The state from which PID control starts at this multiplier: an integral that explains it."""
    return MultiplierState(nu=math.log(multiplier), integral=multiplier / gains.integral)


def update_multiplier_pid(
    state: MultiplierState,
    episode_costs: Sequence[float],
    *,
    threshold: float,
    gains: PidGains,
    floor: float,
    ceiling: float,
    window: int,
) -> MultiplierState:
    """One step of PID control (arXiv 2007.03964, algorithm 2), then clamp lambda.

    With D = J_C - d: `I = max(I + D, 0)`, `lambda = Kp D + Ki I + Kd max(J_C - J_C_previous, 0)`. The proportional term
    answers a violation at once and the derivative term a rising cost; dual ascent is the integral term alone. `Ki I` is
    held below the ceiling as well: what lambda could not follow must not keep it there once the violation is over.
    """
    state = observe_costs(state, episode_costs, window)
    cost = state.cost_moving_average
    violation = cost - threshold
    integral = min(max(state.integral + violation, 0.0), ceiling / gains.integral)
    rise = 0.0 if state.previous_cost is None else max(cost - state.previous_cost, 0.0)
    multiplier = gains.proportional * violation + gains.integral * integral + gains.derivative * rise
    return replace(state, nu=math.log(min(max(multiplier, floor), ceiling)), integral=integral, previous_cost=cost)


def observe_costs(state: MultiplierState, episode_costs: Sequence[float], window: int) -> MultiplierState:
    """The same multiplier, with these costs in its window.

    Raises:
        ConstraintError: a cost is not finite.
    """
    if not all(math.isfinite(cost) for cost in episode_costs):
        raise ConstraintError(f"episode costs must be finite, got {list(episode_costs)}: the cost model diverged")
    return replace(state, costs=(*state.costs, *episode_costs)[-window:])


def choose_threshold(requested: float | None, mean_safe: float, mean_unsafe: float, target: float) -> float:
    """The cost threshold d: the requested one, or `mean_safe + target * (mean_unsafe - mean_safe)`.

    Args:
        mean_safe, mean_unsafe: mean cost scores of safe and of unsafe answers, by `ppo.threshold_answers`.
        target: share of unsafe answers at which a policy of average answers meets d exactly.

    Raises:
        ConstraintError: the cost model does not score unsafe above safe, or d lies outside the two means, so
            that every policy or none would meet it.
    """
    if not mean_safe < mean_unsafe:
        raise ConstraintError(
            f"the cost model scores safe answers {mean_safe:.3f} and unsafe ones {mean_unsafe:.3f} on average: "
            "it does not tell them apart, or its sign is inverted; check the labels and train it again"
        )
    threshold = mean_safe + target * (mean_unsafe - mean_safe) if requested is None else requested
    if not mean_safe < threshold < mean_unsafe:
        kind = "inert: every policy meets it" if threshold >= mean_unsafe else "impossible: no policy meets it"
        raise ConstraintError(
            f"cost threshold {threshold:.3f} is {kind}; the answers that calibrate it score {mean_safe:.3f} (safe) to "
            f"{mean_unsafe:.3f} (unsafe) on average: set ppo.threshold between them, or leave it empty"
        )
    return threshold
