"""Scores of held-out answers: each answer gets its own, from the model that is asked for."""

from __future__ import annotations

from collections.abc import Callable
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


def test_each_answer_has_the_reward_and_the_cost_that_it_gets_alone(
    load_tiny: Callable[[str], Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are scored in batches of like length, and these stand in another order."""
    answers = [HeldOutAnswer("How?", "benign", "", text, True, False, 0.5) for text in TEXTS]
    models = load_tiny("llama")
    for seed, role in enumerate(("reward", "cost")):
        save_random_role(models, role, tmp_path / role, seed)
    encoder = ChatEncoder(models.tokenizer, 32, 32)

    def alone(role: str) -> list[float]:
        with models.role(role):
            batches = [collate([encoder.sequence("How?", text)], models.eos_token_id, models.device) for text in TEXTS]
            return [answer_scores(models, role, batch).item() for batch in batches]

    rewards, costs = alone("reward"), alone("cost")
    monkeypatch.setattr(evaluate, "_ROWS_PER_FORWARD", 3)  # two batches
    scored = evaluate._scored(
        load_tiny("llama"), resolve_settings("smol"), answers, tmp_path / "reward", tmp_path / "cost"
    )
    assert [a.answer for a in scored] == list(TEXTS)
    assert [a.reward for a in scored] == pytest.approx(rewards, abs=1e-3)
    assert [a.cost for a in scored] == pytest.approx(costs, abs=1e-3)
    assert min(max(rewards) - min(rewards), max(costs) - min(costs)) > 0.05  # else the order would not show
