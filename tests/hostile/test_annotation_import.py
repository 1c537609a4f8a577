"""Files of labels made to crash, to fill the memory, or to say something to a terminal or a spreadsheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.annotate.human import label_import
from components.annotate.human.label_import import MAX_PROBLEMS, compare, read_labels
from components.annotate.human.label_parsing import Label, parse_row
from components.annotate.human.results import result_table, summarize
from components.foundation.errors import DataError
from tests.hostile.bounded import bounded
from tests.unit.test_label_parsing import ANSWERS, ITEMS, flat

pytestmark = pytest.mark.fault

MEGABYTE = 1_000_000
READ = "from components.annotate.human.label_import import *"
COUNTS = (
    "*(lambda found, problems: ([len(found), len(problems)], problems[-1].reason))"
    "(*read_labels([Path(sys.argv[1])], {'item-1'}))"
)
ROW = json.dumps(flat()).encode()


def write(path: Path, block: bytes, times: int, start: bytes = b"", end: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(start)
        for _ in range(times):
            file.write(block)
        file.write(end)
    return path


@pytest.mark.parametrize(
    ("block", "times", "reason"),
    [
        (b"0," * 1000, 20_000, "the row is a int, not an object"),
        (b"{}," * 1000, 20_000, "it is no label"),
        (b"[]," * 1000, 20_000, "the row is a list"),
        (b" " * MEGABYTE, 200, "item 1 is broken, or over 1000000 characters"),
        (b'{"a":"' + b"x" * MEGABYTE + b'"},', 40, "item 1 is over 1000000 characters"),
        (b"[" + b"[]," * 400_000, 40, "item 1 is broken, or over 1000000 characters"),
    ],
    ids=["numbers", "objects", "lists", "spaces", "long text", "wide item"],
)
def test_an_array_of_any_size_takes_little_memory(block: bytes, times: int, reason: str, tmp_path: Path) -> None:
    """Read whole, forty to sixty megabytes of it are gigabytes of Python's objects."""
    file = write(tmp_path / "export.json", block, times, start=b"[")
    said = bounded(READ, COUNTS, file, more_bytes=150 * MEGABYTE)
    assert said.startswith("returned [0, ") and reason in said


def test_lines_of_any_number_take_little_memory(tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", b"0\n" * 1000, 20_000)
    said = bounded(READ, COUNTS, file, more_bytes=100 * MEGABYTE)
    assert said == f"returned [0, {MAX_PROBLEMS}] the row is a int, not an object"


def test_more_labels_than_people_can_give_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_import, "MAX_LABELS", 100)
    file = write(tmp_path / "labels.jsonl", ROW + b"\n", 200)
    with pytest.raises(DataError, match=r"labels\.jsonl brings the labels to more than 100"):
        read_labels([file], ITEMS)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'[{"a":' * 100_000, b"[" + b"[" * 900 + b"]" * 900 + b"]", b'[{"item_id": ' + b"[" * 500],
    ids=["open", "objects", "closed", "half"],
)  # fmt: skip
def test_a_deep_file_is_refused(content: bytes, tmp_path: Path) -> None:
    found, problems = read_labels([write(tmp_path / "export.json", content, 1)], ITEMS)
    assert not found and problems


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1,]", "item 2 is broken"),
        (b"[,1]", "item 1 is broken"),
        (b"[1 2]", "there is no , or ] after item 1"),
        (b"[1]]", "there is more after the array of 1 items"),
        (b"[1]\n[2]", "there is more after the array of 1 items"),
        (b"[", "item 1 is broken"),
        (b"[1", "there is no , or ] after item 1"),
    ],
)
def test_an_array_that_is_none_is_refused_where_it_breaks(content: bytes, reason: str, tmp_path: Path) -> None:
    _, problems = read_labels([write(tmp_path / "export.json", content, 1)], ITEMS)
    assert problems[-1].row == 0 and reason in problems[-1].reason


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("count", [0, 1, 3000])
def test_an_array_is_read_as_json_reads_it(count: int, indent: int | None, tmp_path: Path) -> None:
    """Three thousand rows lie across the pieces that are read at once."""
    rows = [flat(annotator=f"ann-{number}", note="é" * 700) for number in range(count)]
    file = tmp_path / "export.json"
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=False) + "\n \n", encoding="utf-8-sig")
    found, problems = read_labels([file], ITEMS)
    assert problems == [] and [label.row for label in found] == list(range(1, count + 1))


TEXT_IN_A_KEY = {"id": "item-1", "\x1b[2J\u202e.responses": 5}


def test_a_column_with_control_characters_does_not_reach_the_terminal() -> None:
    (reason,) = parse_row(TEXT_IN_A_KEY, ITEMS)
    assert isinstance(reason, str) and reason.isprintable() and "x1b" in reason


KEYS = [
    *("annotations", "data", "item_id", "annotator", "responses", "result", "from_name", "value", "choices", "skipped"),
    *("user_id", "completed_by", "id", "status", "more_helpful", "email", "was_cancelled"),
    *ANSWERS,
]
NAMES = st.sampled_from(KEYS) | st.sampled_from([f"{key}.responses{end}" for key in ANSWERS for end in ("", ".users")])
PLAIN = st.none() | st.booleans() | st.integers() | st.text(st.characters())
COLUMNS = st.text(st.characters(), max_size=5).map(lambda text: f"{text}.responses")
JSON = st.recursive(
    PLAIN | st.sampled_from(["item-1", "A", "safe", "ann"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | COLUMNS, inner, max_size=6),
    max_leaves=30,
)


@given(JSON)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_whatever_a_row_is_its_reasons_are_short_and_harmless(row: Any) -> None:
    for found in parse_row(row, ITEMS):
        assert isinstance(found, Label) or (found.isprintable() and len(found) < 600)


@given(content=st.binary(max_size=200) | st.lists(JSON, max_size=3).map(lambda rows: json.dumps(rows).encode()))
@settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_bytes_a_file_holds_it_is_labels_or_reasons(content: bytes, tmp_path: Path) -> None:
    file = write(tmp_path / "labels", content, 1)
    found, problems = read_labels([file], ITEMS)
    compare(found, [], problems)
    assert all(problem.reason.isprintable() for problem in problems)


@pytest.mark.parametrize(
    "name", ["=HYPERLINK(1)", "@SUM(1+1)", "a|b", "[x](http://h)", "<img src=x>", "a\nb", "`a`", "a b"]
)
def test_an_annotator_cannot_be_called_a_formula_or_markup(name: str) -> None:
    assert [type(found) for found in parse_row(flat(annotator=name), ITEMS)] == [str]


def test_an_annotator_called_like_an_address_is_no_link_in_the_table() -> None:
    """GitHub and MLflow make links of bare addresses, and underscores mean emphasis."""
    labels = [Label("item-1", name, None) for name in ("www.example.com", "__init__", "-1+1", "me@example.com")]
    table = result_table(summarize("s3://b/x", [], labels, exclude_careless=False))
    for label in labels:
        assert f"| `{label.annotator}` |" in table
