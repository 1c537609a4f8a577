"""Data files made to crash, to hang, or to fill the memory: JSON Lines, gzip, Parquet."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.foundation import preference
from components.foundation.errors import DataError
from components.foundation.preference import Demonstration, DualPreference, LoadResult, load_records
from components.foundation.results import write_records
from tests.hostile.bounded import bounded

pytestmark = pytest.mark.fault

GOOD = b'{"prompt": "p", "response": "r"}\n'
MEGABYTE = 1_000_000
LOAD = "from components.foundation import preference; from components.foundation.preference import *"
COUNTS = "[len(part) for part in (lambda r: (r.records, r.bad))(load_records(sys.argv[1], Demonstration))]"

Write = Callable[[Path], None]


def read(path: Path) -> LoadResult[Demonstration] | None:
    """The records, or None where the file is refused; what was read can be written, and any other error fails."""
    try:
        result = load_records(str(path), Demonstration)
    except DataError as error:
        assert str(path) in str(error) and len(str(error)) < 1000
        return None
    for kept in (result.records, result.bad):
        write_records(path.with_suffix(".written"), kept)
    return result


def packed(path: Path, block: bytes, times: int) -> None:
    with gzip.open(path, "wb", compresslevel=6) as file:
        for _ in range(times):
            file.write(block)


def long_line(path: Path) -> None:
    path.write_bytes(GOOD + b'{"prompt": "' + b"x" * 10 * MEGABYTE + b'"}\n' + GOOD)


def packed_long_line(path: Path) -> None:
    packed(path, GOOD + b"x" * 10 * MEGABYTE + b"\n" + GOOD, 1)


def gigabyte_of_one_line(path: Path) -> None:
    """Sparse: it takes no room on the disk."""
    with path.open("wb") as file:
        file.write(GOOD + b"x")
        file.truncate(1000 * MEGABYTE)


def deep(path: Path) -> None:
    lines = [b"[" * MEGABYTE, b'{"prompt":' * 90_000, b'{"a":[' * 900, b"[" * 400 + b"]" * 400]
    path.write_bytes(GOOD + b"\n".join(lines) + b"\n" + GOOD)


@pytest.mark.parametrize(
    ("name", "write", "counts"),
    [
        ("rows.jsonl", long_line, "[2, 1]"),
        ("rows.jsonl.gz", packed_long_line, "[2, 1]"),
        ("rows.jsonl", gigabyte_of_one_line, "[1, 1]"),
        ("rows.jsonl", deep, "[2, 4]"),
    ],
)
def test_a_line_that_is_huge_or_deep_takes_little_memory_and_costs_no_other_row(
    name: str, write: Write, counts: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    assert bounded(LOAD, COUNTS, tmp_path / name, more_bytes=100 * MEGABYTE) == f"returned {counts}"


def test_columns_of_long_names_take_little_memory(tmp_path: Path) -> None:
    """They are counted, so that those which nobody reads can be named."""
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(150):
            file.write(json.dumps(json.loads(GOOD) | {f"{number}{'x' * 900_000}": 1}) + "\n")
    assert bounded(LOAD, COUNTS, path, more_bytes=100 * MEGABYTE) == "returned [150, 0]"


@pytest.mark.parametrize(
    "block", [b"x" * MEGABYTE, b" " * MEGABYTE, (b" " * 9999 + b"\n") * 100], ids=["one line", "spaces", "blank lines"]
)
def test_a_gz_that_unfolds_to_far_more_than_it_is_is_given_up(block: bytes, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    packed(bomb, block, 120)
    assert bomb.stat().st_size < MEGABYTE
    said = bounded(LOAD, COUNTS, bomb, more_bytes=100 * MEGABYTE)
    assert said.startswith(f"DataError {bomb} holds more than 100000000 bytes, 100 times its size, when unpacked")


def test_an_ordinary_gz_of_some_size_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    packed(path, GOOD * 100, 10)
    assert bounded(LOAD, COUNTS, path, more_bytes=100 * MEGABYTE) == "returned [1000, 0]"


@pytest.mark.parametrize("block", [b"0\n", b"\n", GOOD], ids=repr)
def test_a_gz_of_more_rows_than_can_be_kept_is_given_up(block: bytes, tmp_path: Path) -> None:
    """With a lower limit than the real one, which takes its time."""
    bomb = tmp_path / "bomb.jsonl.gz"
    packed(bomb, block * 10_000, 20)
    few = LOAD + "; preference.MAX_ROWS, preference._EXCERPTS = 100_000, 1000"
    said = bounded(few, COUNTS, bomb, more_bytes=100 * MEGABYTE)
    assert said == f"DataError {bomb} holds more than 100000 rows: split it, or take a part of it"


def test_of_very_many_bad_rows_the_first_ones_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference, "_EXCERPTS", 2)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[0]\n" * 4)
    bad = load_records(str(path), Demonstration).bad
    assert [(row.row, row.excerpt) for row in bad] == [(1, "[0]\n"), (2, "[0]\n"), (3, ""), (4, "")]
    assert {row.reason for row in bad} == {"the row is a list, not an object"}


def one_text_in_every_row(path: Path) -> None:
    """A million characters, stored once, in each of 60,000 rows."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 60_000, pyarrow.int32()), ["x" * MEGABYTE])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "response": text}), path)


