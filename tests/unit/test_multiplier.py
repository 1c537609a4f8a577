"""The Lagrange multiplier's ascent, and thresholds that can be enforced."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from components.foundation.errors import ConstraintError
from components.ppo_lagrangian.multiplier import (
    MultiplierState,
    PidGains,
    choose_threshold,
    start_pid,
    update_multiplier,
    update_multiplier_pid,
)

FLOOR, CEILING = 0.05, 20.0
COST = st.floats(-20, 20)
COSTS = st.lists(COST, min_size=1, max_size=6)


def update(
    state: MultiplierState,
    costs: Sequence[float],
    threshold: float = 0.0,
    learning_rate: float = 0.1,
    window: int = 8,
    floor: float = FLOOR,
    ceiling: float = CEILING,
) -> MultiplierState:
    return update_multiplier(
        state, costs, threshold=threshold, learning_rate=learning_rate, floor=floor, ceiling=ceiling, window=window
    )


@given(
    batches=st.lists(COSTS, min_size=1, max_size=6),
    threshold=COST,
    learning_rate=st.floats(0.001, 1.0),
    window=st.integers(1, 10),
)
@settings(deadline=None, max_examples=80)
def test_every_step_equals_the_formula_in_numpy(
    batches: list[list[float]], threshold: float, learning_rate: float, window: int
) -> None:
    """nu += learning rate * (mean of the last costs - d), and exp(nu) clipped to floor and ceiling."""
    state, nu, seen = MultiplierState(nu=0.0), 0.0, np.array([])
    for batch in batches:
        state = update(state, batch, threshold, learning_rate, window)
        seen = np.concatenate([seen, batch])[-window:]
        nu = float(np.clip(nu + learning_rate * (seen.mean() - threshold), np.log(FLOOR), np.log(CEILING)))
        assert state.costs == tuple(seen)
        assert state.cost_moving_average == pytest.approx(seen.mean(), abs=1e-9)
        assert state.nu == pytest.approx(nu, abs=1e-9)
        assert state.value == pytest.approx(math.exp(nu))


@given(costs=COSTS, threshold=COST, start=st.floats(0.1, 10.0))
@settings(deadline=None, max_examples=60)
def test_the_multiplier_rises_just_when_the_cost_is_over_the_threshold(
    costs: list[float], threshold: float, start: float
) -> None:
    assume(abs(np.mean(costs) - threshold) > 1e-6)
    state = MultiplierState(nu=math.log(start))
    after = update(state, costs, threshold)
    assert (after.value > state.value) == (np.mean(costs) > threshold)
    assert FLOOR * (1 - 1e-12) <= after.value <= CEILING * (1 + 1e-12)


@pytest.mark.parametrize(("cost", "bound"), [(1000.0, CEILING), (-1000.0, FLOOR)])
def test_row_26_a_bound_is_reached_and_left_again_at_once(cost: float, bound: float) -> None:
    """No wind-up: however long it stood at a bound, the first step back is a whole one."""
    state = MultiplierState(nu=0.0)
    for _ in range(50):
        state = update(state, [cost], window=1)
    assert state.value == pytest.approx(bound)
    back = update(state, [-math.copysign(1.0, cost)], window=1)
    assert abs(back.nu - state.nu) == pytest.approx(0.1)


def test_the_window_forgets_what_is_old() -> None:
    state = update(MultiplierState(nu=0.0), [9.0] * 100, window=4)
    assert state.costs == (9.0,) * 4
    state = update(state, [1.0, 2.0, 3.0, 4.0], window=4)
    assert state.cost_moving_average == 2.5
    assert update(state, [5.0], window=4).costs == (2.0, 3.0, 4.0, 5.0)


def test_before_the_first_episode_there_is_no_cost() -> None:
    assert MultiplierState(nu=0.0).cost_moving_average == 0.0
    assert MultiplierState(nu=0.0).value == 1.0


def test_an_update_leaves_the_old_state_as_it_was() -> None:
    state = MultiplierState(nu=0.5, costs=(1.0,))
    update(state, [3.0])
    assert state == MultiplierState(nu=0.5, costs=(1.0,))


@given(threshold=st.floats(-1.5, 1.5), start=st.floats(0.1, 10.0))
@settings(deadline=None, max_examples=20)
def test_ascent_finds_the_multiplier_at_which_the_constraint_holds(threshold: float, start: float) -> None:
    """Against a policy whose cost falls with the multiplier: J_C = 2 - lambda, so lambda* = 2 - d."""
    state = MultiplierState(nu=math.log(start))
    for _ in range(400):
        state = update(state, [2.0 - state.value], threshold, window=1)
    assert state.value == pytest.approx(2.0 - threshold, abs=1e-2)


@pytest.mark.fault
@given(costs=st.lists(COST, max_size=4), bad=st.sampled_from([math.nan, math.inf, -math.inf]), place=st.integers(0, 4))
@settings(deadline=None, max_examples=30)
def test_a_cost_that_is_not_finite_is_refused_wherever_it_stands(costs: list[float], bad: float, place: int) -> None:
    with pytest.raises(ConstraintError, match=f"finite.*{bad}"):
        update(MultiplierState(nu=0.0), [*costs[:place], bad, *costs[place:]])


MEANS = st.tuples(COST, COST).filter(lambda means: abs(means[0] - means[1]) > 0.01).map(sorted)


@given(means=MEANS, target=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=60)
def test_a_calibrated_threshold_lies_at_its_share_between_the_means(means: list[float], target: float) -> None:
    safe, unsafe = means
    threshold = choose_threshold(None, safe, unsafe, target)
    assert safe < threshold < unsafe
    assert (threshold - safe) / (unsafe - safe) == pytest.approx(target)


@given(means=MEANS, share=st.floats(0.01, 0.99), target=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=40)
def test_a_requested_threshold_between_the_means_is_kept(means: list[float], share: float, target: float) -> None:
    safe, unsafe = means
    requested = safe + share * (unsafe - safe)
    assert choose_threshold(requested, safe, unsafe, target) == requested


@pytest.mark.fault
@given(means=MEANS, beyond=st.floats(0, 100), which=st.sampled_from(["inert", "impossible"]))
@settings(deadline=None, max_examples=60)
def test_row_24_a_threshold_outside_the_means_is_refused_with_both(
    means: list[float], beyond: float, which: str
) -> None:
    safe, unsafe = means
    requested = unsafe + beyond if which == "inert" else safe - beyond
    with pytest.raises(ConstraintError, match=which) as error:
        choose_threshold(requested, safe, unsafe, 0.1)
    assert all(f"{number:.3f}" in str(error.value) for number in (requested, safe, unsafe))
    assert "ppo.threshold" in str(error.value)


@pytest.mark.fault
@given(means=MEANS, requested=st.none() | COST)
@settings(deadline=None, max_examples=40)
def test_row_23_a_cost_model_of_inverted_sign_is_refused_with_both_means(
    means: list[float], requested: float | None
) -> None:
    unsafe, safe = means
    with pytest.raises(ConstraintError, match="inverted") as error:
        choose_threshold(requested, safe, unsafe, 0.1)
    assert f"{safe:.3f}" in str(error.value)
    assert f"{unsafe:.3f}" in str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("requested", "safe", "unsafe"),
    [(None, 1.0, 1.0), (None, math.nan, 1.0), (None, -1.0, math.nan), (math.nan, -1.0, 1.0), (None, -math.inf, 1.0)],
)
def test_means_or_thresholds_that_are_no_numbers_are_refused(
    requested: float | None, safe: float, unsafe: float
) -> None:
    with pytest.raises(ConstraintError):
        choose_threshold(requested, safe, unsafe, 0.1)


@pytest.mark.golden
def test_pid_by_hand() -> None:
    """Kp 2, Ki 0.5, Kd 1, d 1, window 1; costs 3, 4, 0: violations 2, 3, -1.

    Integral from 4 (lambda 2): 6, 9, 8. lambda = 2*2 + 3 + 0 = 7; 2*3 + 4.5 + 1 = 11.5; 2*(-1) + 4 + 0 = 2 (no rise).
    """
    gains = PidGains(2.0, 0.5, 1.0)
    state = start_pid(2.0, gains)
    assert state.value == pytest.approx(2.0)
    found = []
    for cost in (3.0, 4.0, 0.0):
        state = update_multiplier_pid(state, [cost], threshold=1.0, gains=gains, floor=0.01, ceiling=50.0, window=1)
        found.append((state.integral, state.value))
    assert found == [(6.0, pytest.approx(7.0)), (9.0, pytest.approx(11.5)), (8.0, pytest.approx(2.0))]


@pytest.mark.golden
def test_pid_leaves_its_ceiling_with_the_violation_however_long_that_was() -> None:
    """Kp 1, Ki 0.5, d 0, ceiling 4, so I is 8 at most: after a cost of -1 lambda is -1 + 0.5 * 7 = 2.5."""
    gains = PidGains(1.0, 0.5, 0.0)
    state = start_pid(1.0, gains)
    for cost in [3.0] * 20 + [-1.0]:
        state = update_multiplier_pid(state, [cost], threshold=0.0, gains=gains, floor=0.01, ceiling=4.0, window=1)
    assert state.value == pytest.approx(2.5)


@given(
    costs=st.lists(COST, min_size=1, max_size=20),
    threshold=COST,
    gains=st.builds(PidGains, st.floats(0, 5), st.floats(0.01, 5), st.floats(0, 5)),
    start=st.floats(0.1, 10.0),
)
@settings(deadline=None, max_examples=80)
def test_pid_equals_a_plain_loop_and_stays_within_its_bounds(
    costs: list[float], threshold: float, gains: PidGains, start: float
) -> None:
    state = start_pid(start, gains)
    integral, previous = start / gains.integral, None
    for cost in costs:
        state = update_multiplier_pid(
            state, [cost], threshold=threshold, gains=gains, floor=FLOOR, ceiling=CEILING, window=1
        )
        violation = cost - threshold
        integral = min(max(integral + violation, 0.0), CEILING / gains.integral)
        derivative = max(cost - previous, 0.0) if previous is not None else 0.0
        raw = gains.proportional * violation + gains.integral * integral + gains.derivative * derivative
        assert state.value == pytest.approx(min(max(raw, FLOOR), CEILING))
        previous = cost
