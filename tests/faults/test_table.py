"""The table in README.md names every row, and tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROWS = range(1, 37)


def table() -> dict[int, str]:
    """Row -> the cell that names its tests."""
    lines = (Path(__file__).parent / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if re.match(r"\| \d", line)]
    assert [len(cell) for cell in cells] == [4] * len(cells)
    return {int(row): tests for row, _, _, tests in cells}


def named(cell: str) -> set[tuple[str, str]]:
    """`file`: `test`, `test`; `file`: `test` -> (file, test) of each."""
    found = set()
    for group in cell.split("; "):
        file, *tests = re.findall(r"`([^`]+)`", group)
        found |= {(file, test) for test in tests}
    return found


def collected() -> set[tuple[str, str]]:
    """(file, test) of each test under tests/ that has a row in its name."""
    return {
        (path.relative_to(TESTS).as_posix(), node.name)
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_row_")
    }


def test_every_row_names_its_tests_or_says_why_there_is_none() -> None:
    rows = table()
    assert list(rows) == list(ROWS)
    for row, cell in rows.items():
        if not cell.startswith("not here: "):
            assert named(cell), row
            assert all(test.startswith(f"test_row_{row:02}_") for _, test in named(cell)), row


def test_the_table_and_the_tests_name_the_same() -> None:
    there = {entry for cell in table().values() if not cell.startswith("not here: ") for entry in named(cell)}
    assert there - collected() == set(), "in the table, and no test"
    assert collected() - there == set(), "a test, and not in the table"
