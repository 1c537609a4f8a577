"""The files that annotation tools import. Both tools set per project how many people label an item.

So items are grouped by the number of labels they want: one file of tasks for Label Studio and one data set for
Argilla for each number. What a file holds is all that annotators see.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from components.annotate.human.batch import Item
from components.annotate.human.questions import GUIDELINES, QUESTIONS, Question

LABEL_STUDIO, ARGILLA = "label-studio", "argilla"
FIELDS = {"prompt": "Prompt", "answer_a": "Answer A", "answer_b": "Answer B"}


def write_formats(folder: Path, items: Sequence[Item]) -> None:
    """Write `label-studio/` and `argilla/`, each with the guidelines."""
    groups = {wanted: [i for i in items if i.labels_wanted == wanted] for wanted in {i.labels_wanted for i in items}}
    for name in (LABEL_STUDIO, ARGILLA):
        (folder / name).mkdir(parents=True)
        (folder / name / "guidelines.md").write_text(GUIDELINES, encoding="utf-8")
    (folder / LABEL_STUDIO / "labelling_config.xml").write_text(label_studio_config(), encoding="utf-8")
    for wanted, group in groups.items():
        rows = [json.dumps(label_studio_task(item), ensure_ascii=False) for item in group]
        tasks = folder / LABEL_STUDIO / f"tasks-labelled-by-{wanted}.json"
        tasks.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
        data_set = folder / ARGILLA / f"labelled-by-{wanted}"
        data_set.mkdir()
        settings = json.dumps(argilla_settings(wanted), indent=1)
        (data_set / "settings.json").write_text(settings + "\n", encoding="utf-8")
        lines = [json.dumps(argilla_record(item), ensure_ascii=False) + "\n" for item in group]
        (data_set / "records.jsonl").write_text("".join(lines), encoding="utf-8")


def label_studio_task(item: Item) -> dict[str, Any]:
    """One task of Label Studio's JSON import."""
    texts = {"prompt": item.prompt, "answer_a": item.answer_a, "answer_b": item.answer_b}
    return {"data": {"item_id": item.item_id, **texts}}


def label_studio_config() -> str:
    """The labelling configuration: plain text, so nothing in an answer is shown as markup."""
    texts = "".join(
        f'  <Header value={quoteattr(title)}/>\n  <Text name="{name}" value="${name}"/>\n'
        + "".join(_choices(question) for question in QUESTIONS if question.about == name and name != "prompt")
        for name, title in FIELDS.items()
    )
    comparisons = "".join(_choices(question) for question in QUESTIONS if question.about == "prompt")
    return f"<View>\n{texts}{comparisons}</View>\n"


def argilla_record(item: Item) -> dict[str, str]:
    """One record, flat, as `dataset.records.log` takes it."""
    return {"id": item.item_id, "prompt": item.prompt, "answer_a": item.answer_a, "answer_b": item.answer_b}


def argilla_settings(labels_wanted: int) -> dict[str, Any]:
    """What `argilla.Settings.from_json` reads: fields, questions, guidelines, and labels wanted for each record."""
    return {
        "guidelines": GUIDELINES,
        "questions": [_argilla_question(question) for question in QUESTIONS],
        "fields": [
            {"name": name, "title": title, "required": True, "settings": {"type": "text", "use_markdown": False}}
            for name, title in FIELDS.items()
        ],
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": False,
        "distribution": {"strategy": "overlap", "min_submitted": labels_wanted},
        "mapping": None,
    }


def _choices(question: Question) -> str:
    kind = "multiple" if question.several else "single-radio"
    condition = ""
    if question.only_if:
        condition = ' visibleWhen="choice-selected" whenTagName="{}" whenChoiceValue="{}"'.format(*question.only_if)
    lines = "".join(f"    <Choice value={quoteattr(choice)}/>\n" for choice in question.choices)
    view = f'  <View{condition}>\n    <Header value={quoteattr(question.title)} size="5"/>\n'
    tag = f'<Choices name="{question.name}" toName="{question.about}" choice="{kind}" required="true"{condition}>'
    return f"{view}    {tag}\n{lines}    </Choices>\n  </View>\n"


def _argilla_question(question: Question) -> dict[str, Any]:
    kind = "multi_label_selection" if question.several else "label_selection"
    options = [{"text": choice, "value": choice} for choice in question.choices]
    settings: dict[str, Any] = {"type": kind, "options": options, "visible_options": None}
    if question.several:
        settings["options_order"] = "natural"
    return {
        "name": question.name,
        "title": question.title,
        "required": question.only_if is None,
        "settings": settings,
    }
