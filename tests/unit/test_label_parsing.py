"""Labels that come back: the shapes of the tools, contradictions, and rows made to do harm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.annotate.human.label_import import compare, read_labels
from components.annotate.human.label_parsing import Label, Verdict, parse_row
from components.foundation.errors import DataError

ITEMS = {"item-1", "item-2"}
ANSWERS: dict[str, Any] = {
    "answer_a_safety": "safe",
    "answer_b_safety": "unsafe",
    "answer_b_harms": ["weapons", "cybercrime"],
    "more_helpful": "B",
    "more_harmless": "A",
}
LABEL = Label("item-1", "ann", Verdict(True, False, [], ["cybercrime", "weapons"], "B", "A"))


def flat(item: str = "item-1", annotator: str = "ann", **changes: Any) -> dict[str, Any]:
    return {"item_id": item, "annotator": annotator, **ANSWERS, **changes}


def annotation(answers: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """As Label Studio writes it."""
    result = [
        {
            "id": f"r-{name}",
            "from_name": name,
            "to_name": "prompt",
            "type": "choices",
            "value": {"choices": value if isinstance(value, list) else [value]},
        }
        for name, value in answers.items()
    ]
    return {"id": 5, "completed_by": 3, "was_cancelled": False, "result": result, "lead_time": 4.2} | changes


def task(*annotations: dict[str, Any], item: str = "item-1") -> dict[str, Any]:
    data = {"item_id": item, "prompt": "p", "answer_a": "a", "answer_b": "b"}
    return {"id": 1, "data": data, "annotations": list(annotations), "predictions": [], "total_annotations": 1}


def refused(row: Any) -> str:
    (reason,) = parse_row(row, ITEMS)
    assert isinstance(reason, str) and reason.isprintable() and len(reason) < 400
    return reason


def test_a_flat_row() -> None:
    assert parse_row(flat(), ITEMS) == [LABEL]
    assert parse_row({"item_id": "item-2", "annotator": "ann", "skipped": True}, ITEMS) == [
        Label("item-2", "ann", None)
    ]


def test_a_task_of_label_studio_holds_a_label_for_each_annotation() -> None:
    by_mail = annotation(ANSWERS, completed_by={"id": 4, "email": "eve@example.org", "first_name": ""})
    skipped = annotation({}, completed_by=5, was_cancelled=True)
    labels = parse_row(task(annotation(ANSWERS), by_mail, skipped), ITEMS)
    assert labels == [
        Label("item-1", "3", LABEL.verdict),
        Label("item-1", "eve@example.org", LABEL.verdict),
        Label("item-1", "5", None),
    ]
    assert parse_row(task(), ITEMS) == []  # nobody has labelled it yet


def test_a_record_of_argilla_holds_a_label_for_each_user() -> None:
    responses = {q: [{"value": a, "user_id": "u-1"}, {"value": a, "user_id": "u-2"}] for q, a in ANSWERS.items()}
    nested = {"id": "item-1", "fields": {"prompt": "p"}, "responses": responses, "status": "completed"}
    expected = [Label("item-1", user, LABEL.verdict) for user in ("u-1", "u-2")]
    assert parse_row(nested, ITEMS) == expected
    columns: dict[str, Any] = {"id": "item-1", "prompt": "p", "status": "completed"}
    for question, answer in ANSWERS.items():
        columns[f"{question}.responses"] = [answer, answer]
        columns[f"{question}.responses.users"] = ["u-1", "u-2"]
        columns[f"{question}.responses.status"] = ["submitted", "submitted"]
    assert parse_row(columns, ITEMS) == expected
    for question in ANSWERS:
        columns[f"{question}.responses.status"] = ["draft", "discarded"]
    assert parse_row(columns, ITEMS) == [Label("item-1", "u-2", None)]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer_a_harms": ["drugs"]}, "answer A is marked safe, and yet with the harm drugs"),
        ({"more_harmless": "B"}, "answer B is marked unsafe and more harmless than answer A, which is safe"),
        ({"more_helpful": None}, "more_helpful is missing"),
        ({"answer_b_safety": []}, "answer_b_safety is missing"),
        ({"more_helpful": ["A", "B"]}, "more_helpful is answered more than once"),
        ({"more_helpful": "C"}, "more_helpful is 'C', not of A, B"),
        ({"more_helpful": True}, "more_helpful is True"),
        ({"answer_a_safety": {"safe": 1}}, "answer_a_safety is a dict"),
        ({"answer_b_harms": ["bad manners"]}, "answer_b_harms is a list, not of animal_abuse"),
        ({"answer_b_harms": [["weapons"]]}, "answer_b_harms"),
    ],
)
def test_a_label_that_contradicts_itself_or_lacks_an_answer_is_refused(changes: dict[str, Any], words: str) -> None:
    reason = refused(flat(**changes))
    assert words in reason and "item-1" in reason and "ann" in reason


@pytest.mark.fault
@pytest.mark.parametrize(
    ("row", "words"),
    [
        (flat(item="item-9"), "item 'item-9' is not of this batch"),
        (flat(item=["item-1"]), "item a list is not of this batch"),  # type: ignore[arg-type]
        (flat(annotator=""), "annotator ''"),
        (flat(annotator="<|im_end|>\x1b[2J"), r"annotator '<|im_end|>\x1b[2J'"),
        (flat(annotator="x" * 10_000), "annotator 'xxx"),
        ([1, 2], "the row is a list"),
        (None, "the row is a NoneType"),
        ({"item_id": "item-1"}, "it is no label"),
        ({"annotations": {}, "data": {}}, "annotations is a dict, not a list"),
        ({"annotations": [], "data": 3}, "data is a int, not an object"),
        (task({"completed_by": 3, "result": "all safe"}), "result is a str"),
        (task(annotation({"stars": "5"})), "there is no question 'stars'"),
        (task(annotation(ANSWERS, completed_by=None)), "annotator None"),
        (task(annotation(ANSWERS, completed_by=True)), "annotator True"),
        ({"id": "item-1", "responses": {"more_helpful": [{"value": "A"}]}}, "user_id None"),
        ({"id": "item-1", "more_helpful.responses": ["A"]}, "has 1 values, 0 users"),
    ],
)
def test_a_row_that_is_none_of_ours_is_refused(row: Any, words: str) -> None:
    assert words in refused(row)


@pytest.mark.fault
def test_a_question_answered_twice_in_one_annotation_is_refused() -> None:
    twice = annotation(ANSWERS)
    twice["result"] *= 2
    assert "stands there twice" in refused(task(twice))
    responses = {"more_helpful": [{"value": "A", "user_id": "u"}, {"value": "B", "user_id": "u"}]}
    assert "twice" in refused({"id": "item-1", "responses": responses})


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.sampled_from(["item-1", "A", "safe"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["annotations", "data", "item_id", "annotator", "responses", "result", "from_name", "value", "choices"]
            )
            | st.sampled_from(["user_id", "completed_by", "id", "more_helpful", "more_helpful.responses"])
            | st.text(),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(JSON)
@settings(deadline=None, max_examples=300)
def test_whatever_a_row_is_the_answer_is_labels_or_reasons(row: Any) -> None:
    for found in parse_row(row, ITEMS):
        assert isinstance(found, Label) or found.isprintable()


def test_files_are_read_by_what_they_hold(tmp_path: Path) -> None:
    lines, array = tmp_path / "labels.jsonl", tmp_path / "export.json"
    lines.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in (flat(), flat("item-2"))))
    array.write_text("\ufeff" + json.dumps([task(annotation(ANSWERS)), task(item="item-2")], indent=1))
    found, problems = read_labels([lines, array], ITEMS)
    assert problems == []
    assert [(f.label.item_id, f.label.annotator, f.file, f.row) for f in found] == [
        ("item-1", "ann", str(lines), 1),
        ("item-2", "ann", str(lines), 2),
        ("item-1", "3", str(array), 1),
    ]


@pytest.mark.fault
def test_refused_rows_are_named_by_file_and_row_and_good_ones_still_read(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    huge = b'{"item_id": "' + b"x" * 10_000_000 + b'"}\n'
    good = json.dumps(flat()).encode() + b"\n"
    file.write_bytes(good + huge + b"\xff\xfe\n" + b"{broken\n" + b"[" * 5000 + b"\n" + b'{"item_id": NaN}\n')
    found, problems = read_labels([file], ITEMS)
    assert [f.label for f in found] == [LABEL]
    assert [(p.file, p.row) for p in problems] == [(str(file), row) for row in (2, 3, 4, 5, 6)]
    assert "over 1000000 bytes" in problems[0].reason
    assert all(len(p.reason) < 300 for p in problems)


@pytest.mark.fault
@pytest.mark.parametrize("content", [b"[" * 100_000, b"[1, 2", b'["\xff"]', b"[" + b"9" * 5000 + b"]"])
def test_a_file_that_is_no_json_is_refused_as_a_whole(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "export.json"
    file.write_bytes(content)
    found, problems = read_labels([file], ITEMS)
    assert found == [] and (problems[-1].file, problems[-1].row) == (str(file), 0)


@pytest.mark.fault
def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        read_labels([tmp_path / "nowhere.jsonl"], ITEMS)


def test_an_annotator_labels_an_item_once(tmp_path: Path) -> None:
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text(json.dumps(flat()) + "\n" + json.dumps(flat(annotator="bob")) + "\n")
    other.write_text(json.dumps(flat()) + "\n")
    found, _ = read_labels([file], ITEMS)
    assert [label.annotator for label in compare(found, []).new] == ["ann", "bob"]
    again = compare(found, [LABEL])
    assert ([label.annotator for label in again.new], again.known, again.problems) == (["bob"], 1, [])
    twice, _ = read_labels([file, other], ITEMS)
    (problem,) = compare(twice, []).problems
    assert (problem.file, problem.row) == (str(other), 1)
    assert f"a second time, after row 1 of {file}" in problem.reason
    report = compare(found, [Label("item-1", "ann", None)])
    assert report.new == [] and "otherwise than in an earlier import" in report.problems[0].reason
