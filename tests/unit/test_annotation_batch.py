"""What annotators get: blind order, shared and gold items, and files that tell nothing of the key."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from components.annotate.human.batch import Item, Mixture, build_items
from components.annotate.human.formats import label_studio_config, write_formats
from components.annotate.human.questions import HARMS, QUESTIONS
from components.foundation.judging import AnswerPair
from components.foundation.preference import DualPreference, PromptRecord, read_jsonl
from components.prepare_data.prepare_data import BUILTIN_FOLDER

MIXTURE = Mixture(overlap_share=0.2, overlap_annotators=3, gold_share=0.1)
PAIRS = [AnswerPair(PromptRecord(f"prompt {i}", "red_team", "theft"), f"first {i}", f"second {i}") for i in range(200)]
KNOWN = [
    DualPreference(f"known {i}", f"good {i}", f"bad {i}", 1, int(i % 3 == 1), i % 3 != 1, i % 3 == 1) for i in range(90)
]


def test_the_seed_alone_decides_the_order_and_it_is_blind() -> None:
    items = build_items(PAIRS, KNOWN, MIXTURE, seed=7)
    assert items == build_items(PAIRS, KNOWN, MIXTURE, seed=7)
    other = build_items(PAIRS, KNOWN, MIXTURE, seed=8)
    swapped, otherwise = ({i.prompt: i.swapped for i in batch} for batch in (items, other))
    assert 70 <= sum(item.swapped for item in items if item.gold is None) <= 130
    assert sum(otherwise.get(prompt) != value for prompt, value in swapped.items()) > 50
    assert [item.prompt for item in items[:200]] != [pair.prompt.prompt for pair in PAIRS]
    for item in items:
        shown = (item.answer_b, item.answer_a) if item.swapped else (item.answer_a, item.answer_b)
        assert shown == (item.answer_0, item.answer_1)
    assert len({item.item_id for item in items}) == len(items)


def test_every_pair_is_there_and_the_shares_are_kept() -> None:
    items = build_items(PAIRS, KNOWN, MIXTURE, seed=1)
    plain = {(i.prompt, i.answer_0, i.answer_1, i.harm_category) for i in items if i.gold is None}
    assert plain == {(p.prompt.prompt, p.answer_0, p.answer_1, "theft") for p in PAIRS}
    gold = [item for item in items if item.gold is not None]
    assert len(gold) == 20
    assert sorted(item.labels_wanted for item in items) == [1] * 176 + [3] * 44
    assert any(item.labels_wanted == 1 for item in gold)  # gold items are spread like all others
    for item in gold:
        known = KNOWN[int(item.prompt.split()[-1])]
        safe = {known.response_0: known.is_response_0_safe, known.response_1: known.is_response_1_safe}
        assert item.gold is not None
        assert (item.gold.a_safe, item.gold.b_safe) == (safe[item.answer_a], safe[item.answer_b])


def test_small_shares_give_one_item_and_none_gives_none() -> None:
    few = build_items(PAIRS[:3], KNOWN, MIXTURE, seed=0)
    assert sum(item.gold is not None for item in few) == sum(item.labels_wanted == 3 for item in few) == 1
    bare = build_items(PAIRS[:3], KNOWN, Mixture(0.0, 3, 0.0), seed=0)
    assert len(bare) == 3 and {item.labels_wanted for item in bare} == {1}
    assert build_items([], KNOWN, MIXTURE, seed=0) == []  # nobody labels gold items for their own sake
    alike = [replace(r, is_response_0_safe=True, is_response_1_safe=True) for r in KNOWN]
    assert all(item.gold is None for item in build_items(PAIRS[:3], alike, MIXTURE, seed=0))


def test_a_pair_of_the_round_is_no_gold_item() -> None:
    """Its answers stand the other way round: the pair is the same, and known."""
    pair = PAIRS[0]
    known = DualPreference(pair.prompt.prompt, pair.answer_1, pair.answer_0, 0, 0, True, False)
    assert [item.gold for item in build_items([pair], [known], MIXTURE, seed=0)] == [None]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[Item]]:
    items = build_items(PAIRS[:20], KNOWN, MIXTURE, seed=3)
    write_formats(tmp_path, items)
    return tmp_path, items


def test_the_files_show_each_item_once_and_nothing_of_the_key(written: tuple[Path, list[Item]]) -> None:
    folder, items = written
    tasks = [t["data"] for file in folder.glob("label-studio/*.json") for t in json.loads(file.read_text())]
    lines = [json.loads(x) for f in folder.glob("argilla/*/records.jsonl") for x in f.read_text().splitlines()]
    expected = {i.item_id: {"prompt": i.prompt, "answer_a": i.answer_a, "answer_b": i.answer_b} for i in items}
    assert len(tasks) == len(lines) == len(items)
    assert {t.pop("item_id"): t for t in tasks} == expected
    assert {r.pop("id"): r for r in lines} == expected


def test_items_are_in_the_file_of_as_many_labels_as_they_want(written: tuple[Path, list[Item]]) -> None:
    folder, items = written
    for wanted in (1, 3):
        ids = {item.item_id for item in items if item.labels_wanted == wanted}
        tasks = json.loads((folder / f"label-studio/tasks-labelled-by-{wanted}.json").read_text())
        assert {task["data"]["item_id"] for task in tasks} == ids
        settings = json.loads((folder / f"argilla/labelled-by-{wanted}/settings.json").read_text())
        assert settings["distribution"] == {"strategy": "overlap", "min_submitted": wanted}
        assert [question["name"] for question in settings["questions"]] == [question.name for question in QUESTIONS]


def test_label_studios_configuration_asks_every_question_of_a_text_that_is_there() -> None:
    tree = xml.etree.ElementTree.fromstring(label_studio_config())
    texts = {text.get("name") for text in tree.iter("Text")}
    assert {text.get("value") for text in tree.iter("Text")} == {f"${name}" for name in texts}
    asked = {choices.get("name"): choices for choices in tree.iter("Choices")}
    assert set(asked) == {question.name for question in QUESTIONS}
    for question in QUESTIONS:
        choices = asked[question.name]
        assert choices.get("toName") in texts
        assert tuple(choice.get("value") for choice in choices.iter("Choice")) == question.choices
    assert asked["answer_b_harms"].get("whenTagName") == "answer_b_safety"


def test_the_harms_are_those_of_the_shipped_records() -> None:
    records = read_jsonl(BUILTIN_FOLDER / "preferences.jsonl", DualPreference)
    shipped = {name for r in records for name in (*r.response_0_harm_category, *r.response_1_harm_category)}
    assert shipped == set(HARMS) - {"other"}
