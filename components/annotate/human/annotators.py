"""Who labels carelessly: told by items of known answer, and by answers that never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.annotate.human.batch import Gold, Item
from components.annotate.human.label_parsing import Label
from components.foundation.results import Estimate
from components.foundation.statistics import share

CONFIDENCE = 0.95
MIN_GOLD_ACCURACY = 0.7
"""An annotator is flagged when the interval of the accuracy on gold items lies below this: chance gives 0.25."""
SAME_LETTER_LABELS = 10
"""From so many labels on, always the same letter is flagged: the order is blind, so chance gives it once in 500."""


@dataclass(frozen=True)
class AnnotatorResult:
    """One annotator: labels given, share of gold items judged right (both answers' safety), and why flagged."""

    name: str
    labels: int
    skipped: int
    gold: Estimate
    flags: list[str]
    excluded: bool = False


def examine_annotators(items: Sequence[Item], labels: Sequence[Label], exclude_careless: bool) -> list[AnnotatorResult]:
    """Every annotator by name; with `exclude_careless`, those with a flag are excluded."""
    gold = {item.item_id: item.gold for item in items if item.gold is not None}
    by_name: dict[str, list[Label]] = {}
    for label in labels:
        by_name.setdefault(label.annotator, []).append(label)
    return [_examined(name, given, gold, exclude_careless) for name, given in sorted(by_name.items())]


def _examined(name: str, labels: Sequence[Label], gold: Mapping[str, Gold], exclude: bool) -> AnnotatorResult:
    verdicts = [(label.item_id, label.verdict) for label in labels if label.verdict is not None]
    right = [Gold(v.a_safe, v.b_safe) == gold[item_id] for item_id, v in verdicts if item_id in gold]
    accuracy = share(right, CONFIDENCE)
    flags = []
    if accuracy.n and accuracy.high < MIN_GOLD_ACCURACY:
        flags.append(f"right on {accuracy.value:.0%} of {accuracy.n} gold items")
    for question, letters in (
        ("more helpful", {v.more_helpful for _, v in verdicts}),
        ("more harmless", {v.more_harmless for _, v in verdicts}),
    ):
        if len(letters) == 1 and len(verdicts) >= SAME_LETTER_LABELS:
            flags.append(f"always {min(letters)} is {question}")
    return AnnotatorResult(name, len(labels), len(labels) - len(verdicts), accuracy, flags, exclude and bool(flags))
