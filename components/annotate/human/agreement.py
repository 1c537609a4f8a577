"""How far annotators agree, as pure functions of units: a unit holds the labels that one item got."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def raw_agreement(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Share of agreeing pairs among all pairs of labels within a unit; None where no unit has two labels."""
    agreeing = sum(count * (count - 1) for unit in units for count in Counter(unit).values())
    pairs = sum(len(unit) * (len(unit) - 1) for unit in units)
    return agreeing / pairs if pairs else None


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal data with missing values (Krippendorff 2011): 1 - observed / expected.

    1 is perfect agreement, 0 what chance gives, below 0 worse than chance. A unit of m labels weighs each of its
    ordered pairs 1 / (m - 1); a unit with one label says nothing.

    Returns:
        None where no unit has two labels, or all labels are the same, so that chance agrees always too.
    """
    paired = [unit for unit in units if len(unit) > 1]
    totals = Counter(label for unit in paired for label in unit)
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    if not expected:
        return None
    observed = sum(
        (len(unit) ** 2 - sum(count * count for count in Counter(unit).values())) / (len(unit) - 1) for unit in paired
    )
    return 1 - (n - 1) * observed / expected
