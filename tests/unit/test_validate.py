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


def without(column: str) -> dict[str, Any]:
    return {name: value for name, value in PAIR.items() if name != column}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [without("response_0") | {"answer_0": "Eight minutes."}] * 4,
            [
                "looks like preferences, but it lacks response_0 in 4 of 4 rows",
                "unknown columns 'answer_0' (4 of 4 rows)",
                "rename or add what is missing, or say with --as what the rows are",
            ],
        ),
        (
            [without("response_1") | {"response": "No idea."}] * 2,
            ["looks like preferences, but it lacks response_1 in 2 of 2 rows", "'response' (2 of 2 rows)"],
        ),
        (
            [without("safer_response_id")] * 3 + [without("better_response_id")],
            ["preferences, but it lacks better_response_id in 1 of 4 rows and safer_response_id in 3 of 4 rows"],
        ),
        (
            [{"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}] * 2,
            [
                "looks like pairs of a chosen and a rejected answer",
                "it lacks response_0, response_1, better_response_id",
                "in 2 of 2 rows",
                "PKU-SafeRLHF, with the columns prompt, response_0, response_1, better_response_id, safer_response_id, "
                "is_response_0_safe, is_response_1_safe",
            ],
        ),
        (
            [{"prompt": "Hi", "completion": "Hello."}] * 2,
            [
                "looks like prompts, but it has the unknown columns 'completion' (2 of 2 rows)",
                "demonstrations: prompt, response",
                "or ignore the unknown ones with --as prompts",
            ],
        ),
        (
            [{"instruction": "Hi", "output\x1b": "Hello."}] * 2,
            ["it lacks prompt in 2 of 2 rows", "'instruction' (2 of 2 rows), 'output\\x1b' (2 of 2 rows)"],
        ),
    ],
    ids=["misspelt", "nearly a demonstration", "no labels", "chosen and rejected", "another schema", "no prompt"],
)
def test_a_file_that_is_nearly_something_is_not_taken_for_prompts(
    tmp_path: Path, rows: list[dict[str, Any]], words: list[str]
) -> None:
    status, said = saferlhf("data", "validate", write(tmp_path / "mine.jsonl", rows))
    assert status == 1
    assert len(said.splitlines()) == 1 and "mine.jsonl" in said
    assert not [word for word in words if word not in said], said


@pytest.mark.parametrize(
    ("kind", "rows", "status", "words"),
    [
        ("preferences", [PAIR] * 3, 0, "preferences (DualPreference records)"),
        ("preferences", [{"prompt": "Hi"}] * 3, 1, "3 x field 'response_0' is missing"),
        ("demonstrations", [PAIR | {"response": "So."}] * 3, 0, "demonstrations (Demonstration records)"),
        ("prompts", [{"prompt": "Hi", "completion": "Hello."}] * 3, 0, "ignored columns: 'completion' (3 of 3 rows)"),
        ("held_out", [{"prompt": "Hi", "kind": "benign"}], 0, "no prompt of kind red_team or lookalike"),
        ("regressions", [{"prompt": "Hi", "must": "answer"}], 0, "regressions (RegressionPrompt records)"),
        ("regressions", [{"prompt": "Hi", "must": "answer"}] * 99 + [{"prompt": "Hi"}], 1, "(1.0%, allowed 0.0%)"),
        ("pairs", [PAIR], 2, "Invalid value for '--as'"),
    ],
)
def test_the_kind_of_records_can_be_said(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]], status: int, words: str
) -> None:
    seen, said = saferlhf("data", "validate", write(tmp_path / "rows.jsonl", rows), "--as", kind)
    assert (seen, words in said) == (status, True), said


def test_columns_that_nobody_reads_are_named_and_no_fault(tmp_path: Path) -> None:
    rows = [PAIR | {"response_0_severity": 2}] * 3 + [PAIR | {"source": "mine", "note": None}]
    status, said = saferlhf("data", "validate", write(tmp_path / "rows.jsonl", rows))
    assert status == 0
    assert "ignored columns: 'response_0_severity' (3 of 4 rows), 'source' (1 of 4 rows)\n" in said


def test_many_unknown_columns_are_told_in_short(tmp_path: Path) -> None:
    rows = [PAIR | {f"column_{number}": 1 for number in range(2000)}]
    status, said = saferlhf("data", "validate", write(tmp_path / "rows.jsonl", rows))
    assert (status, "'column_9' (1 of 1 rows) and more" in said) == (0, True), said


def test_lengths_are_told_in_words(tmp_path: Path) -> None:
    """Distinct prompts of 1, 2 and 6 words; answers of 5 and 2 words, of the first prompt twice."""
    prompts = ["Eggs?", "Boil eggs?", PAIR["prompt"], PAIR["prompt"]]
    path = write(tmp_path / "rows.jsonl", [PAIR | {"prompt": prompt} for prompt in prompts])
    last = saferlhf("data", "validate", path)[1].splitlines()[-2:]
    assert [" ".join(line.split()) for line in last] == [
        "prompts 3 distinct, words: 2 in the median, 6 in the longest",
        "answers 8 words: 3.5 in the median, 5 in the longest",
    ]


def test_prompts_have_no_answers_to_measure(tmp_path: Path) -> None:
    said = saferlhf("data", "validate", write(tmp_path / "rows.jsonl", [{"prompt": "Hi there"}]))[1]
    assert said.endswith("1  distinct, words: 2 in the median, 2 in the longest\n")


@pytest.mark.fault
def test_an_array_in_place_of_lines_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps([PAIR] * 9, indent=1))
    status, said = saferlhf("data", "validate", str(tmp_path / "rows.jsonl"))
    assert (status, len(said.splitlines())) == (1, 1), said
    assert "rows.jsonl is one JSON array: write one object a line" in said


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
