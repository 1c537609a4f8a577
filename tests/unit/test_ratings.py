"""Ratings against an independent optimiser, and the properties that any ladder must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from components.report.ratings import ANCHOR, bradley_terry, count_wins, elo, ladder


def reference(wins: list[list[float]], virtual_ties: float) -> list[float]:
    """The same likelihood, maximised by scipy."""
    table = np.array(wins) + virtual_ties / 2
    np.fill_diagonal(table, 0.0)

    def loss(theta: np.ndarray) -> float:
        return float((table * np.logaddexp(0.0, theta[None, :] - theta[:, None])).sum())

    def gradient(theta: np.ndarray) -> np.ndarray:
        missing = table / (1.0 + np.exp(theta[:, None] - theta[None, :]))
        return missing.sum(axis=0) - missing.sum(axis=1)

    found = minimize(loss, np.zeros(len(wins)), jac=gradient, method="BFGS", options={"gtol": 1e-9})
    return list(found.x - found.x.mean())


WINS = st.integers(2, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(0, 200).map(lambda half: half / 2), min_size=n, max_size=n), min_size=n, max_size=n
    )
)


@pytest.mark.golden
@given(wins=WINS, virtual_ties=st.sampled_from([0.5, 1.0, 4.0]))
@settings(deadline=None, max_examples=60)
def test_equals_scipys_maximum(wins: list[list[float]], virtual_ties: float) -> None:
    assert bradley_terry(wins, virtual_ties) == pytest.approx(reference(wins, virtual_ties), abs=1e-4)


@pytest.mark.golden
def test_two_policies_by_hand() -> None:
    """30 wins to 10 with one virtual tie are 30.5 to 10.5."""
    assert elo([[0.0, 10.0], [30.0, 0.0]]) == pytest.approx([ANCHOR, ANCHOR + 400 * math.log10(30.5 / 10.5)])


@given(wins=WINS, data=st.data())
@settings(deadline=None, max_examples=30)
def test_names_do_not_matter(wins: list[list[float]], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(wins))))
    shuffled = [[wins[i][j] for j in order] for i in order]
    strengths = bradley_terry(wins)
    assert bradley_terry(shuffled) == pytest.approx([strengths[i] for i in order], abs=1e-6)


def test_a_perfect_score_stays_finite() -> None:
    ratings = elo([[0.0, 0.0], [140.0, 0.0]])
    assert ratings[0] == ANCHOR
    assert 1900 < ratings[1] < 2000


def test_no_comparisons_rate_all_alike() -> None:
    assert elo([[0.0] * 3] * 3) == pytest.approx([ANCHOR] * 3)
    assert [rating.value for rating in ladder([{}, {}, {}], 0.95)] == pytest.approx([ANCHOR] * 3)


def test_wins_count_ties_half_and_only_shared_prompts() -> None:
    first, second = {"a": 1.0, "b": 0.5, "c": 0.2}, {"a": 0.0, "b": 0.5, "d": 1.0}
    assert count_wins([first, second], ["a", "b", "c", "d"]) == [[0.0, 1.5], [0.5, 0.0]]


def test_ladder_orders_policies_and_its_intervals_hold_their_values() -> None:
    prompts = [f"prompt {i}" for i in range(60)]
    policies = [{p: float((i + k) % 4 < k) for i, p in enumerate(prompts)} for k in range(4)]
    ratings = ladder(policies, 0.95)
    values = [rating.value for rating in ratings]
    assert values[0] == ratings[0].low == ratings[0].high == ANCHOR
    assert values == sorted(values)
    assert all(rating.low < rating.value < rating.high for rating in ratings[1:])
    assert ladder(policies, 0.95) == ratings
    assert ladder(policies, 0.5)[3].high < ratings[3].high
