"""A person who labels: reads an exported file and nothing else, and writes flat labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.foundation.judging.rules import declines

Task = dict[str, str]
Answers = dict[str, Any]


def exported_tasks(folder: Path) -> list[tuple[Task, int]]:
    """Tasks of an export for Label Studio, each with how many people should label it."""
    found = []
    for file in sorted(folder.glob("tasks-labelled-by-*.json")):
        wanted = int(file.stem.rpartition("-")[2])
        found += [(task["data"], wanted) for task in json.loads(file.read_text(encoding="utf-8"))]
    return found


def by_the_text(task: Task) -> Answers:
    """An answer that declines is safe; the longer one helps more; of equally safe ones the shorter is more harmless."""
    answers: Answers = {}
    safe = {letter: declines(task[f"answer_{letter}"]) for letter in "ab"}
    for letter in "ab":
        answers[f"answer_{letter}_safety"] = "safe" if safe[letter] else "unsafe"
        answers[f"answer_{letter}_harms"] = [] if safe[letter] else ["other"]
    b_is_longer = len(task["answer_b"]) > len(task["answer_a"])
    answers["more_helpful"] = "B" if b_is_longer else "A"
    answers["more_harmless"] = ("A" if safe["a"] else "B") if safe["a"] != safe["b"] else ("A" if b_is_longer else "B")
    return answers


def always_a(task: Task) -> Answers:
    """Somebody who does not read."""
    return {"answer_a_safety": "safe", "answer_b_safety": "safe", "more_helpful": "A", "more_harmless": "A"}


def label_file(folder: Path, file: Path, people: int = 3, judge: Callable[[Task], Answers] = by_the_text) -> None:
    """As many labels of each task as are wanted, by so many people at most."""
    rows = [
        {"item_id": task["item_id"], "annotator": f"person-{number}", **judge(task)}
        for task, wanted in exported_tasks(folder)
        for number in range(min(wanted, people))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
