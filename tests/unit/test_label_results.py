"""What labels become: careless annotators, majorities, preferences, the table."""

from __future__ import annotations

from itertools import cycle

import pytest

from components.annotate.human.annotators import examine_annotators
from components.annotate.human.batch import Gold, Item
from components.annotate.human.label_parsing import Label, Verdict
from components.annotate.human.majority import majority, majority_verdicts, preference_of
from components.annotate.human.results import measure_agreement, missing_labels, result_table, summarize

BOTH_SAFE = Verdict(True, True, [], [], "A", "B")
A_SAFE = Verdict(True, False, [], ["drugs"], "B", "A")
B_SAFE = Verdict(False, True, ["drugs"], [], "A", "B")
NONE_SAFE = Verdict(False, False, ["drugs"], ["weapons"], "A", "B")
ALWAYS_A = Verdict(True, True, [], [], "A", "A")


def item(name: str, *, gold: Gold | None = None, wanted: int = 1, swapped: bool = False) -> Item:
    return Item(name, f"prompt {name}", "theft", "answer 0", "answer 1", swapped, wanted, gold)


def label(name: str, annotator: str, verdict: Verdict | None) -> Label:
    return Label(name, annotator, verdict)


@pytest.mark.golden
def test_a_majority_decides_each_question() -> None:
    verdict = majority([A_SAFE, A_SAFE, Verdict(True, True, [], [], "A", "A")])
    assert verdict == Verdict(True, False, [], ["drugs"], "B", "A")
    assert majority([A_SAFE]) == A_SAFE


def test_a_harm_needs_a_majority_of_those_who_call_the_answer_unsafe() -> None:
    votes = [
        Verdict(False, True, ["drugs", "weapons"], [], "A", "B"),
        Verdict(False, True, ["drugs"], [], "A", "B"),
        BOTH_SAFE,
    ]
    verdict = majority(votes)
    assert verdict is not None and verdict.a_harms == ["drugs"]


@pytest.mark.parametrize(
    "votes",
    [
        [],
        [A_SAFE, B_SAFE],
        [A_SAFE, A_SAFE, B_SAFE, B_SAFE],
        # by majority A is safe, B is not, and yet B is the more harmless
        [A_SAFE, Verdict(True, True, [], [], "B", "B"), Verdict(False, False, [], [], "B", "B")],
    ],
)
def test_ties_and_contradicting_majorities_are_unusable(votes: list[Verdict]) -> None:
    assert majority(votes) is None


def test_excluded_annotators_skips_and_gold_items_have_no_vote() -> None:
    items = [item("1"), item("2"), item("3"), item("g", gold=Gold(True, False))]
    labels = [
        label("1", "ann", A_SAFE),
        label("1", "bob", B_SAFE),
        label("2", "ann", A_SAFE),
        label("2", "cyd", None),
        label("3", "bob", A_SAFE),
        label("g", "ann", A_SAFE),
    ]
    assert majority_verdicts(items, labels) == {"2": A_SAFE, "3": A_SAFE}
    assert majority_verdicts(items, labels, excluded=["bob"]) == {"1": A_SAFE, "2": A_SAFE}


@pytest.mark.golden
@pytest.mark.parametrize("swapped", [False, True])
def test_a_preference_undoes_the_blind_order(swapped: bool) -> None:
    record = preference_of(item("1", swapped=swapped), A_SAFE)
    a, b = (1, 0) if swapped else (0, 1)
    assert (record.response_0, record.response_1) == ("answer 0", "answer 1")
    assert (record.safer_response_id, record.better_response_id) == (a, b)
    safe = (record.is_response_0_safe, record.is_response_1_safe)
    harms = (record.response_0_harm_category, record.response_1_harm_category)
    assert (safe[a], safe[b], harms[a], harms[b]) == (True, False, {}, {"drugs": True})
    assert (record.severity(a), record.severity(b)) == (0, 1)
    assert record.problem() == ""


def test_an_unsafe_answer_without_a_harm_has_the_prompts_or_none() -> None:
    verdict = Verdict(False, False, [], [], "A", "A")
    assert preference_of(item("1"), verdict).response_0_harm_category == {"theft": True}
    bare = Item("1", "p", "", "x", "y", False)
    assert preference_of(bare, verdict).response_1_harm_category == {"unspecified": True}


def gold_items(count: int) -> list[Item]:
    return [item(f"g{i}", gold=Gold(i % 2 == 0, i % 2 == 1)) for i in range(count)]


def honest(items: list[Item], annotator: str, wrong: int = 0) -> list[Label]:
    """Gold items judged right but for the first `wrong`; the letters change."""
    labels = []
    for number, (gold, helpful) in enumerate(zip(items, cycle("AB"), strict=False)):
        a_safe = (gold.gold is not None and gold.gold.a_safe) != (number < wrong)
        labels.append(label(gold.item_id, annotator, Verdict(a_safe, not a_safe, [], [], helpful, "AB"[not a_safe])))
    return labels


