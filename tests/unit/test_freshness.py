"""How many preference pairs of a run are new."""

from __future__ import annotations

from dataclasses import replace

import pytest

from components.foundation.preference import DualPreference
from components.foundation.settings import resolve_settings
from components.prepare_data.freshness import Freshness, count_new, needed
from pipelines.options import with_start


def pair(number: int) -> DualPreference:
    return DualPreference(f"prompt {number}", "yes", "no", 0, 1, False, True, {"drugs": True, "fraud": False})


PAIRS = [pair(number) for number in range(5)]


def test_pairs_count_once_and_by_content_wherever_they_stand() -> None:
    ours = [*PAIRS[::-1], PAIRS[0], pair(7), pair(7)]
    assert count_new(ours, PAIRS) == Freshness(pairs=6, new=1)
    assert count_new(PAIRS, [*PAIRS, pair(9)]) == Freshness(pairs=5, new=0)
    assert count_new(PAIRS, []) == Freshness(pairs=5, new=5)


def test_the_same_pair_with_another_label_is_new_and_the_order_of_categories_does_not_matter() -> None:
    assert count_new([replace(PAIRS[0], better_response_id=1)], PAIRS).new == 1
    assert count_new([replace(PAIRS[0], response_0_harm_category={"fraud": False, "drugs": True})], PAIRS).new == 0


@pytest.mark.golden
@pytest.mark.parametrize(
    ("min_pairs", "min_share", "pairs", "least"),
    [(50, 0.0, 100, 50), (0, 0.1, 30, 3), (0, 0.1, 31, 4), (3, 0.5, 10, 5), (6, 0.5, 10, 6), (0, 1.0, 7, 7)],
)
def test_the_stricter_of_both_limits_counts(min_pairs: int, min_share: float, pairs: int, least: int) -> None:
    """By hand; 0.1 * 30 is a little more than 3 in floating point."""
    assert needed(min_pairs, min_share, pairs) == least


def test_the_options_of_a_start_stand_for_settings() -> None:
    assert with_start(["ppo.steps=2"], "", 0) == ("ppo.steps=2",)
    start = resolve_settings("tiny", 0, with_start(["rounds=3"], "20261124-163806-1e05", 3)).start
    assert (start.from_run, start.from_round) == ("20261124-163806-1e05", 3)