def a_list_without_end(path: Path) -> None:
    """Thirty million zeros in one row."""
    numbers = pyarrow.array([0] * 1000, pyarrow.int64())
    whole = pyarrow.concat_arrays([numbers] * 30_000)
    rows = pyarrow.ListArray.from_arrays([0, len(whole)], whole)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": rows}), path, compression="zstd")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (one_text_in_every_row, "holds more than 200000000 bytes when unpacked: split it"),
        (a_list_without_end, "has 30000000 values in a row group, more than 20000000"),
    ],
)
def test_a_parquet_file_that_unfolds_to_far_more_than_it_is_is_given_up(
    write: Write, words: str, tmp_path: Path
) -> None:
    bomb = tmp_path / "bomb.parquet"
    write(bomb)
    assert bomb.stat().st_size < MEGABYTE
    small = LOAD + "; import pyarrow.parquet; preference.MAX_FILE_BYTES = 200_000_000"  # the real limit takes its time
    assert words in bounded(small, COUNTS, bomb, more_bytes=500 * MEGABYTE)


def test_a_parquet_value_that_python_cannot_hold_costs_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    times = pyarrow.array([0, 2**62, 1], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], "response": ["r"] * 3, "at": times}), path)
    result = load_records(str(path), Demonstration)
    assert [record.prompt for record in result.records] == ["a", "c"]
    assert [(bad.row, bad.reason[:27]) for bad in result.bad] == [(2, "the row cannot be decoded: ")]


def test_a_data_set_that_breaks_off_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD * 3 + b"{broken\n")
    with pytest.raises(DataError, match="cannot load data set"):
        load_records(f"datasets:{tmp_path}", Demonstration)


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b.jsonl", "datasets:", "datasets:a\0b", "\ud800.jsonl", "/", ""])
def test_a_name_that_no_file_can_have_is_an_error_of_ours(source: str) -> None:
    with pytest.raises(DataError) as error:
        load_records(source, Demonstration)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@given(data=st.binary(max_size=300))
@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_bytes_a_file_holds_it_is_read_or_refused(suffix: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data)
    read(path)


def valid(suffix: str, folder: Path) -> bytes:
    path = folder / f"valid{suffix}"
    if suffix == ".parquet":
        rows = [json.loads(GOOD) | {"flags": {"violence": True}, "n": [1, 2]}] * 5
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        packed(path, GOOD, 5)
    return path.read_bytes()


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4)


def read_changed(suffix: str, changes: list[tuple[int, int]], folder: Path) -> None:
    content = bytearray(valid(suffix, folder))
    for place, value in changes:
        content[place % len(content)] = value
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    read(path)


@given(changes=CHANGES)
@settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whichever_bytes_of_a_packed_file_change_it_is_read_or_refused(
    changes: list[tuple[int, int]], tmp_path: Path
) -> None:
    read_changed(".jsonl.gz", changes, tmp_path)


@given(changes=CHANGES)
@settings(derandomize=True, deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whichever_bytes_of_a_parquet_file_change_it_is_read_or_refused(
    changes: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Fewer examples: a process of its own looks at each file first."""
    read_changed(".parquet", changes, tmp_path)


DEADLY_PLACE = """
import os, sys
from pathlib import Path
from components.foundation.parquet_values import most_values
path = Path(sys.argv[1])
content = path.read_bytes()
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
for place in range(len(content) // 2, len(content)):
    path.write_bytes(content[:place] + bytes([0x15]) + content[place + 1 :])
    if not (child := os.fork()):
        try:
            most_values(str(path))
        finally:
            os._exit(0)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        sys.exit(0)
sys.exit("pyarrow survives them all")
"""
"""Leaves a file with the first byte of its second half that ends a process which looks at its columns."""


def test_a_parquet_file_of_which_pyarrow_dies_is_refused(tmp_path: Path) -> None:
    valid(".parquet", tmp_path)
    path = tmp_path / "valid.parquet"
    subprocess.run([sys.executable, "-c", DEADLY_PLACE, str(path)], check=True)
    with pytest.raises(DataError, match="the description of its columns is damaged"):
        load_records(str(path), DualPreference)


@given(text=st.text(st.characters()), level=st.integers(0, 10**30) | st.floats(allow_nan=True))
@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_reason_tells_of_a_value_without_repeating_it(text: str, level: float, tmp_path: Path) -> None:
    """What a file says goes to logs and terminals in a reason: short, and with control characters as escapes."""
    row = {"prompt": {text: text * 50}, "response_0": level, "better_response_id": text * 50}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (bad,) = load_records(str(path), DualPreference).bad
    assert bad.reason.isprintable() and len(bad.reason) < 400
