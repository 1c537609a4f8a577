"""What the user sees of a run on a stream that is no terminal."""

from __future__ import annotations

import io
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.foundation.errors import LabelsAwaited
from components.foundation.exit_codes import ends_when_labels_are_awaited
from pipelines.local.screen import Screen

OURS = "12:00:00 round 1 sft: started"
PROGRESS = "progress ppo 3/16 steps 0.21/s 61 s left"
ERROR = "components.foundation.errors.ModelError: model folder /x has no config.json"
CHATTER = [
    "",
    "12:00:00.123 - INFO - Executing task 'sft' --> Running",
    "12:00:00 - INFO - Streaming logs",
    "[KFP Executor 2024-01-01 12:00:00,000 INFO]: Looking for component",
    "Found existing installation: pip 24.0",
    "Traceback (most recent call last):",
    '  File "/x/y.py", line 3, in <module>',
    "    raise ModelError(message)",
    "Executor output directory: /tmp/x",
    "2024-01-01 12:00:00 something else",
]


def shown(*chunks: str) -> tuple[list[str], Screen]:
    stream = io.StringIO()
    screen = Screen(stream)
    for chunk in chunks:
        assert screen.write(chunk) == len(chunk)
    screen.close()
    return stream.getvalue().splitlines(), screen


@pytest.mark.golden
def test_our_lines_and_progress_are_shown_and_chatter_is_dropped() -> None:
    lines = [CHATTER[0], OURS, *CHATTER, PROGRESS, "12:00:01 done", *CHATTER]
    output, screen = shown(*(line + "\n" for line in lines))
    assert output == [OURS, PROGRESS, "12:00:01 done"]
    assert screen.last_error == ""


def test_what_a_step_that_awaits_labels_says_is_kept_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The line is the one that the step itself prints; its exit code is not success, so nothing that needs it runs."""
    with pytest.raises(SystemExit) as end, ends_when_labels_are_awaited():
        raise LabelsAwaited("waiting for labels: 9 items at s3://x lack 13 labels")
    assert end.value.code == 75
    output, screen = shown(OURS + "\n", capsys.readouterr().out)
    assert output == [OURS]
    assert screen.waiting == "waiting for labels: 9 items at s3://x lack 13 labels"
    assert screen.last_error == ""


def test_events_in_json_are_shown_as_they_are() -> None:
    event = '{"time": "2026-11-24T12:00:00.000Z", "level": "INFO", "message": "[bold]sft[/bold]: started"}'
    output, _ = shown(event + "\n", '{"other": "json"}\n')
    assert output == [event]


def test_what_a_step_says_that_has_nothing_new_is_kept_and_is_no_error() -> None:
    output, screen = shown(OURS + "\n", "nothing new: 3 new preference pairs\n")
    assert output == [OURS]
    assert (screen.nothing_new, screen.waiting, screen.last_error) == ("nothing new: 3 new preference pairs", "", "")


@pytest.mark.parametrize("line", CHATTER)
def test_each_kind_of_chatter_is_dropped(line: str) -> None:
    output, screen = shown(line + "\n")
    assert output == []
    assert screen.last_error == ""


@given(cuts=st.lists(st.integers(0, 400), max_size=12))
@settings(deadline=None, max_examples=50)
def test_it_does_not_matter_how_the_text_is_cut(cuts: list[int]) -> None:
    text = "\n".join([OURS, CHATTER[1], PROGRESS, ERROR, "12:00:09 end"]) + "\n"
    places = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    output, screen = shown(*(text[a:b] for a, b in itertools.pairwise(places)))
    assert output == [OURS, PROGRESS, "12:00:09 end"]
    assert screen.last_error == "model folder /x has no config.json"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (ERROR, "model folder /x has no config.json"),
        ("components.foundation.errors.GateError: a: b: c", "a: b: c"),
        ("ValueError: bad value", "ValueError: bad value"),
        ("RuntimeError: out of memory", "RuntimeError: out of memory"),
        ("\x1b[91mKeyError: 'x'\x1b[0m", "KeyError: 'x'"),
        ("safetensors_rust.SafetensorError: header", "safetensors_rust.SafetensorError: header"),
        ("AssertionError", "AssertionError"),
    ],
)
def test_an_error_is_kept_and_not_shown(line: str, message: str) -> None:
    output, screen = shown(OURS + "\n", line + "\n", CHATTER[1] + "\n")
    assert output == [OURS]
    assert screen.last_error == message


@pytest.mark.fault
@pytest.mark.parametrize(
    "text",
    [
        "[red]not red[/red]",
        "[/nothing]",
        "[bold",
        "[link=http://evil.example]click[/link]",
        "[]",
        "\\[escaped]",
        "{braces} %s %d",
        ":bomb: :warning:",
        "x" * 500,
        "漢字 é 🎈",
    ],
)
def test_hostile_text_is_shown_as_it_is(text: str) -> None:
    """A prompt or a file name may stand in a log line: no mark-up, no wrapping, no pictures for words."""
    output, _ = shown(f"12:00:00 {text}\n")
    assert output == [f"12:00:00 {text}"]
    stream = io.StringIO()
    Screen(stream).line(text)
    assert stream.getvalue() == text + "\n"


@pytest.mark.fault
@pytest.mark.parametrize("code", ["\x1b[2J", "\x1b]0;title\x07", "\x1b[1;1H", "\x1b[31m"])
def test_terminal_codes_do_not_pass(code: str) -> None:
    output, _ = shown(f"12:00:00 before{code}after\n")
    (line,) = output
    assert "\x1b" not in line
    assert "\x07" not in line
    assert "before" in line
    assert "after" in line


def test_a_screen_is_a_stream_that_can_be_written_to() -> None:
    screen = Screen(io.StringIO())
    assert screen.writable()
    print(OURS, file=screen)
    screen.flush()
