"""What a model, a data file or a setting says on a page: it is text there, and nothing else.

Each page is made twice, with plain words and with hostile ones, and read by a parser: only the words may differ.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import html
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from components.annotate.human.batch import Item
from components.annotate.human.formats import label_studio_config, label_studio_task
from components.foundation.preference import BadRow, LoadResult
from components.foundation.results import PpoTrace
from components.foundation.settings import resolve_settings
from components.foundation.untrusted import markdown_code
from components.ppo_lagrangian.model_card import CardEvidence, model_card
from components.prepare_data.prepare_data import PreparedData, data_table
from components.report.render import render_html, render_markdown
from components.report.report_data import ReportData
from components.report.svg import tick_labels, tidy_ticks
from tests.unit.test_report import HOSTILE, Elements, example_data, with_texts

pytestmark = pytest.mark.fault

PAYLOADS = [
    HOSTILE,
    "<script>alert(1)</script>",
    "</title></style></script><svg onload=alert(1)>",
    "<img src=//evil.example/x onerror=alert(1)>",
    "<iframe srcdoc='<script>1</script>'>",
    "<!-- --><![CDATA[<b>]]><?php ?>",
    "&lt;b&gt;&#60;b&#x3e;&amp;",
    "\" onmouseover=\"alert(1)\" x='",
    "{{7*7}} {% for x in range(9**9) %}x{% endfor %} {{ ''.__class__.__mro__ }} ${7*7} #{7*7} <%= 7*7 %>",
    "{% raw %}{% endraw %}{# #}{% include '/etc/passwd' %}",
    "![x](http://evil.example/p.png) [click](javascript:alert(1)) <http://evil.example>",
    "http://evil.example/x www.evil.example me@evil.example",
    "[x]: http://evil.example\n\n[x]",
    "\n---\nlicense: mit\n---\n",
    "\n# heading\n\n- list\n\n> quote\n\n    code\n\n---\n***\n",
    "| a | b |\n|---|---|\n| c | d |",
    "`", "``", "```\n<b>\n```", "` <b> `", "`a``b```c", "~~~\n", "\\", "\\`", "\\|", "a|b", "``|`",
    "*a* _b_ **c** ~~d~~ ==e== $f$ :smile: @team #1",
    "\x00\x1b[2J\x07\u202e\u2066\u2028\ufeff\ud800",
    "=HYPERLINK(\"http://evil.example\")", "+1", "-1", "@SUM(1)", "\t=1",
    "", " ", "\n",
    "x" * 20_000,
]  # fmt: skip
WORDS = st.text(st.sampled_from("<>&\"'`|\\[]()!*_~#-+=:/{}%$@.\n\t x1") | st.characters(), max_size=30)


def small(data: ReportData) -> ReportData:
    """One round with two answers of each kind: a page of it is quickly made."""

    def few(answers: list[Any]) -> list[Any]:
        return [a for kind in ("red_team", "benign", "lookalike") for a in [a for a in answers if a.kind == kind][:2]]

    return dataclasses.replace(
        data, answers=[few(a) for a in data.answers], scored_sft_answers=few(data.scored_sft_answers)
    )


DATA = small(example_data(rounds=1, steps=2))


def shape_of_html(page: str) -> list[tuple[str, list[str]]]:
    return [(tag, sorted(attributes)) for tag, attributes in Elements(page).found]


@functools.cache
def plain_shape() -> list[tuple[str, list[str]]]:
    return shape_of_html(render_html(with_texts(DATA, "word")))


@pytest.mark.parametrize("order", [1, -1])
def test_texts_are_text_on_the_report_page(order: int) -> None:
    """All of them in each place where a text comes from outside, one after the other: a page takes a second."""
    page = render_html(with_texts(DATA, " ".join(PAYLOADS[::order])))
    assert shape_of_html(page) == plain_shape()
    assert not [c for c in page if ord(c) < 32 and c not in "\n\t"]
    page.encode("utf-8")


@given(WORDS.filter(bool))
@settings(derandomize=True, deadline=None, max_examples=5)
def test_any_text_is_text_on_the_report_page(text: str) -> None:
    assert shape_of_html(render_html(with_texts(DATA, text))) == plain_shape()


def test_a_template_in_a_text_is_not_worked_out() -> None:
    page = html.unescape(render_html(with_texts(DATA, "{{7*7}}{% if 1 %}yes{% endif %}")))
    assert "{{7*7}}{% if 1 %}yes{% endif %}" in page and "49yes" not in page


def card(text: str) -> str:
    chosen = resolve_settings("tiny", overrides=["annotate.annotator=judge"])
    annotate = chosen.annotate.model_copy(update={"judge_model": text})
    chosen = chosen.model_copy(update={"base_model": text, "annotate": annotate})
    trace = PpoTrace(0.1, [1.0], [0.1], [0.1], [0.1], [0.1])
    return model_card(chosen, text, 1, trace, CardEvidence({text: text}, None))


def table(text: str) -> str:
    result: LoadResult[Any] = LoadResult(text, [], [BadRow(1, text, text)], "0" * 64)
    return data_table(PreparedData(result, result, result, result, result))


MARKDOWN: list[Callable[[str], str]] = [lambda text: render_markdown(with_texts(DATA, text)), card, table]
READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def shape_of_markdown(page: str) -> list[tuple[str, str]]:
    """Every token; the words of a code span are left out, and all other words are kept."""
    found = []
    for token in READER.parse(page):
        for part in [token, *(token.children or [])]:
            content = "" if part.type in ("inline", "code_inline") else part.content
            found.append((part.type, content.replace(settings_digest(page), "")))
    return found


def settings_digest(page: str) -> str:
    """The one thing on a card that follows from its texts."""
    lines = [line for line in page.splitlines() if line.startswith("| seed, settings digest |")]
    return lines[0].split(", ")[-1].strip(" |") if lines else "\0"


@pytest.mark.parametrize("text", PAYLOADS, ids=lambda text: ascii(text[:24]))
@pytest.mark.parametrize("page", MARKDOWN, ids=["report", "model card", "data table"])
def test_a_text_is_a_code_span_in_markdown(page: Callable[[str], str], text: str) -> None:
    assert shape_of_markdown(page(text)) == shape_of_markdown(page("word"))
    assert not {kind for kind, _ in shape_of_markdown(page(text))} & {"html_block", "html_inline", "link_open", "image"}


@given(WORDS)
@example("`|")
@example("\\|`")
@settings(derandomize=True, deadline=None, max_examples=150)
def test_any_text_is_one_code_span_in_a_line_and_in_a_table(text: str) -> None:
    span = markdown_code(text)
    assert span.isprintable()
    (_, line, _) = READER.parse(f"before {span} after")
    assert [part.type for part in line.children or []] == ["text", "code_inline", "text"]
    cells = [token for token in READER.parse(f"| a | b |\n|---|---|\n| {span} | end |") if token.type == "inline"]
    assert [[part.type for part in cell.children or []] for cell in cells[2:]] == [["code_inline"], ["text"]]


def test_an_ordinary_text_is_shown_as_it_is() -> None:
    assert markdown_code("smollm2-135m-instruct") == "`smollm2-135m-instruct`"
    assert markdown_code("a `b` c") == "`` a `b` c ``"


@pytest.mark.parametrize("text", PAYLOADS, ids=lambda text: ascii(text[:24]))
def test_no_text_gets_into_the_head_of_a_model_card(text: str) -> None:
    _, head, _ = card(text).split("---\n", 2)
    assert yaml.safe_load(head) == yaml.safe_load(card("word").split("---\n", 2)[1])


@pytest.mark.parametrize("text", PAYLOADS, ids=lambda text: ascii(text[:24]))
def test_annotators_are_shown_text_and_the_tool_is_told_so(text: str) -> None:
    """The tool's configuration is the same whatever the answers are, and has nothing that shows markup."""
    config = label_studio_config()
    assert "<Text name=" in config and not any(tag in config for tag in ("HyperText", "Markdown", "valueType"))
    assert label_studio_task(Item("i", text, "", text, text, swapped=False))["data"]["answer_a"] == text


