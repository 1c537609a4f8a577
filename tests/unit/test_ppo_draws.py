"""Prompts and demonstrations that training steps take: properties over settings, and coverage of what there is."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference import PromptRecord
from components.ppo_lagrangian.draws import draw_batch, draw_prompts, take

PROMPTS = (
    [PromptRecord(f"attack {i}", "red_team", "theft") for i in range(9)]
    + [PromptRecord(f"harmless {i}", "benign") for i in range(9)]
    + [PromptRecord(f"looks bad {i}", "lookalike") for i in range(2)]
)


@given(seed=st.integers(0, 1000), number=st.integers(0, 50), count=st.integers(4, 30), share=st.floats(0, 1))
def test_a_batch_holds_its_share_of_attacks_and_the_other_kinds_evenly(
    seed: int, number: int, count: int, share: float
) -> None:
    batch = draw_prompts(PROMPTS, count, share, number, seed)
    kinds = Counter(prompt.kind for prompt in batch)
    assert len(batch) == count
    assert kinds["red_team"] == round(share * count)
    assert abs(kinds["benign"] - kinds["lookalike"]) <= 1
    assert batch == draw_prompts(PROMPTS, count, share, number, seed)


def test_prompts_without_kinds_are_drawn_plainly() -> None:
    unnamed = [PromptRecord(f"prompt {i}") for i in range(5)]
    batch = draw_prompts(unnamed, 12, 0.5, number=3, seed=0)
    assert len(batch) == 12
    assert set(batch) == set(unnamed)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_all_or_nothing_leaves_the_other_prompts_out(share: float) -> None:
    batch = draw_prompts(PROMPTS, 8, share, number=1, seed=0)
    assert {prompt.kind == "red_team" for prompt in batch} == {bool(share)}


def test_each_prompt_of_a_batch_stands_twice_in_a_row_where_answers_are_compared() -> None:
    ppo = PpoSettings(episodes_per_step=20, red_team_share=0.5, advantage_source="preference_oracle")
    batch = draw_batch(PROMPTS, ppo, number=0, seed=1)
    assert len(batch) == 20
    assert batch[::2] == batch[1::2]
    assert sum(prompt.kind == "red_team" for prompt in batch) == 10


@given(seed=st.text(max_size=3), size=st.integers(1, 20), count=st.integers(0, 25), portions=st.integers(1, 12))
def test_nothing_comes_a_second_time_before_everything_has_come_once(
    seed: str, size: int, count: int, portions: int
) -> None:
    """Over the portions together, however they cut the passes."""
    walked = [item for number in range(portions) for item in take(range(size), number, count, seed)]
    assert len(walked) == portions * count
    for start in range(0, len(walked), size):
        passed = walked[start : start + size]
        assert len(set(passed)) == len(passed)


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    first, second = (take(range(50), number, 50, "0") for number in range(2))
    other = take(range(50), 0, 50, "1")
    assert sorted(first) == sorted(second) == sorted(other) == list(range(50))
    assert first != second != other != first


def test_a_portion_does_not_depend_on_those_before_it() -> None:
    """A step that is done again after a restart takes the same, and so does a round that is started alone."""
    all_at_once = take(range(7), 0, 30, "0")
    assert [take(range(7), number, 5, "0") for number in range(6)] == [all_at_once[i : i + 5] for i in range(0, 30, 5)]
