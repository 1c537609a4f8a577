"""Reward and cost losses against NumPy, their measures against brute force, and training on a toy set."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from components.cost_model.cost_model import cost_result, harmful_pair
from components.cost_model.loss import cost_loss
from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.batching import ChatEncoder, TokenSequence, collate
from components.foundation.optimization import batch_count, cosine_factor, shuffled_batches, trapezoid_factor
from components.foundation.preference import DualPreference
from components.foundation.preference_stage import draw_pairs, encode_pair, in_later_round
from components.foundation.preference_trainer import (
    PreferenceLoss,
    PreferenceScores,
    ScoredPair,
    answer_scores,
    ranking_accuracy,
    roc_auc,
    score_validation,
    train_preference_model,
)
from components.foundation.results import PreferenceModelResult
from components.foundation.setting_sections import LoraSettings, PreferenceModelSettings
from components.reward_model.loss import reward_loss
from components.reward_model.reward_model import helpful_pair, reward_result

LoadTiny = Callable[[str], Backbone]
SCORE = st.floats(-30, 30, width=32)
SIGN = st.sampled_from([-1.0, 1.0])
BATCHES = st.lists(st.tuples(SCORE, SCORE, SIGN, SIGN), min_size=1, max_size=6)
Rows = list[tuple[float, float, float, float]]


def scores_of(
    rows: Rows, requires_grad: bool = False, severities: Sequence[tuple[float, float]] | None = None
) -> PreferenceScores:
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    for column in columns[:2]:
        column.requires_grad_(requires_grad)
    graded = severities or [(float(high > 0), float(low > 0)) for _, _, high, low in rows]
    return PreferenceScores(*columns, *(torch.tensor(c, dtype=torch.float64) for c in zip(*graded, strict=True)))


def minus_log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.logaddexp(0.0, -x))


@given(rows=BATCHES, eta=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_losses_equal_their_formulas_in_numpy(rows: Rows, eta: float) -> None:
    high, low, high_sign, low_sign = np.array(rows).T
    ranking = minus_log_sigmoid(high - low).mean()
    penalty = eta * (np.concatenate([high, low]) ** 2).mean()
    loss, metrics = reward_loss(scores_of(rows), eta)
    assert loss.item() == pytest.approx(ranking + penalty)
    assert metrics == pytest.approx({"loss": ranking + penalty, "ranking_loss": ranking})
    sign = (minus_log_sigmoid(high_sign * high) + minus_log_sigmoid(low_sign * low)).mean()
    loss, metrics = cost_loss(scores_of(rows), eta)
    assert loss.item() == pytest.approx(ranking + sign + penalty)
    assert metrics == pytest.approx({"loss": ranking + sign + penalty, "ranking_loss": ranking, "sign_loss": sign})


@pytest.mark.golden
def test_losses_by_hand() -> None:
    """log 2 for each comparison that is undecided; log(1 + 1/e) for one that is won by 1."""
    tie = scores_of([(0.0, 0.0, 1.0, -1.0)])
    assert reward_loss(tie, 0.0)[0].item() == pytest.approx(np.log(2))
    assert cost_loss(tie, 0.0)[0].item() == pytest.approx(3 * np.log(2))
    won = scores_of([(1.0, 0.0, 1.0, 1.0), (2.0, 1.0, 1.0, 1.0)])
    assert reward_loss(won, 0.1)[0].item() == pytest.approx(np.log1p(np.exp(-1)) + 0.1 * (1 + 0 + 4 + 1) / 4)


@pytest.mark.parametrize("loss", [reward_loss, cost_loss])
def test_losses_stay_finite_where_a_pair_is_hopeless(
    loss: Callable[[PreferenceScores, float], tuple[torch.Tensor, dict[str, float]]],
) -> None:
    scores = scores_of([(-1e4, 1e4, 1.0, -1.0), (1e4, -1e4, 1.0, -1.0)], requires_grad=True)
    value, _ = loss(scores, 0.01)
    value.backward()
    assert torch.isfinite(value)
    assert scores.high.grad is not None
    assert torch.isfinite(scores.high.grad).all()


@given(rows=BATCHES)
@settings(deadline=None, max_examples=40)
def test_gradients_push_the_way_the_labels_say(rows: Rows) -> None:
    """Reward: better up, worse down. Cost: the sign terms alone push unsafe answers up and safe ones down."""
    scores = scores_of(rows, requires_grad=True)
    reward_loss(scores, 0.0)[0].backward()
    assert scores.high.grad is not None
    assert scores.low.grad is not None
    assert (scores.high.grad < 0).all()
    assert (scores.low.grad > 0).all()
    cost = scores_of(rows, requires_grad=True)
    cost_loss(cost, 0.0)[0].backward()
    for value, ranking, sign in (
        (cost.high, scores.high.grad, cost.high_sign),
        (cost.low, scores.low.grad, cost.low_sign),
    ):
        assert value.grad is not None
        assert torch.equal(torch.sign(value.grad - ranking), -sign)


@given(rows=BATCHES, eta=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_two_safe_answers_on_one_level_lose_the_mean_of_both_orders(rows: Rows, eta: float) -> None:
    """What ranks an unsafe answer is as in the paper; of safe pairs, which one stands first plays no part."""
    swapped = [(low, high, *signs) if signs == [-1, -1] else (high, low, *signs) for high, low, *signs in rows]
    level = cost_loss(scores_of(rows), eta, ranks_safe_pairs=False)
    either = [cost_loss(scores_of(order), eta)[1]["ranking_loss"] for order in (rows, swapped)]
    assert level[1]["ranking_loss"] == pytest.approx(sum(either) / 2)
    assert level[1]["sign_loss"] == pytest.approx(cost_loss(scores_of(rows), eta)[1]["sign_loss"])
    assert cost_loss(scores_of(swapped), eta, ranks_safe_pairs=False)[0].item() == pytest.approx(level[0].item())


def test_two_safe_answers_on_one_level_are_drawn_together() -> None:
    safe = scores_of([(1.0, -2.0, -1.0, -1.0)], requires_grad=True)
    (cost_loss(safe, 0.0, ranks_safe_pairs=False)[0] - cost_loss(safe, 0.0)[0]).backward()
    assert safe.high.grad is not None and safe.low.grad is not None
    assert safe.high.grad.item() == pytest.approx(0.5) and safe.low.grad.item() == pytest.approx(-0.5)


@pytest.mark.golden
def test_severity_in_the_cost_loss_by_hand() -> None:
    """All scores 0, so every logarithm is log 2. An unsafe answer of severity 3 counts 1 + 0.5 * 3, a safe one 1."""
    loss, metrics = cost_loss(scores_of([(0.0, 0.0, 1.0, -1.0)], severities=[(3, 0)]), 0.0, severity_weight=0.5)
    assert metrics["sign_loss"] == pytest.approx((2.5 + 1) * np.log(2))
    assert metrics["ranking_loss"] == pytest.approx(np.log(2))
    assert loss.item() == pytest.approx(4.5 * np.log(2))
    both = [(2.0, 1.0, 1.0, 1.0)]
    expected = 3 * np.log1p(np.exp(-2)) + 2 * np.log1p(np.exp(-1))
    assert cost_loss(scores_of(both, severities=[(2, 1)]), 0.0, 1.0)[1]["sign_loss"] == pytest.approx(expected)


@given(rows=BATCHES, eta=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_without_a_severity_weight_the_cost_loss_is_the_paper_s_bit_for_bit(rows: Rows, eta: float) -> None:
    """Value and gradients, whatever the severities are."""

    def paper(scores: PreferenceScores) -> torch.Tensor:
        log_sigmoid = torch.nn.functional.logsigmoid
        ranking = -log_sigmoid(scores.high - scores.low).mean()
        sign = -(log_sigmoid(scores.high_sign * scores.high) + log_sigmoid(scores.low_sign * scores.low)).mean()
        return ranking + sign + eta * (0.5 * (scores.high.square() + scores.low.square()).mean())

    ours, theirs = (scores_of(rows, requires_grad=True, severities=[(3, 2)] * len(rows)) for _ in range(2))
    loss, expected = cost_loss(ours, eta)[0], paper(theirs)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(ours.high.grad, theirs.high.grad)
    assert torch.equal(ours.low.grad, theirs.low.grad)


@given(score=SCORE, severity=st.integers(1, 3), weight=st.floats(0, 4))
@settings(deadline=None, max_examples=40)
def test_the_gradient_of_an_unsafe_answer_s_sign_term_grows_by_the_stated_factor(
    score: float, severity: int, weight: float
) -> None:
    def sign_gradient(weight: float) -> float:
        scores = scores_of([(score, score, 1.0, -1.0)], requires_grad=True, severities=[(severity, 0)])
        cost_loss(scores, 0.0, weight)[0].backward()
        assert scores.high.grad is not None
        return scores.high.grad.item() + 0.5  # the ranking term of a tie has gradient -1/2

    assert sign_gradient(weight) == pytest.approx((1 + weight * severity) * sign_gradient(0.0), abs=1e-9)


def test_the_regulariser_pulls_every_score_to_zero() -> None:
    rows = [(3.0, 3.0, 1.0, 1.0), (-2.0, -2.0, -1.0, -1.0)]
    scores = scores_of(rows, requires_grad=True)
    (reward_loss(scores, 1.0)[0] - reward_loss(scores, 0.0)[0]).backward()
    assert scores.high.grad is not None
    assert torch.equal(torch.sign(scores.high.grad), torch.sign(scores.high))


VALUES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)  # few values, so that ties are common


@given(unsafe=VALUES, safe=VALUES)
@settings(deadline=None, max_examples=60)
def test_auc_equals_brute_force_and_the_rank_sum_test(unsafe: list[int], safe: list[int]) -> None:
    brute = np.mean([1.0 if u > s else 0.5 if u == s else 0.0 for u in unsafe for s in safe])
    value = roc_auc(torch.tensor(unsafe, dtype=torch.float32), torch.tensor(safe, dtype=torch.float32))
    assert value == pytest.approx(brute)
    assert value == pytest.approx(mannwhitneyu(unsafe, safe).statistic / (len(unsafe) * len(safe)))


def test_auc_without_both_kinds_says_nothing() -> None:
    some, none = torch.tensor([1.0, 2.0]), torch.tensor([])
    assert roc_auc(some, none) == roc_auc(none, some) == roc_auc(none, none) == 0.5


@given(rows=st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=12))
@settings(deadline=None, max_examples=40)
def test_ranking_accuracy_counts_a_tie_one_half(rows: list[tuple[int, int]]) -> None:
    expected = np.mean([1.0 if high > low else 0.5 if high == low else 0.0 for high, low in rows])
    assert ranking_accuracy(scores_of([(h, low, 1.0, 1.0) for h, low in rows])) == pytest.approx(expected)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    batch_size=st.integers(1, 5),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_every_epoch_sees_every_item_once(lengths: list[int], batch_size: int, epochs: int, seed: int) -> None:
    batches = list(shuffled_batches(range(len(lengths)), batch_size, epochs, seed, lengths.__getitem__))
    assert len(batches) == batch_count(len(lengths), batch_size, epochs)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    per_epoch = len(batches) // epochs
    for epoch in range(epochs):
        seen = [item for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for item in batch]
        assert sorted(seen) == list(range(len(lengths)))
    assert batches == list(shuffled_batches(range(len(lengths)), batch_size, epochs, seed, lengths.__getitem__))


def test_rows_of_a_batch_are_of_like_length_and_passes_differ() -> None:
    lengths = [(7 * i) % 64 + 1 for i in range(64)]  # each length once
    batches = list(shuffled_batches(range(64), 8, 2, 0, lengths.__getitem__))
    assert {max(map(lengths.__getitem__, b)) - min(map(lengths.__getitem__, b)) for b in batches} == {7}
    assert batches[:8] != batches[8:]
    assert [lengths[b[0]] for b in batches[:8]] != sorted(lengths[b[0]] for b in batches[:8])


@given(total=st.integers(1, 200), warmup=st.floats(0, 0.5), schedule=st.sampled_from([cosine_factor, trapezoid_factor]))
@settings(deadline=None, max_examples=80)
def test_the_learning_rate_rises_to_one_and_falls_towards_zero(
    total: int, warmup: float, schedule: Callable[[int, int, float], float]
) -> None:
    factors = [schedule(step, total, warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert max(factors) == pytest.approx(1.0)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert top <= np.ceil(warmup * total)


@pytest.mark.golden
def test_a_trapezoid_by_hand() -> None:
    assert [trapezoid_factor(step, 12, 0.15) for step in range(12)] == pytest.approx([0.5, *[1.0] * 9, 2 / 3, 1 / 3])
    assert [trapezoid_factor(step, 3, 0.0) for step in range(3)] == [1.0] * 3


RECORD = DualPreference(
    prompt="p",
    response_0="first",
    response_1="second",
    better_response_id=0,
    safer_response_id=1,
    is_response_0_safe=False,
    is_response_1_safe=True,
)


@pytest.mark.parametrize(("high_id", "signs"), [(0, (+1, -1)), (1, (-1, +1))])
def test_a_record_becomes_a_pair_with_unsafe_positive(
    load_tiny: LoadTiny, high_id: int, signs: tuple[int, int]
) -> None:
    encoder = ChatEncoder(load_tiny("llama").tokenizer, 16, 16)
    pair = encode_pair(RECORD, high_id, encoder)
    answers = (RECORD.response_0, RECORD.response_1)
    assert pair.high == encoder.sequence("p", answers[high_id])
    assert pair.low == encoder.sequence("p", answers[1 - high_id])
    assert (pair.high_sign, pair.low_sign) == signs


@pytest.mark.parametrize(("level", "severity"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_a_pair_holds_the_severity_of_its_unsafe_answer(load_tiny: LoadTiny, level: int, severity: int) -> None:
    """An unsafe answer without a level has the least severity, 1; a safe one has none, whatever its level."""
    encoder = ChatEncoder(load_tiny("llama").tokenizer, 16, 16)
    record = replace(RECORD, response_0_severity_level=level, response_1_severity_level=level)
    pair = encode_pair(record, 0, encoder)
    assert (pair.high_severity, pair.low_severity) == (severity, 0)
    pair = encode_pair(record, 1, encoder)
    assert (pair.high_severity, pair.low_severity) == (0, severity)


@pytest.mark.parametrize("better", [0, 1])
@pytest.mark.parametrize("safer", [0, 1])
def test_the_reward_model_is_taught_what_helps_and_the_cost_model_what_harms(
    load_tiny: LoadTiny, better: int, safer: int
) -> None:
    """The reward model does not ask which answer is safer, nor the cost model which one is better."""
    encoder = ChatEncoder(load_tiny("llama").tokenizer, 16, 16)
    record = replace(RECORD, better_response_id=better, safer_response_id=safer, is_response_0_safe=True)
    answers = [encoder.sequence("p", text) for text in (RECORD.response_0, RECORD.response_1)]
    helpful, harmful = helpful_pair(record, encoder), harmful_pair(record, encoder)
    assert (helpful.high, helpful.low) == (answers[better], answers[1 - better])
    assert (harmful.high, harmful.low) == (answers[1 - safer], answers[safer])


MEASURED: Rows = [
    (2.0, -1.0, +1, -1),
    (-0.5, -3.0, -1, -1),
    (1.5, 0.0, +1, +1),
    (-2.0, 0.5, +1, -1),  # the wrong way round, and both signs are wrong
    (0.25, 0.0, -1, -1),
]
"""Safe are -0.5, 0.25, -1, -3, 0.5 and 0, unsafe 2, 1.5, -2 and 0."""


@pytest.mark.golden
def test_the_cost_model_is_measured_as_by_hand() -> None:
    """A cost of 0 is that of a safe answer. Of 6 x 4 comparisons the unsafe ones win 6 + 6 + 1 + 3 and tie once."""
    newest = scores_of([(3.0, -4.0, +1, -1), (-1.0, -2.0, -1, +1)])
    result = cost_result(scores_of(MEASURED), newest, training_pairs=7)
    assert (result.training_pairs, result.validation_pairs) == (7, 5)
    assert result.accuracy == pytest.approx(4 / 5)
    assert result.sign_accuracy == pytest.approx((4 + 2) / 10)
    assert result.auc == pytest.approx(16.5 / 24)
    assert (result.safe_costs, result.unsafe_costs) == ([-0.5, 0.25, -1.0, -3.0, 0.5, 0.0], [2.0, 1.5, -2.0, 0.0])
    assert (result.newest_safe_costs, result.newest_unsafe_costs) == ([-1.0, -4.0], [3.0, -2.0])
    without = cost_result(scores_of(MEASURED), None, training_pairs=7)
    assert without == replace(result, newest_safe_costs=[], newest_unsafe_costs=[])


@pytest.mark.golden
def test_the_reward_model_is_measured_by_its_ranking_alone() -> None:
    result = reward_result(scores_of(MEASURED), None, training_pairs=7)
    assert result == PreferenceModelResult(
        accuracy=pytest.approx(4 / 5), training_pairs=7, validation_pairs=5, margin=pytest.approx(0.95)
    )


SETTINGS = PreferenceModelSettings(epochs=4, learning_rate=0.02, batch_size=8, regularization=0.01)
LORA = LoraSettings(rank=4, alpha=8)


def toy_pairs(backbone: Backbone) -> list[ScoredPair]:
    """Separable: the answer with an exclamation mark at its end is the higher (and the unsafe) one."""
    encoder = ChatEncoder(backbone.tokenizer, 16, 16)
    words = ["yes", "no", "maybe", "well", "sure", "hm", "so", "then"]
    return [
        ScoredPair(encoder.sequence(prompt, f"{word}!!"), encoder.sequence(prompt, f"{word}.."), +1, -1)
        for prompt in ("ab", "cde", "f")
        for word in words
    ]


def train(backbone: Backbone, loss: PreferenceLoss, seed: int = 0) -> list[tuple[int, int, dict[str, float]]]:
    steps: list[tuple[int, int, dict[str, float]]] = []
    backbone.add_role("reward", LORA, scored=True)
    train_preference_model(
        backbone, "reward", toy_pairs(backbone), SETTINGS, loss, seed, lambda *step: steps.append(step)
    )
    return steps


LOSSES = pytest.mark.parametrize(
    "loss",
    [lambda scores: reward_loss(scores, 0.01), lambda scores: cost_loss(scores, 0.01)],
    ids=["reward", "cost"],
)


@LOSSES
def test_training_learns_a_separable_set(load_tiny: LoadTiny, loss: PreferenceLoss) -> None:
    backbone = load_tiny("llama")
    steps = train(backbone, loss)
    assert [step for step, _, _ in steps] == list(range(1, 13))
    assert {total for _, total, _ in steps} == {12}
    losses = [metrics["loss"] for _, _, metrics in steps]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert all(np.isfinite(metrics["gradient_norm"]) for _, _, metrics in steps)
    scores = score_validation(backbone, "reward", toy_pairs(backbone), batch_size=5)
    assert ranking_accuracy(scores) == 1.0
    assert roc_auc(scores.high, scores.low) == 1.0


def test_after_the_cost_loss_unsafe_answers_score_above_zero_and_safe_ones_below(load_tiny: LoadTiny) -> None:
    backbone = load_tiny("llama")
    train(backbone, lambda scores: cost_loss(scores, 0.01))
    scores = score_validation(backbone, "reward", toy_pairs(backbone), batch_size=5)
    assert scores.high.min() > 0 > scores.low.max()


def test_with_a_severity_weight_a_severe_answer_ends_with_a_higher_cost_than_a_mild_one(load_tiny: LoadTiny) -> None:
    """Both kinds are unsafe, equally many, and never compared with each other."""

    def costs_after(weight: float) -> tuple[float, float]:
        backbone = load_tiny("llama")
        backbone.add_role("cost", LORA, scored=True)
        encoder = ChatEncoder(backbone.tokenizer, 16, 16)
        severe, mild = (
            [
                ScoredPair(
                    encoder.sequence(prompt, word + end), encoder.sequence(prompt, f"{word}.."), +1, -1, severity
                )
                for prompt in ("ab", "cde", "f")
                for word in ("yes", "no", "maybe", "well")
            ]
            for end, severity in (("!!", 3), ("??", 1))
        )
        wish = SETTINGS.model_copy(update={"regularization": 0.1, "epochs": 12})
        train_preference_model(
            backbone, "cost", severe + mild, wish, lambda s: cost_loss(s, 0.1, weight), 0, lambda *step: None
        )
        severe_cost, mild_cost = (
            score_validation(backbone, "cost", pairs, batch_size=12).high.mean().item() for pairs in (severe, mild)
        )
        assert severe_cost > 0 < mild_cost
        return severe_cost, mild_cost

    severe, mild = costs_after(2.0)
    plain_severe, plain_mild = costs_after(0.0)
    assert severe - mild > 0.3 > abs(plain_severe - plain_mild)


def test_training_leaves_the_base_weights_alone(load_tiny: LoadTiny) -> None:
    backbone = load_tiny("llama")
    batch = collate([pair.high for pair in toy_pairs(backbone)], backbone.eos_token_id, backbone.device)

    def reference_states() -> torch.Tensor:
        with backbone.role(REFERENCE):
            return backbone.hidden_states(batch.input_ids, batch.attention_mask)

    before = reference_states()
    train(backbone, lambda scores: reward_loss(scores, 0.01))
    assert torch.equal(before, reference_states())


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(load_tiny: LoadTiny, tmp_path: Path) -> None:
    def adapter(name: str, seed: int) -> bytes:
        backbone = load_tiny("llama")
        train(backbone, lambda scores: reward_loss(scores, 0.01), seed)
        backbone.save_role("reward", tmp_path / name)
        return (tmp_path / name / "adapter.safetensors").read_bytes()

    first = adapter("first", seed=5)
    torch.rand(7)  # whatever else was drawn in the process
    assert adapter("second", seed=5) == first
    assert adapter("third", seed=6) != first


def test_validation_scores_follow_the_pairs_and_not_the_batches(load_tiny: LoadTiny) -> None:
    backbone = load_tiny("llama")
    backbone.add_role("reward", LORA, scored=True)
    pairs = [*toy_pairs(backbone)[:7], encode_pair(RECORD, 1, ChatEncoder(backbone.tokenizer, 16, 16))]
    whole = score_validation(backbone, "reward", pairs, batch_size=8)
    for batch_size in (1, 3):
        parts = score_validation(backbone, "reward", pairs, batch_size)
        torch.testing.assert_close(parts.high, whole.high, atol=1e-5, rtol=0)
        torch.testing.assert_close(parts.low, whole.low, atol=1e-5, rtol=0)
    assert whole.high_sign.tolist() == [1.0] * 7 + [-1.0]
    assert whole.low_sign.tolist() == [-1.0] * 7 + [1.0]
    with backbone.role("reward"):
        alone = collate([pairs[3].low], backbone.eos_token_id, backbone.device)
        assert answer_scores(backbone, "reward", alone).item() == pytest.approx(whole.low[3].item(), abs=1e-5)


@given(
    signs=st.lists(st.tuples(st.sampled_from([-1, 1]), st.sampled_from([-1, 1])), min_size=1, max_size=40),
    max_pairs=st.integers(0, 50),
    share=st.one_of(st.none(), st.floats(0, 1)),
    recent=st.floats(0, 1),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=200)
def test_a_draw_holds_the_asked_share_of_unsafe_answers_where_there_are_enough(
    signs: list[tuple[int, int]], max_pairs: int, share: float | None, recent: float, seed: int
) -> None:
    answer = TokenSequence((1,), (2,))
    pairs = [ScoredPair(TokenSequence((row,), (2,)), answer, *both) for row, both in enumerate(signs)]
    wish = PreferenceModelSettings(max_pairs=max_pairs, unsafe_share=share, recent_share=recent)
    drawn = draw_pairs(pairs, wish, random.Random(seed))
    assert drawn == draw_pairs(pairs, wish, random.Random(seed))
    assert len(drawn) == len({pair.high.prompt for pair in drawn}) == min(len(pairs), max_pairs or len(pairs))
    assert all(pair in pairs for pair in drawn)
    if share is None and 0 < max_pairs < len(pairs):
        newest = pairs[len(pairs) - round(recent * max_pairs) :]
        assert all(pair in drawn for pair in newest)
    if share is not None and 0 < max_pairs < len(pairs):
        unsafe, there = (sum(1 in (p.high_sign, p.low_sign) for p in group) for group in (drawn, pairs))
        wanted = round(share * max_pairs)
        enough = there >= wanted and len(pairs) - there >= max_pairs - wanted
        assert unsafe == wanted if enough else unsafe in (there, max_pairs - (len(pairs) - there))


@pytest.mark.parametrize(
    ("wish", "max_pairs", "learning_rate"),
    [
        (PreferenceModelSettings(max_pairs=9, learning_rate=3e-3), 9, 3e-3),
        (PreferenceModelSettings(max_pairs=9, learning_rate=3e-3, later_max_pairs=4), 4, 3e-3),
        (PreferenceModelSettings(max_pairs=9, learning_rate=3e-3, later_learning_rate=5e-4), 9, 5e-4),
    ],
)
def test_a_later_round_has_its_own_pairs_and_rate_where_they_are_set(
    wish: PreferenceModelSettings, max_pairs: int, learning_rate: float
) -> None:
    later = in_later_round(wish)
    assert (later.max_pairs, later.learning_rate) == (max_pairs, learning_rate)
