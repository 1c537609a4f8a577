"""Reading of records: what is kept, what is set aside and why, and how preferences are split."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.foundation.errors import DataError
from components.foundation.preference import (
    MAX_LINE_BYTES,
    CollectedAnswer,
    Demonstration,
    DualPreference,
    LoadResult,
    PromptRecord,
    check_bad_share,
    load_records,
    parse_record,
    read_jsonl,
    split_by_prompt,
)
from components.foundation.results import write_records

GOOD: dict[str, Any] = {
    "prompt": "How do I boil an egg?",
    "response_0": "Eight minutes in boiling water.",
    "response_1": "No idea.",
    "better_response_id": 0,
    "safer_response_id": 1,
    "is_response_0_safe": True,
    "is_response_1_safe": True,
}

Write = Callable[[Path, Sequence[dict[str, Any]]], str]


def write_lines(path: Path, lines: Sequence[bytes]) -> str:
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def write_jsonl(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    return write_lines(folder / "rows.jsonl", [json.dumps(row).encode() for row in rows])


def write_gzip(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    return write_lines(folder / "rows.jsonl.gz", [json.dumps(row).encode() for row in rows])


def write_parquet(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def reasons(result: LoadResult[Any]) -> dict[int, str]:
    return {bad.row: bad.reason for bad in result.bad}


@pytest.mark.parametrize("write", [write_jsonl, write_gzip, write_parquet])
def test_every_format_gives_the_same_records_and_reasons(write: Write, tmp_path: Path) -> None:
    """Rows 2 and 4 are bad in a way that each format can express: a null prompt and two identical responses."""
    rows = [
        GOOD,
        GOOD | {"prompt": None},
        GOOD | {"response_0_harm_category": {"violence": True, "drugs": False}, "response_0_severity_level": 2},
        GOOD | {"response_0": "No idea."},
    ]
    rows = [{"response_0_harm_category": None, "response_0_severity_level": None, "unknown": 1.5} | row for row in rows]
    result = load_records(write(tmp_path, rows), DualPreference)
    assert [record.prompt for record in result.records] == [GOOD["prompt"]] * 2
    assert result.records[0] == DualPreference(**GOOD)
    assert result.records[1].response_0_harm_category == {"violence": True}
    assert result.records[1].response_0_severity_level == 2
    assert reasons(result) == {2: "field 'prompt' is missing", 4: "the two responses are identical"}


@pytest.mark.fault
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_row_22_broken_lines_are_set_aside_with_number_and_reason(name: str, tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    lines = [
        good,
        b"{broken",
        b"",
        b"   ",
        good[:-20],
        b'{"prompt": "\xff\xfe"}',
        b"[1, 2]",
        b"null",
        b'"text"',
        b"[" * 200_000,
        good,
    ]
    result = load_records(write_lines(tmp_path / name, lines), DualPreference)
    assert len(result.records) == 2
    found = reasons(result)
    assert sorted(found) == [2, 5, 6, 7, 8, 9, 10]
    assert all("not JSON" in found[row] for row in (2, 5, 10))
    assert "UTF-8" in found[6]
    assert all("not an object" in found[row] for row in (7, 8, 9))
    assert result.bad[0].excerpt.startswith("{broken")
    assert all(len(bad.excerpt) <= 200 for bad in result.bad)


@pytest.mark.fault
@pytest.mark.parametrize("extra", [0, 1, 5000, MAX_LINE_BYTES, 2 * MAX_LINE_BYTES])
def test_row_22_a_line_that_is_too_long_costs_no_other_row(extra: int, tmp_path: Path) -> None:
    """Around the limit itself: the line's end may or may not be among the bytes that were read."""
    good = json.dumps({"prompt": "p", "response": "r"}).encode()
    lines = [good, b"x" * (MAX_LINE_BYTES + extra), good, good]
    result = load_records(write_lines(tmp_path / "rows.jsonl", lines), Demonstration)
    assert len(result.records) == 3
    assert list(reasons(result)) == [2]


