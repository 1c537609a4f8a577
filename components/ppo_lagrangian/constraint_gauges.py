"""What Prometheus is told of the constraint, besides a step's own metrics; the chart's alerts stand on it."""

from __future__ import annotations

from components.foundation.ppo_settings import PpoSettings
from components.ppo_lagrangian.trainer import StepMetrics


class ConstraintGauges:
    """Threshold and ceiling beside what they bound, and for how many steps in a row the bound has not held.

    Where reward shaping stands in for the constraint (`ppo.reward_shaping`), lambda is fixed and there is none of it.
    """

    def __init__(self, threshold: float, settings: PpoSettings) -> None:
        self._threshold = threshold
        self._ceiling = settings.lambda_max
        self._constrained = settings.reward_shaping is None
        self._steps_above = 0

    def after(self, metrics: StepMetrics) -> dict[str, float]:
        """Gauges after a step; steps are counted since this process began."""
        if not self._constrained:
            return {}
        self._steps_above = self._steps_above + 1 if metrics.cost_moving_average > self._threshold else 0
        return {
            "lagrangian/cost_threshold": self._threshold,
            "lagrangian/lambda_ceiling": self._ceiling,
            "lagrangian/steps_above_threshold": self._steps_above,
        }
