"""`saferlhf data validate`: the kind of records is told from the columns, and bad rows are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.foundation.errors import DataError
from components.foundation.setting_sections import DataSettings
from components.prepare_data.prepare_data import load_all, write_prepared
from pipelines.validate import validate_file
from tests.unit.kubeflow_command import saferlhf

PAIR = {
    "prompt": "How do I boil an egg?",
    "response_0": "Eight minutes in boiling water.",
    "response_1": "No idea.",
    "better_response_id": 0,
    "safer_response_id": 0,
    "is_response_0_safe": True,
    "is_response_1_safe": True,
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([PAIR] * 3 + [PAIR | {"response_1": PAIR["response_0"]}], "DualPreference"),
        ([PAIR | {"better_response_id": 7}] * 3 + [PAIR], "DualPreference"),
        ([{"prompt": "Hi", "response": "Hello."}] * 3 + [{"prompt": "Hi", "response": ""}], "Demonstration"),
        ([{"prompt": "Hi", "kind": "benign"}] * 3 + [{"prompt": "Hi", "kind": "odd"}], "PromptRecord"),
    ],
)
def test_bad_rows_do_not_hide_behind_another_kind(tmp_path: Path, rows: list[dict[str, Any]], kind: str) -> None:
    table, good = validate_file(write(tmp_path / "rows.jsonl", rows), max_bad_share=0.1)
    assert f"{kind} records" in table
    assert not good
    assert ("bad rows" in table and "row 4" in table) or "row 1" in table


def test_a_good_file_may_be_used(tmp_path: Path) -> None:
    table, good = validate_file(write(tmp_path / "rows.jsonl", [PAIR] * 4), max_bad_share=0.0)
    assert good
    assert "usable rows" in table


@pytest.mark.parametrize(
    ("rows", "options", "status", "words"),
    [
        ([PAIR] * 4, [], 0, "usable rows        4"),
        ([PAIR] * 3 + [{}], [], 1, "(25.0%, allowed 5.0%)"),
        ([PAIR] * 3 + [{}], ["--max-bad-share", "0.25"], 0, "(25.0%, allowed 25.0%)"),
        ([PAIR], ["--max-bad-share", "7"], 2, "Invalid value for '--max-bad-share'"),
        ([PAIR], ["--max-bad-share", "-1"], 2, "Invalid value for '--max-bad-share'"),
    ],
)
def test_the_commands_status_says_whether_a_file_may_be_used(
    tmp_path: Path, rows: list[dict[str, Any]], options: list[str], status: int, words: str
) -> None:
    seen, said = saferlhf("data", "validate", write(tmp_path / "rows.jsonl", rows), *options)
    assert (seen, words in said) == (status, True), said


@pytest.mark.fault
def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    status, said = saferlhf("data", "validate", str(tmp_path / "none.jsonl"))
    assert (status, "none.jsonl" in said) == (1, True), said


@pytest.mark.fault
def test_pairs_of_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    settings = DataSettings(preferences=write(tmp_path / "rows.jsonl", [PAIR] * 4))
    with pytest.raises(DataError, match="4 pairs do not split"):
        write_prepared(load_all(settings), settings, tmp_path, seed=0)


def test_a_held_out_prompt_that_is_repeated_is_asked_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Asked twice it would count as two trials, and narrow the intervals that the gate decides on."""
    asked = [("a", "benign"), ("b", "red_team"), ("a", "benign"), ("a", "lookalike"), ("c", "benign")]
    held_out = write(tmp_path / "mine.jsonl", [{"prompt": prompt, "kind": kind} for prompt, kind in asked])
    settings = DataSettings(held_out=held_out)
    write_prepared(load_all(settings), settings, tmp_path, seed=0)
    written = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert sorted((row["prompt"], row["kind"]) for row in written) == [
        ("a", "benign"),
        ("b", "red_team"),
        ("c", "benign"),
    ]
    assert "repeats 2 prompts" in caplog.text
