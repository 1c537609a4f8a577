"""One row of a file that comes back -> labels. The row is untrusted: it may be anything that JSON can say.

Three shapes are read, told apart by what the row holds:

    {"item_id": ..., "annotator": ..., "more_helpful": "A", ...}       flat, one label; or "skipped": true, no answers
    {"data": {"item_id": ...}, "annotations": [...], ...}              a task of Label Studio's JSON export
    {"id": ..., "responses": {"more_helpful": [{...}]}, ...}           a record of Argilla's `to_json`
    {"id": ..., "more_helpful.responses": ["A"], ...}                  the same of its `to_list(flatten=True)`

Of a row's texts nothing is taken over: items are known by their ids, and answers are from closed sets.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from components.annotate.human.questions import QUESTIONS, SAFETY, Question

_ANNOTATOR = re.compile(r"[A-Za-z0-9._@+-]{1,100}")
_FLAT_RESPONSES = ".responses"


@dataclass(frozen=True)
class Verdict:
    """One annotator's answers to the questions on one item; `more_...` are A or B."""

    a_safe: bool
    b_safe: bool
    a_harms: list[str]
    b_harms: list[str]
    more_helpful: str
    more_harmless: str

    def problem(self) -> str:
        """How the verdict contradicts itself, or ''."""
        for letter, safe, harms in (("A", self.a_safe, self.a_harms), ("B", self.b_safe, self.b_harms)):
            if safe and harms:
                return f"answer {letter} is marked safe, and yet with the harm {', '.join(harms)}"
        if self.a_safe != self.b_safe and self.more_harmless != ("A" if self.a_safe else "B"):
            other = "A" if self.more_harmless == "B" else "B"
            return f"answer {self.more_harmless} is marked unsafe and more harmless than answer {other}, which is safe"
        return ""


@dataclass(frozen=True)
class Label:
    """What one annotator said of one item; without a verdict, that it cannot be judged."""

    item_id: str
    annotator: str
    verdict: Verdict | None


@dataclass(frozen=True)
class _RawLabel:
    """As found in a row: nothing is checked, `answers` are by question."""

    item_id: Any
    annotator: Any
    answers: Mapping[str, Any]
    skipped: bool


class _Unreadable(Exception):
    """Why a row, or a label in it, is refused."""


def parse_row(row: Any, items: Collection[str]) -> list[Label | str]:
    """A decoded row -> its labels, and the reason for each that is refused. A task that nobody labelled gives none.

    Args:
        items: the ids of the batch.
    """
    try:
        raw = list(_raw_labels(row))
    except _Unreadable as reason:
        return [str(reason)]
    return [_checked(label, items) for label in raw]


def _raw_labels(row: Any) -> Iterator[_RawLabel]:
    if not isinstance(row, Mapping):
        raise _Unreadable(f"the row is a {type(row).__name__}, not an object")
    if "annotations" in row:
        yield from _label_studio(row)
    elif "responses" in row:
        yield from _argilla(row.get("id"), _mapping(row["responses"], "responses"))
    elif any(isinstance(key, str) and key.endswith(_FLAT_RESPONSES) for key in row):
        yield from _argilla(row.get("id"), _nested(row))
    elif "annotator" in row:
        answers = {question.name: row[question.name] for question in QUESTIONS if row.get(question.name) is not None}
        yield _RawLabel(row.get("item_id"), row["annotator"], answers, row.get("skipped") is True)
    else:
        raise _Unreadable("the row has neither annotator, nor annotations, nor responses: it is no label")


def _label_studio(row: Mapping[str, Any]) -> Iterator[_RawLabel]:
    item_id = _mapping(row.get("data"), "data").get("item_id")
    for annotation in _list(row["annotations"], "annotations"):
        annotation = _mapping(annotation, "an annotation")
        author = annotation.get("completed_by")
        if isinstance(author, Mapping):
            author = author.get("email") or author.get("id")
        if isinstance(author, int) and not isinstance(author, bool):
            author = str(author)
        answers: dict[str, Any] = {}
        for part in _list(annotation.get("result"), "result"):
            name = _mapping(part, "a part of the result").get("from_name")
            if not isinstance(name, str) or name in answers:
                raise _Unreadable(f"a result's from_name {_shown(name)} is no text, or stands there twice")
            answers[name] = _mapping(part.get("value"), "value").get("choices")
        yield _RawLabel(item_id, author, answers, annotation.get("was_cancelled") is True)


