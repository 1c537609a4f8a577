"""Agreement of annotators against published examples, a slow reference, and by hand."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.annotate.human.agreement import krippendorff_alpha, raw_agreement

UNITS = st.lists(st.lists(st.sampled_from("abc"), max_size=5), min_size=1, max_size=8)


def by_unit(*rows: str) -> list[list[str]]:
    """A row holds one observer's labels; a point is a missing one."""
    return [[label for label in column if label != "."] for column in zip(*rows, strict=True)]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("rows", "alpha"),
    [
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (("1233214 12...", "12332241 25.3", ".33323422 51.", "12332441 251."), 0.743),
    ],
)
def test_alpha_as_in_krippendorffs_examples(rows: tuple[str, ...], alpha: float) -> None:
    """K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): binary, nominal, with missing labels."""
    assert krippendorff_alpha(by_unit(*(row.replace(" ", "") for row in rows))) == pytest.approx(alpha, abs=5e-4)


@given(UNITS)
@settings(deadline=None)
def test_both_measures_equal_a_count_of_pairs(units: list[list[str]]) -> None:
    """The definition read slowly: disagreeing pairs within units, against those of all labels that could be paired."""
    paired = [unit for unit in units if len(unit) > 1]
    pairs = [(a == b, 1 / (len(unit) - 1)) for unit in paired for a, b in permutations(unit, 2)]
    everything = [label for unit in paired for label in unit]
    chance = [a != b for a, b in permutations(everything, 2)]
    assert raw_agreement(units) == (pytest.approx(sum(same for same, _ in pairs) / len(pairs)) if pairs else None)
    alpha = krippendorff_alpha(units)
    if not any(chance):
        assert alpha is None
        return
    observed = sum(weight for same, weight in pairs if not same) / len(everything)
    assert alpha == pytest.approx(1 - observed / (sum(chance) / len(chance)))


def test_what_says_nothing_is_none() -> None:
    assert krippendorff_alpha([["A"], [], ["B"]]) is None
    assert krippendorff_alpha([["A", "A"], ["A", "A"]]) is None  # nobody ever said anything else
    assert raw_agreement([["A"], []]) is None
    assert raw_agreement([["A", "A", "B"]]) == pytest.approx(1 / 3)