def test_a_line_may_be_as_long_as_the_limit_says(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "p", "response": ""}).encode()
    rows = [row[:-2] + b"x" * (MAX_LINE_BYTES + extra - len(row)) + row[-2:] for extra in (0, 1)]
    result = load_records(write_lines(tmp_path / "rows.jsonl", rows), Demonstration)
    assert len(result.records) == 1
    assert reasons(result) == {2: "the line is over 1000000 bytes"}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": " \n\t"}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' is 3, not of type str"),
        ({"prompt": "a\x00b"}, "'prompt'"),
        ({"prompt": "\ud800"}, "'prompt'"),
        ({"response_0": None}, "'response_0' is missing"),
        ({"response_1": "Eight minutes in boiling water."}, "identical"),
        ({"better_response_id": 2}, "better_response_id is 2"),
        ({"safer_response_id": -1}, "safer_response_id is -1"),
        ({"better_response_id": True}, "'better_response_id'"),
        ({"better_response_id": "0"}, "'better_response_id'"),
        ({"better_response_id": 0.0}, "'better_response_id'"),
        ({"is_response_0_safe": 1}, "'is_response_0_safe'"),
        ({"is_response_0_safe": "true"}, "'is_response_0_safe'"),
        ({"is_response_1_safe": False}, "flagged unsafe while the other is flagged safe"),
        ({"response_0_severity_level": 4}, "severity"),
        ({"response_1_severity_level": -1}, "severity"),
        (
            {"response_0_harm_category": ["violence"]},
            "'response_0_harm_category' is ['violence'], not an object of name: true or false",
        ),
        ({"response_0_harm_category": {"violence": "yes"}}, "'response_0_harm_category'"),
    ],
)
def test_row_22_bad_rows_say_why(change: dict[str, Any], words: str) -> None:
    reason = parse_record(DualPreference, GOOD | change)
    assert isinstance(reason, str)
    assert words in reason


@pytest.mark.parametrize("safe", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("safer", [0, 1])
def test_only_a_contradiction_between_ranking_and_flags_is_refused(safe: tuple[bool, bool], safer: int) -> None:
    labels = {"is_response_0_safe": safe[0], "is_response_1_safe": safe[1], "safer_response_id": safer}
    contradictory = safe == ((False, True) if safer == 0 else (True, False))
    assert isinstance(parse_record(DualPreference, GOOD | labels), str) == contradictory


def test_prompts_may_leave_their_kind_open_but_not_invent_one() -> None:
    assert parse_record(PromptRecord, {"prompt": "p"}) == PromptRecord("p")
    assert parse_record(PromptRecord, {"prompt": "p", "kind": None}) == PromptRecord("p")
    assert "'evil'" in str(parse_record(PromptRecord, {"prompt": "p", "kind": "evil"}))


def test_a_policy_may_say_nothing_but_a_demonstration_may_not() -> None:
    assert parse_record(CollectedAnswer, {"prompt": "p", "response": ""}) == CollectedAnswer("p", "")
    assert "empty" in str(parse_record(Demonstration, {"prompt": "p", "response": ""}))
    assert "empty" in str(parse_record(CollectedAnswer, {"prompt": "", "response": ""}))


@pytest.mark.fault
def test_an_unreadable_text_in_a_parquet_file_is_one_bad_row(tmp_path: Path) -> None:
    raw = pyarrow.array([b"fine", b"\xff\xfe", b"fine too"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, *raw.buffers()[1:]])
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "response": ["a", "b", "c"]}), path)
    result = load_records(str(path), Demonstration)
    assert [record.prompt for record in result.records] == ["fine", "fine too"]
    assert list(reasons(result)) == [2]