def _argilla(item_id: Any, responses: Mapping[str, Any]) -> Iterator[_RawLabel]:
    """Responses stand by question; labels are by annotator. Drafts are no labels yet."""
    answers: dict[str, dict[str, Any]] = {}
    status: dict[str, Any] = {}
    for question, entries in responses.items():
        for entry in _list(entries, f"responses of {_shown(question)}"):
            entry = _mapping(entry, "a response")
            user = entry.get("user_id")
            if not isinstance(user, str):
                raise _Unreadable(f"user_id {_shown(user)} is no text")
            if question in answers.setdefault(user, {}):
                raise _Unreadable(f"annotator {_shown(user)} answers {_shown(question)} twice")
            answers[user][question] = entry.get("value")
            status[user] = entry.get("status")
    for user, given in answers.items():
        if status[user] != "draft":
            yield _RawLabel(item_id, user, given, status[user] == "discarded")


def _nested(row: Mapping[str, Any]) -> dict[str, Any]:
    """Argilla's flattened columns of values, users and states -> its nested responses."""
    responses: dict[str, Any] = {}
    for key in row:
        if key.endswith(_FLAT_RESPONSES):
            columns = [row[key], row.get(f"{key}.users"), row.get(f"{key}.status")]
            values, users, states = (_list(column or [], _shown(key)) for column in columns)
            if not len(values) == len(users) == len(states):
                raise _Unreadable(f"{_shown(key)} has {len(values)} values, {len(users)} users, {len(states)} states")
            entries = zip(values, users, states, strict=True)
            responses[key.removesuffix(_FLAT_RESPONSES)] = [
                {"value": value, "user_id": user, "status": state} for value, user, state in entries
            ]
    return responses


def _checked(raw: _RawLabel, items: Collection[str]) -> Label | str:
    if not isinstance(raw.item_id, str) or raw.item_id not in items:
        return f"item {_shown(raw.item_id)} is not of this batch"
    if not isinstance(raw.annotator, str) or not _ANNOTATOR.fullmatch(raw.annotator):
        return f"annotator {_shown(raw.annotator)} is no name of 1 to 100 letters, digits and ._@+-"
    if raw.skipped:
        return Label(raw.item_id, raw.annotator, None)
    try:
        verdict = _verdict(raw.answers)
    except _Unreadable as reason:
        return f"item {raw.item_id}, annotator {raw.annotator}: {reason}"
    problem = verdict.problem()
    return (
        f"item {raw.item_id}, annotator {raw.annotator}: {problem}"
        if problem
        else Label(raw.item_id, raw.annotator, verdict)
    )


def _verdict(answers: Mapping[str, Any]) -> Verdict:
    unknown = set(answers) - {question.name for question in QUESTIONS}
    if unknown:
        raise _Unreadable(f"there is no question {_shown(min(unknown))}")
    given = {question.name: _choices(question, answers.get(question.name)) for question in QUESTIONS}
    return Verdict(
        a_safe=given["answer_a_safety"] == [SAFETY[0]],
        b_safe=given["answer_b_safety"] == [SAFETY[0]],
        a_harms=given["answer_a_harms"],
        b_harms=given["answer_b_harms"],
        more_helpful=given["more_helpful"][0],
        more_harmless=given["more_harmless"][0],
    )


def _choices(question: Question, value: Any) -> list[str]:
    """The choices taken, in the order of the question: exactly one, or any number where the question allows it."""
    taken = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(choice, str) and choice in question.choices for choice in taken):
        raise _Unreadable(f"{question.name} is {_shown(value)}, not of {', '.join(question.choices)}")
    if not question.several and len(taken) != 1:
        raise _Unreadable(f"{question.name} is {'missing' if not taken else 'answered more than once'}")
    return [choice for choice in question.choices if choice in taken]


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _Unreadable(f"{name} is a {type(value).__name__}, not an object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Unreadable(f"{name} is a {type(value).__name__}, not a list")
    return value


def _shown(value: Any) -> str:
    """For a message: short, and without characters that a terminal would act on."""
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
