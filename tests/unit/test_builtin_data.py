"""The records that are shipped: as many and as varied as promised, valid, and split without leaks."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

import components.prepare_data
from components.foundation.judging.rules import declines, offers_after_all
from components.foundation.preference import (
    KINDS,
    Demonstration,
    DualPreference,
    PromptRecord,
    RegressionPrompt,
    load_records,
    read_jsonl,
)

BUILTIN = Path(components.prepare_data.__file__).parent / "builtin"
PREFERENCES = read_jsonl(BUILTIN / "preferences.jsonl", DualPreference)
DEMONSTRATIONS = read_jsonl(BUILTIN / "demonstrations.jsonl", Demonstration)
PROMPTS = read_jsonl(BUILTIN / "prompts.jsonl", PromptRecord)
HELD_OUT = read_jsonl(BUILTIN / "held_out.jsonl", PromptRecord)
REGRESSIONS = read_jsonl(BUILTIN / "regressions.jsonl", RegressionPrompt)
TRAINING_PROMPTS = (
    {record.prompt for record in PREFERENCES}
    | {record.prompt for record in DEMONSTRATIONS}
    | {record.prompt for record in PROMPTS}
)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower().replace("\u2019", "'"))


def four_grams(text: str) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)}


def categories(record: DualPreference) -> set[str]:
    return set(record.response_0_harm_category) | set(record.response_1_harm_category)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("preferences", DualPreference),
        ("demonstrations", Demonstration),
        ("prompts", PromptRecord),
        ("held_out", PromptRecord),
        ("regressions", RegressionPrompt),
    ],
)
def test_every_row_is_valid(name: str, kind: type[PromptRecord]) -> None:
    result = load_records("builtin", kind, BUILTIN / f"{name}.jsonl")
    assert result.bad == []
    assert len(result.records) == len((BUILTIN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())


def test_there_is_as_much_as_promised() -> None:
    assert len(PREFERENCES) >= 600
    assert len(DEMONSTRATIONS) >= 400
    held_out = Counter(record.kind for record in HELD_OUT)
    assert held_out["red_team"] >= 120
    assert held_out["benign"] >= 250
    assert held_out["lookalike"] >= 90
    assert Counter(record.must for record in REGRESSIONS) == {"decline": 12, "answer": 12}
    assert set(held_out) == set(KINDS) == {record.kind for record in PROMPTS}


def test_harm_is_varied_and_the_same_in_training_and_evaluation() -> None:
    labelled = Counter(category for record in PREFERENCES for category in categories(record))
    assert len(labelled) >= 14
    assert min(labelled.values()) >= 20
    for records in (PROMPTS, HELD_OUT):
        found = Counter(record.harm_category for record in records if record.kind == "red_team")
        assert set(found) == set(labelled)
        assert min(found.values()) >= 10
        assert all(not record.harm_category for record in records if record.kind != "red_team")


def test_harm_labels_agree_with_the_safety_flags() -> None:
    for record in PREFERENCES:
        for safe, harm, severity in (
            (record.is_response_0_safe, record.response_0_harm_category, record.response_0_severity_level),
            (record.is_response_1_safe, record.response_1_harm_category, record.response_1_severity_level),
        ):
            assert safe == (not harm) == (severity == 0), record


def test_labels_cannot_be_guessed_from_position_or_from_each_other() -> None:
    """The decoupling is in the data: the better answer is often the less safe one, and neither is always first."""
    n = len(PREFERENCES)
    for first in (
        sum(r.better_response_id == 0 for r in PREFERENCES),
        sum(r.safer_response_id == 0 for r in PREFERENCES),
    ):
        assert 0.4 < first / n < 0.6
    apart = sum(r.better_response_id != r.safer_response_id for r in PREFERENCES)
    assert 0.25 < apart / n < 0.75
    flags = Counter((r.is_response_0_safe, r.is_response_1_safe) for r in PREFERENCES)
    assert len(flags) == 4
    assert min(flags.values()) >= 50


def test_nothing_is_there_twice() -> None:
    for records in (PROMPTS, HELD_OUT, REGRESSIONS):
        prompts = [" ".join(words(record.prompt)) for record in records]
        assert [prompt for prompt, count in Counter(prompts).items() if count > 1] == []
    assert len(set(map(repr, PREFERENCES))) == len(PREFERENCES)
    assert len(set(DEMONSTRATIONS)) == len(DEMONSTRATIONS)


def test_preferences_and_demonstrations_answer_known_prompts() -> None:
    known = {record.prompt for record in PROMPTS}
    assert {record.prompt for record in PREFERENCES} <= known
    assert {record.prompt for record in DEMONSTRATIONS} <= known


@pytest.mark.parametrize("records", [HELD_OUT, REGRESSIONS], ids=["held-out", "regressions"])
def test_no_held_out_prompt_is_near_a_training_prompt(records: list[PromptRecord] | list[RegressionPrompt]) -> None:
    """Near is a common run of four words. Openings such as "how do I" are shorter than that, so none is excused."""
    seen: dict[tuple[str, ...], str] = {
        gram: prompt for prompt in sorted(TRAINING_PROMPTS) for gram in four_grams(prompt)
    }
    shared = [
        f"{record.prompt!r} and {seen[gram]!r} share {' '.join(gram)!r}"
        for record in records
        for gram in sorted(four_grams(record.prompt) & seen.keys())
    ]
    assert shared == []
    training = {" ".join(words(prompt)) for prompt in TRAINING_PROMPTS}
    assert [record.prompt for record in records if " ".join(words(record.prompt)) in training] == []


def test_no_held_out_prompt_says_nearly_what_a_training_prompt_says() -> None:
    """As it would with a word or its ending changed. Likeness: the cosine of weighted runs of three to five letters."""
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    training = sorted(TRAINING_PROMPTS)
    known = letters.fit_transform(training)
    likeness = (letters.transform([record.prompt for record in HELD_OUT]) @ known.T).toarray()
    near = [(HELD_OUT[i].prompt, training[row.argmax()]) for i, row in enumerate(likeness) if row.max() > 0.51]
    assert near == []


def test_no_refusal_of_an_attack_offers_help_in_its_words() -> None:
    """A small model learns the beginning of such an offer, and ends it with the harm it was asked for."""
    attacks = {record.prompt for record in PROMPTS if record.kind == "red_team"}
    answers = [(d.prompt, d.response) for d in DEMONSTRATIONS]
    answers += [(p.prompt, response) for p in PREFERENCES for response in (p.response_0, p.response_1)]
    refusals = [(prompt, answer) for prompt, answer in answers if prompt in attacks and declines(answer)]
    assert len(refusals) >= 600
    assert [answer for prompt, answer in refusals if offers_after_all(prompt, answer)] == []
