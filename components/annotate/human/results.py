"""What a batch's labels amount to so far, in figures and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from components.annotate.human.agreement import krippendorff_alpha, raw_agreement
from components.annotate.human.annotators import AnnotatorResult, examine_annotators
from components.annotate.human.batch import Item
from components.annotate.human.label_parsing import Label, Verdict
from components.annotate.human.majority import majority_verdicts
from components.foundation.untrusted import markdown_code


@dataclass(frozen=True)
class QuestionAgreement:
    """On the `units` that several annotators labelled; None where that says nothing."""

    question: str
    units: int
    raw: float | None
    alpha: float | None


@dataclass(frozen=True)
class LabelResult:
    """All figures of a batch's labels so far. `pairs` leaves gold items out; `usable` have a majority."""

    batch_uri: str
    items: int
    pairs: int
    labels: int
    labels_missing: int
    usable: int
    annotators: list[AnnotatorResult] = field(default_factory=list)
    agreement: list[QuestionAgreement] = field(default_factory=list)


def missing_labels(items: Sequence[Item], labels: Sequence[Label]) -> dict[str, int]:
    """Item id -> labels that it still lacks, for those that lack any. A skip counts: somebody has looked."""
    given = Counter(label.item_id for label in labels)
    lacking = {item.item_id: item.labels_wanted - given[item.item_id] for item in items}
    return {item_id: count for item_id, count in lacking.items() if count > 0}


def measure_agreement(items: Sequence[Item], labels: Sequence[Label]) -> list[QuestionAgreement]:
    """By question, on the pairs; whether an answer is safe makes one unit of each answer."""
    pairs = {item.item_id for item in items if item.gold is None}
    by_item: dict[str, list[Verdict]] = {}
    for label in labels:
        if label.verdict is not None and label.item_id in pairs:
            by_item.setdefault(label.item_id, []).append(label.verdict)
    shared = [verdicts for verdicts in by_item.values() if len(verdicts) > 1]
    a_safe, b_safe = [[v.a_safe for v in vs] for vs in shared], [[v.b_safe for v in vs] for vs in shared]
    units: dict[str, Sequence[Sequence[Hashable]]] = {
        "safe or unsafe": a_safe + b_safe,
        "more helpful": [[v.more_helpful for v in vs] for vs in shared],
        "more harmless": [[v.more_harmless for v in vs] for vs in shared],
    }
    return [QuestionAgreement(q, len(u), raw_agreement(u), krippendorff_alpha(u)) for q, u in units.items()]


def summarize(batch_uri: str, items: Sequence[Item], labels: Sequence[Label], exclude_careless: bool) -> LabelResult:
    """All figures; agreement is of those annotators who count."""
    annotators = examine_annotators(items, labels, exclude_careless)
    excluded = {a.name for a in annotators if a.excluded}
    return LabelResult(
        batch_uri=batch_uri,
        items=len(items),
        pairs=sum(item.gold is None for item in items),
        labels=len(labels),
        labels_missing=sum(missing_labels(items, labels).values()),
        usable=len(majority_verdicts(items, labels, excluded)),
        annotators=annotators,
        agreement=measure_agreement(items, [label for label in labels if label.annotator not in excluded]),
    )


def result_table(result: LabelResult) -> str:
    """Markdown for people."""
    lines = [
        f"{result.labels} labels of {result.items} items ({result.items - result.pairs} of them gold); "
        f"{result.labels_missing} labels are missing; {result.usable} of {result.pairs} pairs have a majority",
        "",
        "| annotator | labels | skipped | right on gold items (95 %) | remarks |",
        "|---|---:|---:|---|---|",
    ]
    for a in result.annotators:
        gold = f"{a.gold.value:.0%} of {a.gold.n} ({a.gold.low:.0%} to {a.gold.high:.0%})" if a.gold.n else "saw none"
        remarks = "; ".join([*a.flags, *(["excluded"] if a.excluded else [])])
        lines.append(f"| {markdown_code(a.name)} | {a.labels} | {a.skipped} | {gold} | {remarks} |")
    lines += [
        "",
        "| question | units labelled by several | raw agreement | Krippendorff's alpha |",
        "|---|---:|---:|---:|",
    ]
    for q in result.agreement:
        raw = "-" if q.raw is None else f"{q.raw:.1%}"
        lines.append(f"| {q.question} | {q.units} | {raw} | {'-' if q.alpha is None else f'{q.alpha:.3f}'} |")
    return "\n".join(lines) + "\n"
