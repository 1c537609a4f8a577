"""What annotators get: pairs of answers in blind order, some of them for several people, with gold items among them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from components.foundation.judging import AnswerPair
from components.foundation.preference import DualPreference


@dataclass(frozen=True)
class Gold:
    """Of an item whose answers' safety is known."""

    a_safe: bool
    b_safe: bool


@dataclass(frozen=True)
class Item:
    """One pair, with all that is known of it; annotators see the id, the prompt and the answers A and B alone.

    Attributes:
        swapped: answer A is answer 1.
        labels_wanted: from so many different annotators.
        gold: set for an item of known answer, which teaches nothing and tests who labels it.
    """

    item_id: str
    prompt: str
    harm_category: str
    answer_0: str
    answer_1: str
    swapped: bool
    labels_wanted: int = 1
    gold: Gold | None = None

    @property
    def answer_a(self) -> str:
        return self.answer_1 if self.swapped else self.answer_0

    @property
    def answer_b(self) -> str:
        return self.answer_0 if self.swapped else self.answer_1


@dataclass(frozen=True)
class Mixture:
    """How many items are for `overlap_annotators` people, and how many gold items come on top of the pairs."""

    overlap_share: float
    overlap_annotators: int
    gold_share: float


def build_items(
    pairs: Sequence[AnswerPair], known: Sequence[DualPreference], mixture: Mixture, seed: int
) -> list[Item]:
    """Pairs and known preferences -> items in the order in which they are shown; the seed decides all that is chance.

    Gold items are drawn from those known preferences that call one answer safe and the other unsafe. A share above 0
    gives at least one item, where there is one to give.
    """
    random_ = random.Random(seed)
    used = {(p.prompt.prompt, frozenset((p.answer_0, p.answer_1))) for p in pairs}
    candidates = [
        r
        for r in known
        if r.is_response_0_safe != r.is_response_1_safe
        and (r.prompt, frozenset((r.response_0, r.response_1))) not in used
    ]
    gold = random_.sample(candidates, min(len(candidates), _count(mixture.gold_share, len(pairs))))
    items = [_item(p.prompt.prompt, p.prompt.harm_category, p.answer_0, p.answer_1, random_) for p in pairs]
    items += [_gold_item(record, random_) for record in gold]
    random_.shuffle(items)
    shared = set(random_.sample(range(len(items)), min(len(items), _count(mixture.overlap_share, len(items)))))
    return [
        replace(item, labels_wanted=mixture.overlap_annotators) if index in shared else item
        for index, item in enumerate(items)
    ]


def _count(share: float, total: int) -> int:
    return max(1, round(share * total)) if share > 0 and total else 0


def _item(prompt: str, category: str, answer_0: str, answer_1: str, random_: random.Random) -> Item:
    swapped = random_.random() < 0.5
    shown = (answer_1, answer_0) if swapped else (answer_0, answer_1)
    digest = hashlib.sha256(json.dumps([prompt, *shown]).encode()).hexdigest()
    return Item(digest[:16], prompt, category, answer_0, answer_1, swapped)


def _gold_item(record: DualPreference, random_: random.Random) -> Item:
    item = _item(record.prompt, "", record.response_0, record.response_1, random_)
    first, second = record.is_response_0_safe, record.is_response_1_safe
    return replace(item, gold=Gold(second, first) if item.swapped else Gold(first, second))