def can_write_spreadsheets(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        if {part for name in names for part in name.split(".")} & {"csv", "pandas", "openpyxl"}:
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("to_csv", "write_csv", "to_excel"):
            return True
    return False


def test_nothing_writes_a_spreadsheet() -> None:
    """A cell that starts with = is run by whoever opens it. Who writes the first one here must see to that."""
    root = Path(__file__).parents[2]
    for path in [*(root / "components").rglob("*.py"), *(root / "pipelines").rglob("*.py")]:
        assert not can_write_spreadsheets(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "source",
    ["import csv", "import os, pyarrow.csv as c", "from csv import writer", "def f():\n  from pandas.io import sql",
     "import openpyxl.styles", "table.to_csv('x')", "from . import csv"],
)  # fmt: skip
def test_whatever_can_write_a_spreadsheet_is_noticed(source: str) -> None:
    assert can_write_spreadsheets(source)
    assert not can_write_spreadsheets("import os\nfrom os.path import join\njoin('a.csv')")


EXTREMES = [0.0, 1e308, -1e308, 1e300, 1e17, 1e16, 1.0, 1e-17, 1e-308, 5e-324, -5e-324]


def test_an_axis_is_drawn_for_any_two_numbers() -> None:
    for low, high in itertools.product(EXTREMES, EXTREMES):
        ticks = tidy_ticks(min(low, high), max(low, high))
        assert 2 <= len(ticks) <= 12 and all(len(label) < 40 for label in tick_labels(ticks)), (low, high)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_an_axis_is_drawn_for_whatever_numbers(ends: list[float]) -> None:
    ticks = tidy_ticks(min(ends), max(ends))
    assert 2 <= len(ticks) <= 12 and len(set(ticks)) == len(ticks) and tick_labels(ticks)


def test_a_page_is_drawn_for_scores_that_no_model_gives() -> None:
    rng = random.Random(0)
    answers = [dataclasses.replace(a, reward=rng.choice(EXTREMES), cost=rng.choice(EXTREMES)) for a in DATA.answers[-1]]
    page = render_html(dataclasses.replace(DATA, answers=[DATA.answers[0], answers], scored_sft_answers=answers))
    assert {tag for tag, _ in shape_of_html(page)} == {tag for tag, _ in plain_shape()}
