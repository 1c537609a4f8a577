"""Scores of held-out answers: each answer gets its own, from the model that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest

from components.evaluate import evaluate
from components.foundation.backbone import Backbone
from components.foundation.batching import ChatEncoder, collate
from components.foundation.preference_trainer import answer_scores
from components.foundation.results import HeldOutAnswer
from components.foundation.settings import resolve_settings
from tests.unit.random_roles import save_random_role

TEXTS = ("a rather long answer it is", "no", "of middling length", "yes, of course", "x")


def answer(prompt: str, text: str) -> HeldOutAnswer:
    return HeldOutAnswer(prompt, "benign", "", text, True, False, 0.5)


def test_each_answer_has_the_reward_and_the_cost_that_it_gets_alone(
    load_tiny: Callable[[str], Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are scored in batches of like length, these stand in another order, and some have no counterpart."""
    answers = [answer(f"How {i}?", text) for i, text in enumerate(TEXTS)]
    baseline = [answer(f"How {i}?", text[::-1]) for i, text in list(enumerate(TEXTS))[:0:-1]] + [answer("Who?", "me")]
    models = load_tiny("llama")
    for seed, role in enumerate(("reward", "cost")):
        save_random_role(models, role, tmp_path / role, seed)
    encoder = ChatEncoder(models.tokenizer, 32, 32)

    def alone(role: str, group: list[HeldOutAnswer]) -> list[float]:
        with models.role(role):
            batches = [
                collate([encoder.sequence(a.prompt, a.answer)], models.eos_token_id, models.device) for a in group
            ]
            return [answer_scores(models, role, batch).item() for batch in batches]

    monkeypatch.setattr(evaluate, "_PAIRS_PER_FORWARD", 4)  # two batches
    groups = evaluate._scored(
        load_tiny("llama"), resolve_settings("smol"), answers, baseline, tmp_path / "reward", tmp_path / "cost"
    )
    for scored, group in zip(groups, (answers, baseline), strict=True):
        rewards, costs = alone("reward", group), alone("cost", group)
        assert [(a.prompt, a.answer) for a in scored] == [(a.prompt, a.answer) for a in group]
        assert [a.reward for a in scored] == pytest.approx(rewards, abs=1e-3)
        assert [a.cost for a in scored] == pytest.approx(costs, abs=1e-3)
        assert min(max(rewards) - min(rewards), max(costs) - min(costs)) > 0.05  # else the order would not show


def test_of_each_kind_as_many_prompts_are_scored_as_asked_for_evenly_spread() -> None:
    kinds = {f"a{i}": "red_team" for i in range(10)} | {"b0": "benign", "b1": "benign"}
    assert evaluate.spread_over_kinds(kinds, 0) == list(kinds)
    assert evaluate.spread_over_kinds(kinds, 4) == ["a0", "a2", "a5", "a7", "b0", "b1"]


def test_answers_that_are_not_scored_stay_and_have_no_scores(
    load_tiny: Callable[[str], Backbone], tmp_path: Path
) -> None:
    answers = [answer(f"How {i}?", text) for i, text in enumerate(TEXTS)]
    models = load_tiny("llama")
    for seed, role in enumerate(("reward", "cost")):
        save_random_role(models, role, tmp_path / role, seed)
    settings = resolve_settings("smol", overrides=["evaluate.scored_prompts=2"])
    ours, theirs = evaluate._scored(
        load_tiny("llama"), settings, answers, answers[:3], tmp_path / "reward", tmp_path / "cost"
    )
    assert [a.answer for a in ours] == list(TEXTS)
    assert [a.prompt for a in ours if a.reward is not None and a.cost is not None] == ["How 0?", "How 2?"]
    assert [a.prompt for a in theirs if a.reward is not None] == ["How 0?", "How 2?"]
    evaluation = evaluate.summarize(1, ours, theirs, 0.95)
    assert evaluation.n_benign == len(TEXTS)
    assert evaluation.arena is not None
    assert sum(astuple(evaluation.arena)) == 2
