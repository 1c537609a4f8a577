"""The progress line that every stage prints and the command reads."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from components.foundation.progress import Progress, ProgressLine, parse_progress


def printed(stage: str, total: int, unit: str, updates: Iterable[int]) -> list[ProgressLine]:
    """What a stage prints at these updates, read back line by line."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        progress = Progress(stage, total, unit)
        for done in updates:
            progress.update(done)
    lines = output.getvalue().splitlines()
    parsed = [line for text in lines if (line := parse_progress(text)) is not None]
    assert len(parsed) == len(lines)
    return parsed


@pytest.mark.golden
def test_a_line_by_hand() -> None:
    line = "progress ppo 3/16 steps 0.21/s 61 s left"
    assert parse_progress(line) == ProgressLine("ppo", 3, 16, "steps", 0.21, 61.0)
    assert parse_progress(f"  {line}\n") == parse_progress(line)


@given(
    stage=st.text("abc_-09é", min_size=1, max_size=8),
    total=st.integers(2, 10**6),
    unit=st.sampled_from(["steps", "answers"]),
)
@settings(deadline=None, max_examples=30)
def test_what_is_printed_can_be_read(stage: str, total: int, unit: str) -> None:
    first, last = printed(stage, total, unit, [1, total])
    assert (first.stage, first.done, first.total, first.unit) == (stage, 1, total, unit)
    assert (last.stage, last.done, last.total, last.unit) == (stage, total, total, unit)
    assert last.seconds_left == 0


def test_a_stage_that_goes_on_does_not_count_what_an_earlier_attempt_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at 190 of 200 when it starts, and does a step in ten seconds."""
    clock = SimpleNamespace(monotonic=iter((0.0, 10.0, 20.0)).__next__)
    monkeypatch.setattr("components.foundation.progress.time", clock)  # time itself belongs to every thread
    first, second = printed("ppo", 200, "steps", [191, 192])
    assert (first.rate, first.seconds_left) == (0.1, 90.0)
    assert (second.rate, second.seconds_left) == (0.1, 80.0)


def test_lines_are_few_and_the_last_one_is_among_them() -> None:
    """At most one a second: thousands of quick steps print next to nothing, but always the end."""
    done = [line.done for line in printed("ppo", 5000, "steps", range(1, 5001))]
    assert len(done) < 100
    assert (done[0], done[-1]) == (1, 5000)
    assert done == sorted(set(done))


def test_a_start_at_zero_is_a_line_too() -> None:
    (line,) = printed("sft", 10, "steps", [0])
    assert (line.done, line.rate, line.seconds_left) == (0, 0.0, 0.0)


@pytest.mark.fault
@given(text=st.text())
@example(text="")
@example(text="progress")
@example(text="progress ppo 3/16 steps fast/s 61 s left")
@example(text="progress ppo -3/16 steps 0.21/s 61 s left")
@example(text="progress two words 3/16 steps 0.21/s 61 s left")
@example(text="12:00:00 progress ppo 3/16 steps 0.21/s 61 s left")
@example(text="progress ppo 3/16 steps 0.21/s 61 s left and more")
@settings(deadline=None, max_examples=50)
def test_other_lines_are_not_progress(text: str) -> None:
    assert parse_progress(text) is None


@pytest.mark.fault
@pytest.mark.parametrize("number", ["1.2.3", ".", "..."])
def test_a_number_that_is_none_is_not_progress(number: str) -> None:
    assert parse_progress(f"progress ppo 3/16 steps {number}/s 61 s left") is None
    assert parse_progress(f"progress ppo 3/16 steps 0.21/s {number} s left") is None
