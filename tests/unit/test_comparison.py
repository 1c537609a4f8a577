"""PPO on an annotator's comparisons: what is asked, what becomes of the replies, and what is learned from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from components.foundation.backbone import Backbone
from components.foundation.batching import TokenSequence
from components.foundation.errors import AnnotationError, ConstraintError
from components.foundation.judging import AnswerJudgement, AnswerPair, PairJudgement
from components.foundation.policy import ACTOR
from components.foundation.preference import PromptRecord
from components.foundation.results import PpoTrace, from_json, to_json
from components.foundation.role_optimizer import UpdateGuard
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.settings import Settings, resolve_settings
from components.ppo_lagrangian.comparison import ask_annotator, compare_episode
from components.ppo_lagrangian.episode import COST, REWARD, compute_advantages, shape_signals
from components.ppo_lagrangian.multiplier import CostConstraint, MultiplierState
from components.ppo_lagrangian.ppo_lagrangian import PpoProgress, label_constraint, place_roles
from components.ppo_lagrangian.trainer import PpoLagrangian, StepMetrics

LoadTiny = Callable[[str], Backbone]
PROMPT = PromptRecord("p", "benign")
SAFE, UNSAFE = AnswerJudgement(True, False, 0.8, 0), AnswerJudgement(False, False, 0.4, 2)


class ScriptedJudge:
    """Replies to comparisons from a list, in order; judges every single answer safe."""

    def __init__(self, replies: Sequence[PairJudgement | None]) -> None:
        self._replies = list(replies)
        self.asked: list[AnswerPair] = []

    def judge_answers(self, items: Sequence[tuple[PromptRecord, str]]) -> list[AnswerJudgement | None]:
        return [SAFE for _ in items]

    def compare(self, pairs: Sequence[AnswerPair]) -> list[PairJudgement | None]:
        self.asked += pairs
        taken, self._replies = self._replies[: len(pairs)], self._replies[len(pairs) :]
        return taken


class LetterJudge:
    """The more letters, the better; an answer with a letter of the upper half of the alphabet is unsafe."""

    def judge_answers(self, items: Sequence[tuple[PromptRecord, str]]) -> list[AnswerJudgement | None]:
        return [_judged(text) for _, text in items]

    def compare(self, pairs: Sequence[AnswerPair]) -> list[PairJudgement | None]:
        return [
            PairJudgement(
                _judged(pair.answer_0),
                _judged(pair.answer_1),
                better_id=int(_letters(pair.answer_1) > _letters(pair.answer_0)),
                safer_id=int(_high_letters(pair.answer_1) < _high_letters(pair.answer_0)),
            )
            for pair in pairs
        ]


def _letters(text: str) -> int:
    return sum(c.isascii() and c.isalpha() for c in text)


def _high_letters(text: str) -> int:
    return sum("n" <= c.lower() <= "z" for c in text)


def _judged(text: str) -> AnswerJudgement:
    return AnswerJudgement(_high_letters(text) == 0, False, min(1.0, _letters(text) / 10), 0)


def tiny(*overrides: str) -> Settings:
    return resolve_settings(
        "tiny", overrides=["ppo.advantage_source=preference_oracle", "annotate.min_usable_share=0.5", *overrides]
    )


@pytest.mark.golden
def test_replies_are_counted_by_hand() -> None:
    """Three pairs asked twice: one reply is unusable, and two equal answers are judged without being compared."""
    pairs = [AnswerPair(PROMPT, "a", "b"), AnswerPair(PROMPT, "same", "same"), AnswerPair(PROMPT, "c", "d")]
    judge = ScriptedJudge(
        [
            PairJudgement(SAFE, UNSAFE, better_id=0, safer_id=0),
            PairJudgement(UNSAFE, SAFE, better_id=0, safer_id=1),
            PairJudgement(SAFE, SAFE, better_id=1, safer_id=0),
            None,
        ]
    )
    tally = ask_annotator(judge, pairs, comparisons=2, min_usable_share=0.8)
    assert [(pair.answer_0, pair.answer_1) for pair in judge.asked] == [("a", "b"), ("c", "d")] * 2
    assert tally.asked.tolist() == [2, 0, 1]
    assert tally.better.tolist() == [1, 0, 1]
    assert tally.more_harmful.tolist() == [0, 0, 1]
    assert tally.unsafe_shares == [0, 0.5, 0, 0, 1, 0]
    assert sum(tally.helpfulness) / len(tally.helpfulness) == pytest.approx((6 * 0.8 + 2 * 0.4) / 8)


@pytest.mark.fault
def test_too_few_usable_replies_stop_training() -> None:
    pairs = [AnswerPair(PROMPT, "a", "b")] * 4
    with pytest.raises(AnnotationError, match="only 1 of 4"):
        ask_annotator(ScriptedJudge([None, None, None, PairJudgement(SAFE, SAFE, 0, 0)]), pairs, 1, 0.5)
    with pytest.raises(AnnotationError, match="none"):
        ask_annotator(ScriptedJudge([None] * 4), pairs, 1, 0.0)


@pytest.fixture
def policy(load_tiny: LoadTiny, tmp_path: Path) -> Backbone:
    """An actor and a reference; neither a reward nor a cost model, nor critics."""
    backbone = load_tiny("tiny-llama")
    place_roles(backbone, tiny(), None, tmp_path / "no reward model", tmp_path / "no cost model")
    return backbone


@pytest.mark.golden
def test_advantages_are_half_the_gaps_of_an_answer_and_the_kl_that_follows(policy: Backbone) -> None:
    """One pair asked four times: better 3 of 4, more harmful 4 of 4, clipped to 0.9; lambda 2; nothing whitened.

    With beta 0, every token of the first answer gets (log 3 - 2 log 9) / 2 / 3; the second the opposite, less the
    penalty of 0.6 / 3 for its missing end.
    """
    eos = policy.eos_token_id
    sequences = [TokenSequence((5, 6), (70, 71, 72, eos)), TokenSequence((5, 6), (80, 81))]
    replies = [PairJudgement(UNSAFE, SAFE, better_id=int(i == 0), safer_id=1) for i in range(4)]
    settings = tiny(
        "ppo.oracle_comparisons=4",
        "ppo.oracle_clip=0.1",
        "ppo.whiten_advantages=false",
        "ppo.kl_coefficient=0",
        "ppo.missing_eos_penalty=0.6",
    )
    episode = compare_episode(policy, ScriptedJudge(replies), settings, [PROMPT, PROMPT], sequences)
    assert episode.costs == [1.0, 0.0]
    found = compute_advantages(episode, shape_signals(episode, settings.ppo), settings.ppo, multiplier=2.0).combined
    expected = (math.log(3) - 2 * math.log(9)) / 2 / 3
    torch.testing.assert_close(found[0], torch.full((4,), expected))
    torch.testing.assert_close(found[1], torch.tensor([-expected - 0.2, -expected - 0.2, 0.0, 0.0]))


def _train(backbone: Backbone, settings: Settings, steps: int, constraint: CostConstraint) -> list[StepMetrics]:
    trainer = PpoLagrangian(backbone, TransformersEngine(backbone, ACTOR), settings.ppo, constraint, seed=0)
    prompts = [(256, 72, 256)] * settings.ppo.episodes_per_step
    score = partial(compare_episode, backbone, LetterJudge(), settings, [PROMPT] * len(prompts))
    return [trainer.step(prompts, step, score) for step in range(steps)]


def test_one_step_trains_the_actor_and_moves_the_multiplier_by_the_unsafe_share(policy: Backbone) -> None:
    before = {name: tensor.detach().clone() for name, tensor in policy.role_tensors(ACTOR).items()}
    settings = tiny("ppo.lambda_init=0.2", "ppo.lambda_learning_rate=0.5")
    (metrics,) = _train(policy, settings, 1, CostConstraint(0.1))
    assert any(not torch.equal(before[name], tensor) for name, tensor in policy.role_tensors(ACTOR).items())
    assert not policy.has_adapter(REWARD)
    assert not policy.has_adapter(COST)
    assert metrics.multiplier == pytest.approx(max(0.0, 0.2 + 0.5 * (metrics.cost - 0.1)))
    assert (metrics.cost * settings.ppo.episodes_per_step) == pytest.approx(
        round(metrics.cost * settings.ppo.episodes_per_step)
    )
    assert (metrics.reward_critic_loss, metrics.cost_critic_loss) == (0.0, 0.0)


def _first_token_share(policy: Backbone, wanted: Callable[[str], int]) -> float:
    """Probability that the first token of an answer is one that is wanted."""
    ids = torch.tensor([[256, 72, 256, 0]])
    with policy.role(ACTOR):
        chances = policy.answer_logits(ids, torch.ones_like(ids), 1)[0, 0].softmax(-1)
    return float(sum(chances[i] for i in range(256) if wanted(policy.text([i]))))


@pytest.mark.parametrize(("threshold", "lambda_init"), [(0.99, 0.001), (0.01, 20.0)])
def test_a_policy_learns_what_is_liked_or_under_a_strict_limit_to_shun_what_is_unsafe(
    policy: Backbone, threshold: float, lambda_init: float
) -> None:
    """Letters are liked, and those from n to z are unsafe: without pressure all grow likelier, else these die out."""
    with torch.no_grad():
        policy._model.get_output_embeddings().weight.mul_(10)  # random weights alone can say nothing with conviction
    letters, unsafe = (_first_token_share(policy, wanted) for wanted in (_letters, _high_letters))
    settings = tiny(
        f"ppo.lambda_init={lambda_init}",
        "ppo.episodes_per_step=64",
        "ppo.minibatch_size=32",
        "ppo.max_new_tokens=2",
        "ppo.actor_learning_rate=0.01",
        "ppo.missing_eos_penalty=0",
    )
    _train(policy, settings, 25, CostConstraint(threshold))
    if lambda_init < 1:
        assert _first_token_share(policy, _letters) > 1.5 * letters
        assert _first_token_share(policy, _high_letters) > unsafe
    else:
        assert _first_token_share(policy, _high_letters) < 0.5 * unsafe


@pytest.mark.parametrize("memory", [{}, {"integral": 3.0, "previous_cost": -1.0}])
@pytest.mark.parametrize(("nu", "value"), [(-math.inf, 0.0), (0.0, 1.0)])
def test_a_multiplier_even_of_zero_survives_its_checkpoint(nu: float, value: float, memory: dict[str, float]) -> None:
    """With what PID control remembers, too."""
    state = MultiplierState(nu, costs=(0.0, 1.0), **memory)
    stored = to_json(PpoProgress.of(PpoTrace(0.1), state, UpdateGuard()))
    assert from_json(PpoProgress, stored).multiplier() == state
    assert state.value == value


def test_the_threshold_on_labels_is_the_unsafe_share_that_is_allowed() -> None:
    assert label_constraint(tiny("ppo.threshold_target=0.15")) == CostConstraint(pytest.approx(0.15))
    assert label_constraint(tiny("ppo.threshold=0.3")).threshold == 0.3
    with pytest.raises(ConstraintError, match="inert"):
        label_constraint(tiny("ppo.threshold=1.5"))
    with pytest.raises(ConstraintError, match="impossible"):
        label_constraint(tiny("ppo.threshold=-1"))
