"""PPO-Lagrangian's own functions on a problem whose optimum is known: see tests/benchmarks/bandit.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from components.foundation.ppo_settings import PpoSettings
from components.ppo_lagrangian.multiplier_rule import next_multiplier, start_multiplier
from tests.benchmarks.bandit import COST, PAPER_NU, REWARD, THRESHOLD, bandit, optimum, shaped_policy, train
from tests.benchmarks.fixed_nu import Point, compare, picture, table

Rule = Callable[[float], PpoSettings]
RULES: dict[str, Rule] = {
    "dual ascent": lambda start: bandit(lambda_init=start),
    "PID": lambda start: bandit(
        lagrangian="pid", lambda_init=start, pid_proportional=0.5, pid_integral=0.05, pid_derivative=0.5
    ),
}


@pytest.mark.golden
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", [0.02, 15.0])
def test_it_reaches_the_known_policy_and_multiplier_from_far_below_and_far_above(rule: str, start: float) -> None:
    """Within 2 % of probability, 3 % of the multiplier, and 0.02 of the cost limit."""
    policy, multiplier = optimum()
    found = train(RULES[rule](start))
    np.testing.assert_allclose(found.policy, policy, atol=0.02)
    assert found.multipliers[-1] == pytest.approx(multiplier, rel=0.03)
    assert found.policy @ COST == pytest.approx(THRESHOLD, abs=0.02)


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return compare()


@pytest.mark.golden
def test_every_fixed_weight_reaches_the_optimum_of_its_own_shaped_reward(points: list[Point]) -> None:
    """pi proportional to ref exp((r - nu c) / beta), within 0.03 of its mean reward and 0.06 of its mean cost."""
    fixed = [point for point in points if point.nu is not None]
    assert [point.nu for point in fixed] == list(PAPER_NU)
    for point in fixed:
        assert point.nu is not None
        policy = shaped_policy(point.nu)
        assert point.reward == pytest.approx(policy @ REWARD, abs=0.03), point.nu
        assert point.cost == pytest.approx(policy @ COST, abs=0.06), point.nu


@pytest.mark.golden
def test_the_multiplier_meets_the_limit_with_the_optimum_s_reward(points: list[Point]) -> None:
    (dynamic,) = (point for point in points if point.nu is None)
    assert dynamic.cost == pytest.approx(THRESHOLD, abs=0.02)
    assert dynamic.reward == pytest.approx(optimum()[0] @ REWARD, abs=0.02)


@pytest.mark.golden
def test_each_of_the_paper_s_fixed_weights_breaks_the_limit_or_pays_for_it() -> None:
    """Of the analytic optima: nu up to 0.5 costs too much, nu from 1 on has less reward than the multiplier leaves."""
    best = optimum()[0] @ REWARD
    too_costly = [nu for nu in PAPER_NU if shaped_policy(nu) @ COST > THRESHOLD + 0.1]
    over_careful = [nu for nu in PAPER_NU if shaped_policy(nu) @ COST < THRESHOLD and shaped_policy(nu) @ REWARD < best]
    assert (too_costly, over_careful) == ([0.01, 0.5], [1.0, 2.0, 5.0, 10.0, 100.0])


def test_the_picture_and_the_table_show_every_point(points: list[Point]) -> None:
    rows = table(points).splitlines()[2:]
    assert len(rows) == len(PAPER_NU) + 1
    for point, row in zip(points, rows, strict=True):
        assert f"| {point.cost:.2f} | {point.reward:.2f} |" in row.replace("\u2212", "-")
    root = ElementTree.fromstring(picture(points))
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(points)
    across, up = ([float(circle.attrib[key]) for circle in circles] for key in ("cx", "cy"))
    assert np.corrcoef(across, [point.cost for point in points])[0, 1] == pytest.approx(1.0)
    assert np.corrcoef(up, [point.reward for point in points])[0, 1] == pytest.approx(-1.0)


def test_reward_shaping_leaves_its_weight_alone() -> None:
    settings = bandit(reward_shaping=2.0)
    state = next_multiplier(start_multiplier(settings), [5.0, 7.0], settings, THRESHOLD)
    assert state.value == pytest.approx(2.0)
    assert state.cost_moving_average == pytest.approx(6.0)
    assert math.isclose(start_multiplier(bandit(lambda_init=0.3)).value, 0.3)
