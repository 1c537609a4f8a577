"""Rates and their intervals against SciPy."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from components.foundation.results import Estimate
from components.foundation.statistics import paired_difference, share, wilson, win_rate

CONFIDENCE = st.sampled_from([0.6, 0.8, 0.9, 0.95, 0.99])


@given(data=st.data(), n=st.integers(1, 400), confidence=CONFIDENCE)
@settings(deadline=None, max_examples=100)
def test_wilson_equals_scipy(data: st.DataObject, n: int, confidence: float) -> None:
    k = data.draw(st.integers(0, n))
    ours = wilson(k, n, confidence)
    theirs = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.value == pytest.approx(k / n)
    assert ours.n == n


@given(n=st.integers(1, 200), halves=st.integers(0, 400), confidence=CONFIDENCE)
@settings(deadline=None, max_examples=60)
def test_bounds_enclose_the_value_also_with_half_successes(n: int, halves: int, confidence: float) -> None:
    estimate = wilson(min(halves, 2 * n) / 2, n, confidence)
    assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
    assert estimate.low < estimate.high


@pytest.mark.golden
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_by_hand(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, table I, method 3: score intervals at 95 %."""
    estimate = wilson(successes, n, 0.95)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_no_trials_bound_nothing() -> None:
    for estimate in (wilson(0, 0, 0.95), share([], 0.95), win_rate([], [], 0.95)):
        assert (estimate.value, estimate.low, estimate.high, estimate.n) == (0.0, 0.0, 1.0, 0)


def test_certainty_has_exact_ends() -> None:
    assert wilson(0, 7, 0.95).low == 0.0
    assert wilson(7, 7, 0.95).high == 1.0


@given(k=st.integers(0, 20), confidence=CONFIDENCE)
@settings(deadline=None, max_examples=40)
def test_intervals_narrow_with_trials_and_widen_with_confidence(k: int, confidence: float) -> None:
    few, many, surer = wilson(k, 20, confidence), wilson(10 * k, 200, confidence), wilson(k, 20, 0.995)
    assert few.low <= many.low <= many.high <= few.high
    assert surer.low <= few.low <= few.high <= surer.high


@given(flags=st.lists(st.booleans(), min_size=1))
@settings(deadline=None, max_examples=30)
def test_a_share_counts_the_true_ones(flags: list[bool]) -> None:
    assert share(flags, 0.9) == wilson(flags.count(True), len(flags), 0.9)


@pytest.mark.golden
def test_a_tie_is_half_a_win() -> None:
    estimate = win_rate([1.0, 0.5, 0.2, 0.9], [0.0, 0.5, 0.4, 0.9], 0.95)
    assert (estimate.value, estimate.n) == (0.5, 4)
    assert win_rate([1.0] * 9, [1.0] * 9, 0.95).value == 0.5


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30), confidence=CONFIDENCE)
@settings(deadline=None, max_examples=50)
def test_win_rates_of_two_sides_sum_to_one(pairs: list[tuple[int, int]], confidence: float) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    straight, reverse = win_rate(ours, theirs, confidence), win_rate(theirs, ours, confidence)
    assert straight.value + reverse.value == pytest.approx(1.0)
    assert (straight.low, straight.high) == pytest.approx((1 - reverse.high, 1 - reverse.low))


@pytest.mark.fault
def test_answers_of_different_number_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        win_rate([1.0, 2.0], [1.0], 0.95)


def test_a_paired_difference_by_hand() -> None:
    """12 trials of 100 are ours alone and 4 theirs alone: (12.5 - 4.5) / 102, and the root of 17 - 8 * 8 / 102."""
    ours = [True] * 12 + [False] * 4 + [True] * 30 + [False] * 54
    theirs = [False] * 12 + [True] * 4 + [True] * 30 + [False] * 54
    estimate = paired_difference(ours, theirs, 0.95)
    assert estimate.value == pytest.approx(0.08)
    half = 1.959964 * math.sqrt(17 - 64 / 102) / 102
    assert (estimate.low, estimate.high) == (pytest.approx(8 / 102 - half), pytest.approx(8 / 102 + half))
    assert paired_difference([], [], 0.95) == Estimate(value=0.0, low=-1.0, high=1.0, n=0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
@settings(deadline=None, max_examples=80)
def test_a_paired_difference_holds_its_value_and_turns_round_with_the_sides(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    there, back = paired_difference(ours, theirs, 0.95), paired_difference(theirs, ours, 0.95)
    assert -1 <= there.low <= there.value + 1e-12 and there.value <= there.high + 1e-12 <= 1 + 1e-9
    assert (there.value, there.low, there.high) == (-back.value, pytest.approx(-back.high), pytest.approx(-back.low))


def test_the_interval_of_a_paired_difference_covers_the_truth_as_often_as_it_says() -> None:
    """1,500 draws of 140 pairs whose sides go together in most trials, as two policies' answers to an attack do."""
    chance, covered = random.Random(0), 0
    for _ in range(1500):
        pairs = [chance.choices([(1, 1), (1, 0), (0, 1), (0, 0)], [0.25, 0.15, 0.08, 0.52])[0] for _ in range(140)]
        estimate = paired_difference([a == 1 for a, _ in pairs], [b == 1 for _, b in pairs], 0.95)
        covered += estimate.low <= 0.07 <= estimate.high
    assert 0.93 <= covered / 1500 <= 0.97