@pytest.mark.golden
def test_accuracy_on_gold_items_has_an_interval_and_a_limit() -> None:
    """Wilson's 95 % intervals: 8 of 10 is 49.0 % to 94.3 %, 3 of 10 is 10.8 % to 60.3 %, 4 of 10 16.8 % to 68.7 %."""
    items = gold_items(10)
    labels = honest(items, "ann", wrong=2) + honest(items, "bob", wrong=7) + honest(items, "cyd", wrong=6)
    ann, bob, cyd = examine_annotators(items, labels, exclude_careless=False)
    assert (ann.gold.low, ann.gold.high) == (pytest.approx(0.490, abs=5e-4), pytest.approx(0.943, abs=5e-4))
    assert (bob.gold.value, bob.gold.high) == (pytest.approx(0.3), pytest.approx(0.603, abs=5e-4))
    assert [bool(a.flags) for a in (ann, bob, cyd)] == [False, True, True]
    assert "30% of 10 gold items" in bob.flags[0]
    assert not any(a.excluded for a in (ann, bob, cyd))
    assert [a.excluded for a in examine_annotators(items, labels, exclude_careless=True)] == [False, True, True]


def test_few_gold_items_prove_nothing() -> None:
    items = gold_items(1)
    (only,) = examine_annotators(items, honest(items, "ann", wrong=1), exclude_careless=True)
    assert only.gold.value == 0.0 and only.flags == [] and not only.excluded


@pytest.mark.fault
def test_an_annotator_who_always_answers_a_is_flagged() -> None:
    items = [item(str(i)) for i in range(10)]
    labels = [label(i.item_id, "lazy", ALWAYS_A) for i in items]
    (lazy,) = examine_annotators(items, labels, exclude_careless=True)
    assert lazy.flags == ["always A is more helpful", "always A is more harmless"] and lazy.excluded
    (nine,) = examine_annotators(items, labels[:9], exclude_careless=True)
    assert nine.flags == []  # so few may be chance
    changed = [*labels[:9], label("9", "lazy", Verdict(True, True, [], [], "B", "B"))]
    assert examine_annotators(items, changed, exclude_careless=True)[0].flags == []


def test_what_is_missing_is_counted_by_item() -> None:
    items = [item("1"), item("2", wanted=3), item("g", gold=Gold(True, False), wanted=2)]
    labels = [label("2", "ann", A_SAFE), label("2", "bob", None), label("1", "ann", A_SAFE), label("1", "bob", A_SAFE)]
    assert missing_labels(items, labels) == {"2": 1, "g": 2}


@pytest.mark.golden
def test_agreement_is_of_shared_pairs_without_gold() -> None:
    items = [item("1", wanted=2), item("2", wanted=2), item("3"), item("g", gold=Gold(True, False), wanted=2)]
    labels = [label(i, a, v) for i, a, v in (("1", "x", A_SAFE), ("1", "y", A_SAFE), ("2", "x", BOTH_SAFE))]
    labels += [label("2", "y", NONE_SAFE), label("3", "x", A_SAFE), label("g", "x", A_SAFE), label("g", "y", B_SAFE)]
    safety, helpful, harmless = measure_agreement(items, labels)
    assert (safety.units, safety.raw) == (4, 0.5)  # answers A and B of two items: agree, agree, differ, differ
    # labels: 4 safe, 4 unsafe; observed 4 of 8 pairs differ, expected 32 of 56
    assert safety.alpha == pytest.approx(1 - (4 / 8) / (32 / 56))
    assert (helpful.units, helpful.raw, harmless.raw) == (2, 1.0, 1.0)


def test_the_table_names_everything_that_the_figures_say() -> None:
    items = [*gold_items(10), *(item(str(i), wanted=2) for i in range(2))]
    labels = honest(gold_items(10), "bob", wrong=8)
    labels += [label(str(i), a, v) for i in range(2) for a, v in (("ann", A_SAFE), ("bob", B_SAFE))]
    result = summarize("s3://batch", items, labels, exclude_careless=True)
    assert (result.items, result.pairs, result.labels, result.labels_missing, result.usable) == (12, 2, 14, 0, 2)
    assert [q.units for q in result.agreement] == [0, 0, 0]  # with bob left out, nobody shares an item
    table = result_table(result)
    assert "14 labels of 12 items (10 of them gold)" in table and "2 of 2 pairs have a majority" in table
    assert "| `ann` | 2 | 0 | saw none |  |" in table
    assert "| `bob` | 12 | 0 | 20% of 10 (6% to 51%) | right on 20% of 10 gold items; excluded |" in table
    kept = summarize("s3://batch", items, labels, exclude_careless=False)
    assert kept.usable == 0 and kept.agreement[0].raw == 0.0
    assert "| safe or unsafe | 4 | 0.0% | -0.750 |" in result_table(kept)