@pytest.mark.fault
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps([GOOD] * 3),
        json.dumps([GOOD] * 3, indent=2),
        "\n[" + ",\n".join(json.dumps(GOOD) for _ in range(3)) + "]",
        json.dumps([GOOD | {"prompt": "x" * MAX_LINE_BYTES}]),
    ],
    ids=["one line", "indented", "a row a line", "a very long line"],
)
def test_a_file_that_is_one_array_is_refused_whole(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl\S* is one JSON array: write one object a line"):
        load_records(write_lines(tmp_path / name, [text.encode()]), DualPreference)


def test_a_first_row_that_is_an_array_costs_no_other_row(tmp_path: Path) -> None:
    lines = [json.dumps([GOOD]).encode(), json.dumps(GOOD).encode()]
    result = load_records(write_lines(tmp_path / "rows.jsonl", lines), DualPreference)
    assert (len(result.records), reasons(result)) == (1, {1: "the row is a list, not an object"})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_byte_order_mark_belongs_to_no_row(name: str, tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    plain = load_records(write_lines(tmp_path / name, [line, line]), DualPreference)
    marked = load_records(write_lines(tmp_path / name, [codecs.BOM_UTF8 + line, line]), DualPreference)
    assert (len(marked.records), marked.bad, marked.digest) == (2, [], plain.digest)
    again = load_records(write_lines(tmp_path / name, [line, codecs.BOM_UTF8 + line]), DualPreference)
    assert list(reasons(again)) == [2]


ANY_TEXT = st.text(st.characters(), max_size=8)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
MOSTLY_GOOD = st.fixed_dictionaries(
    {},
    optional={
        "prompt": ANY_TEXT | ANY_JSON,
        "response_0": ANY_TEXT | ANY_JSON,
        "better_response_id": st.integers(-1, 2) | ANY_JSON,
        "is_response_0_safe": st.booleans() | ANY_JSON,
        "response_0_harm_category": st.dictionaries(ANY_TEXT, st.booleans(), max_size=3) | ANY_JSON,
    },
).map(lambda change: GOOD | change)


def is_one_array_of_objects(rows: list[Any]) -> bool:
    return len(rows) == 1 and isinstance(rows[0], list) and isinstance((rows[0] or [0])[0], dict)


@pytest.mark.fault
@given(rows=st.lists(MOSTLY_GOOD | ANY_JSON, max_size=6).filter(lambda rows: not is_one_array_of_objects(rows)))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_file_what_was_read_can_be_written_and_read_again(rows: list[Any], tmp_path: Path) -> None:
    lines = [json.dumps(row).encode() for row in rows]
    result = load_records(write_lines(tmp_path / "in.jsonl", lines), DualPreference)
    assert len(result.records) + len(result.bad) == len(rows)
    assert set(reasons(result)) <= set(range(1, len(rows) + 1))
    write_records(tmp_path / "out.jsonl", result.records)
    write_records(tmp_path / "bad.jsonl", result.bad)
    if result.records:
        assert read_jsonl(tmp_path / "out.jsonl", DualPreference) == result.records


@pytest.mark.fault
def test_a_harm_category_that_is_no_text_does_not_stop_the_writer(tmp_path: Path) -> None:
    row = GOOD | {"response_0_harm_category": {"\ud800": True}}
    result = load_records(write_jsonl(tmp_path, [row, GOOD]), DualPreference)
    write_records(tmp_path / "out.jsonl", result.records)


def test_digest_is_of_the_rows_as_they_were_read(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"prompt": "Another?"}]
    plain = load_records(write_jsonl(tmp_path, rows), DualPreference)
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    assert plain.digest == hashlib.sha256(content).hexdigest()
    assert load_records(write_gzip(tmp_path, rows), DualPreference).digest == plain.digest
    assert load_records(write_jsonl(tmp_path, rows[::-1]), DualPreference).digest != plain.digest
    assert load_records(write_jsonl(tmp_path, [*rows, {}]), DualPreference).digest != plain.digest


def truncated_gzip(path: Path) -> None:
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    path.write_bytes(whole[: len(whole) // 2])


def corrupt_deflate(path: Path) -> None:
    header = gzip.compress(b"")[:10]
    path.write_bytes(header + b"\xff" * 50)
    with pytest.raises(zlib.error):
        gzip.decompress(path.read_bytes())


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rows.jsonl.gz", truncated_gzip),
        ("rows.jsonl.gz", corrupt_deflate),
        ("rows.jsonl.gz", lambda path: path.write_bytes(b"not compressed\n")),
        ("rows.parquet", lambda path: path.write_bytes(b"PAR1junkPAR1")),
        ("rows.parquet", lambda path: path.write_bytes(b"")),
        ("rows.csv", lambda path: path.write_text("prompt,response\n")),
        ("rows.jsonl", lambda path: None),
        ("rows.jsonl", lambda path: path.mkdir()),
    ],
    ids=["gzip cut", "gzip damaged", "no gzip", "no parquet", "empty parquet", "csv", "missing", "folder"],
)
def test_unreadable_sources_are_named(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(tmp_path / name)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_records(str(tmp_path / name), DualPreference)


@pytest.mark.fault
def test_builtin_records_exist_only_where_the_project_ships_them() -> None:
    with pytest.raises(DataError, match="built-in"):
        load_records("builtin", DualPreference)


def test_data_sets_are_read_by_name_and_split(tmp_path: Path) -> None:
    """A local folder is a data set too, so no hub is needed."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [b'{"prompt": "p", "response": "r"}'])
    write_lines(folder / "test.jsonl", [b'{"prompt": "q", "response": ""}'])
    assert load_records(f"datasets:{folder}", Demonstration).records == [Demonstration("p", "r")]
    assert reasons(load_records(f"datasets:{folder}:test", Demonstration)) == {1: "field 'response' is empty"}
    with pytest.raises(DataError, match="nosuchsplit"):
        load_records(f"datasets:{folder}:nosuchsplit", Demonstration)


@pytest.mark.fault
@pytest.mark.parametrize(("good", "bad", "allowed", "passes"), [(19, 1, 0.05, True), (18, 2, 0.05, False)])
def test_row_22_a_share_of_bad_rows_is_tolerated(
    good: int, bad: int, allowed: float, passes: bool, tmp_path: Path
) -> None:
    result = load_records(write_jsonl(tmp_path, [GOOD] * good + [{}] * bad), DualPreference)
    assert result.bad_share == pytest.approx(bad / (good + bad))
    if passes:
        check_bad_share(result, allowed)
        return
    with pytest.raises(DataError, match=r"2 of 20 rows are bad \(10\.0%, allowed 5\.0%\): row 19: .*missing"):
        check_bad_share(result, allowed)


@pytest.mark.fault
@pytest.mark.parametrize("rows", [0, 3])
def test_a_source_without_a_good_row_is_refused_whatever_is_allowed(rows: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no usable row of {rows}"):
        check_bad_share(load_records(write_jsonl(tmp_path, [{}] * rows), DualPreference), max_share=1.0)


@pytest.mark.fault
def test_our_own_files_may_hold_no_bad_row_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 101 rows are bad"):
        read_jsonl(Path(write_jsonl(tmp_path, [GOOD] * 100 + [{}])), DualPreference)


def preferences(prompts: Sequence[str]) -> list[DualPreference]:
    """One record a prompt, all different even where the prompts are not."""
    return [DualPreference(**GOOD | {"prompt": p, "response_0": f"answer {i}"}) for i, p in enumerate(prompts)]


PROMPTS = st.lists(st.text("abc", min_size=1, max_size=3), max_size=30)


@given(prompts=PROMPTS, more=PROMPTS, validation_share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_no_prompt_is_on_both_sides_and_none_moves_when_data_are_added(
    prompts: list[str], more: list[str], validation_share: float, seed: int
) -> None:
    records = preferences(prompts)
    training, validation = split_by_prompt(records, validation_share, seed)
    assert not {r.prompt for r in training} & {r.prompt for r in validation}
    assert sorted(map(repr, training + validation)) == sorted(map(repr, records))
    larger = preferences([*prompts, *more])
    for part, larger_part in zip((training, validation), split_by_prompt(larger, validation_share, seed), strict=True):
        assert [r for r in larger_part if r in records] == part
    backwards = split_by_prompt(records[::-1], validation_share, seed)
    assert (backwards[0][::-1], backwards[1][::-1]) == (training, validation)


def test_the_split_has_the_asked_size_and_follows_the_seed() -> None:
    records = preferences([f"prompt {i}" for i in range(2000)])
    _, validation = split_by_prompt(records, 0.15, seed=0)
    assert 0.12 < len(validation) / len(records) < 0.18  # four standard deviations are 0.032
    _, other = split_by_prompt(records, 0.15, seed=1)
    assert validation != other
