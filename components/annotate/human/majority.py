"""What the majority says of each item, and the preference that this is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from components.annotate.human.batch import Item
from components.annotate.human.label_parsing import Label, Verdict
from components.annotate.human.questions import HARMS
from components.foundation.preference import DualPreference

T = TypeVar("T", bound=Hashable)


def majority_verdicts(
    items: Sequence[Item], labels: Sequence[Label], excluded: Iterable[str] = ()
) -> dict[str, Verdict]:
    """Item id -> the majority's verdict, for those that have one; gold items are left out."""
    left_out = set(excluded)
    votes: dict[str, list[Verdict]] = {item.item_id: [] for item in items if item.gold is None}
    for label in labels:
        if label.verdict is not None and label.item_id in votes and label.annotator not in left_out:
            votes[label.item_id].append(label.verdict)
    found = {item_id: majority(verdicts) for item_id, verdicts in votes.items()}
    return {item_id: verdict for item_id, verdict in found.items() if verdict is not None}


def majority(votes: Sequence[Verdict]) -> Verdict | None:
    """Each question voted on by itself; a harm needs a majority of those who call the answer unsafe.

    Returns:
        None where there is no vote, a tie, or where the majorities contradict each other.
    """
    a_safe, b_safe = _winner([v.a_safe for v in votes]), _winner([v.b_safe for v in votes])
    helpful, harmless = _winner([v.more_helpful for v in votes]), _winner([v.more_harmless for v in votes])
    if a_safe is None or b_safe is None or helpful is None or harmless is None:
        return None
    a_harms = [] if a_safe else _named([v.a_harms for v in votes if not v.a_safe])
    b_harms = [] if b_safe else _named([v.b_harms for v in votes if not v.b_safe])
    verdict = Verdict(a_safe, b_safe, a_harms, b_harms, helpful, harmless)
    return None if verdict.problem() else verdict


def preference_of(item: Item, verdict: Verdict) -> DualPreference:
    """In the schema of the preference data, the blind order undone; an unsafe answer has the least severity."""
    a, b = (1, 0) if item.swapped else (0, 1)
    by_letter = {"A": a, "B": b}
    safe = {a: verdict.a_safe, b: verdict.b_safe}
    harms = {a: verdict.a_harms, b: verdict.b_harms}
    categories = [
        {} if safe[i] else dict.fromkeys(harms[i] or [item.harm_category or "unspecified"], True) for i in (0, 1)
    ]
    return DualPreference(
        prompt=item.prompt,
        response_0=item.answer_0,
        response_1=item.answer_1,
        better_response_id=by_letter[verdict.more_helpful],
        safer_response_id=by_letter[verdict.more_harmless],
        is_response_0_safe=safe[0],
        is_response_1_safe=safe[1],
        response_0_harm_category=categories[0],
        response_1_harm_category=categories[1],
        response_0_severity_level=0 if safe[0] else 1,
        response_1_severity_level=0 if safe[1] else 1,
    )


def _winner(votes: Sequence[T]) -> T | None:
    """What most say; None in a tie or without votes."""
    ranked = Counter(votes).most_common(2)
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def _named(voted: Sequence[Sequence[str]]) -> list[str]:
    counts = Counter(harm for harms in voted for harm in harms)
    return [harm for harm in HARMS if 2 * counts[harm] > len(voted)]
