"""The mathematics of PPO-Lagrangian against slow references written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.foundation.errors import ConstraintError
from components.ppo_lagrangian.multiplier import MultiplierState, choose_threshold, update_multiplier
from components.ppo_lagrangian.objective import (
    actor_loss,
    aggregate_cost,
    combine_advantages,
    critic_loss,
    generalized_advantages,
    importance_weights,
    macro_action_advantages,
    ngram_actions,
    perplexity_actions,
    rollout_drift,
    shape_rewards,
    whiten,
)

LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=5)


def mask_of(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(max(lengths), 1)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)


def random_like(mask: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(lengths=LENGTHS, gamma=st.floats(0.5, 1.0), lam=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_gae_equals_the_double_sum(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, written as the sum and not as the recursion."""
    mask = mask_of(lengths)
    rewards, values = random_like(mask, seed) * mask, random_like(mask, seed + 1)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    for b, length in enumerate(lengths):
        for t in range(mask.shape[1]):
            expected = 0.0
            for k in range(t, length):
                following = values[b, k + 1].item() if k + 1 < length else 0.0
                delta = rewards[b, k].item() + gamma * following - values[b, k].item()
                expected += (gamma * lam) ** (k - t) * delta
            assert advantages[b, t].item() == pytest.approx(expected if t < length else 0.0, abs=1e-9)
            if t < length:
                assert returns[b, t].item() == pytest.approx(expected + values[b, t].item(), abs=1e-9)


@pytest.mark.golden
def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.8: deltas 1 + 0.5 - 0.5, 0 + 0.75 - 1 and 2 - 1.5, each later one counting 0.4 times."""
    mask = torch.tensor([[True, True, True, False]])
    rewards, values = torch.tensor([[1.0, 0.0, 2.0, 9.0]]), torch.tensor([[0.5, 1.0, 1.5, 9.0]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, gae_lambda=0.8)
    torch.testing.assert_close(advantages, torch.tensor([[0.98, -0.05, 0.5, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.48, 0.95, 2.0, 0.0]]))


@given(lengths=LENGTHS, gamma=st.floats(0.5, 1.0), lam=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_macro_actions_of_one_token_are_token_ppo_bit_for_bit(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    mask = mask_of(lengths)
    rewards, values = random_like(mask, seed).float() * mask, random_like(mask, seed + 1).float() * mask
    plain = generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    macro = macro_action_advantages(rewards, values, mask, ngram_actions(mask, 1), gamma=gamma, gae_lambda=lam)
    for expected, found in zip(plain, macro, strict=True):
        assert torch.equal(found, expected * mask)


@given(
    lengths=LENGTHS,
    breaks=st.lists(st.booleans(), min_size=7, max_size=7),
    gamma=st.floats(0.5, 1.0),
    lam=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_macro_actions_equal_gae_over_segments_in_plain_loops(
    lengths: list[int], breaks: list[bool], gamma: float, lam: float, seed: int
) -> None:
    mask = mask_of(lengths)
    width = mask.shape[1]
    rewards, values = random_like(mask, seed) * mask, random_like(mask, seed + 1) * mask
    numbers = [sum(breaks[1 : t + 1]) for t in range(width)]
    actions = torch.tensor([numbers] * len(lengths))
    advantages, returns = macro_action_advantages(rewards, values, mask, actions, gamma=gamma, gae_lambda=lam)
    for b, length in enumerate(lengths):
        segments = [[t for t in range(length) if numbers[t] == k] for k in range(numbers[-1] + 1)]
        segments = [segment for segment in segments if segment]
        reward = [sum(rewards[b, t].item() for t in segment) for segment in segments]
        value = [sum(values[b, t].item() for t in segment) / len(segment) for segment in segments]
        for k, segment in enumerate(segments):
            expected = 0.0
            for later in range(k, len(segments)):
                following = value[later + 1] if later + 1 < len(segments) else 0.0
                expected += (gamma * lam) ** (later - k) * (reward[later] + gamma * following - value[later])
            for t in segment:
                assert advantages[b, t].item() == pytest.approx(expected, abs=1e-9)
                assert returns[b, t].item() == pytest.approx(expected + value[k], abs=1e-9)
        assert not advantages[b, length:].any()


@pytest.mark.golden
def test_macro_actions_by_hand() -> None:
    """Pairs of tokens; and surprises 2, 1, 3, 3, 1: the mean falls to 1.5, 3 would raise it; 3 and 1 do not raise 3."""
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert ngram_actions(mask, 2).tolist() == [[0, 0, 1, 1, 2]]
    surprise = torch.tensor([[2.0, 1.0, 3.0, 3.0, 1.0]])
    assert perplexity_actions(-surprise, mask).tolist() == [[0, 0, 1, 1, 1]]


@pytest.mark.golden
def test_macro_action_advantages_by_hand() -> None:
    """Pairs of tokens and a last one alone: rewards 3, 1, 3, values 2, 1, 2, hence deltas 1.5, 1, 1."""
    mask = torch.tensor([[True, True, True, True, True, False]])
    rewards = torch.tensor([[1.0, 2.0, 0.0, 1.0, 3.0, 9.0]])
    values = torch.tensor([[1.0, 3.0, 0.0, 2.0, 2.0, 9.0]])
    pairs = ngram_actions(mask, 2)
    advantages, returns = macro_action_advantages(rewards, values, mask, pairs, gamma=0.5, gae_lambda=0.8)
    torch.testing.assert_close(advantages, torch.tensor([[2.06, 2.06, 1.4, 1.4, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[4.06, 4.06, 2.4, 2.4, 3.0, 0.0]]))


@pytest.mark.golden
def test_combined_advantages_by_hand() -> None:
    """(3 - 2 * 1) / 3 and (-1 - 2 * 2) / 3; without a multiplier, the reward's alone."""
    reward, cost = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(combine_advantages(reward, cost, 2.0), torch.tensor([[1 / 3, -5 / 3]]))
    assert torch.equal(combine_advantages(reward, cost, 0.0), reward)


@given(lengths=LENGTHS, multiplier=st.floats(0.0, 50.0), beta=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_combined_objective_carries_beta_once(lengths: list[int], multiplier: float, beta: float, seed: int) -> None:
    """(r - lambda c) / (1 + lambda) has -beta k_t at every token, for every lambda."""
    mask = mask_of(lengths)
    log_probs, reference = random_like(mask, seed), random_like(mask, seed + 1)
    zero = torch.zeros(len(lengths), dtype=torch.float64)
    shaped = [
        shape_rewards(log_probs, reference, zero, mask, kl_coefficient=beta, kl_sign=sign, clip=50.0)
        for sign in (-1.0, +1.0)
    ]
    combined = combine_advantages(shaped[0], shaped[1], multiplier)
    torch.testing.assert_close(combined, -beta * (log_probs - reference) * mask)


@pytest.mark.golden
def test_shaping_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]])
    reference = torch.tensor([[-1.5, -1.0, -9.0]])
    mask = torch.tensor([[True, True, False]])
    rewards = shape_rewards(
        log_probs, reference, torch.tensor([2.0]), mask, kl_coefficient=0.1, kl_sign=-1.0, clip=50.0
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 2.1, 0.0]]))
    clamped = shape_rewards(
        log_probs, reference, torch.tensor([99.0]), mask, kl_coefficient=0.1, kl_sign=1.0, clip=50.0
    )
    torch.testing.assert_close(clamped, torch.tensor([[0.05, 50.0, 0.0]]))


@given(lengths=LENGTHS, sign=st.sampled_from([-1.0, 1.0]), clip=st.floats(0.1, 3.0), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_shaping_equals_a_loop_over_tokens(lengths: list[int], sign: float, clip: float, seed: int) -> None:
    mask = mask_of(lengths)
    log_probs, reference = random_like(mask, seed), random_like(mask, seed + 1)
    scores = 2 * random_like(mask, seed + 2)[:, 0]
    shaped = shape_rewards(log_probs, reference, scores, mask, kl_coefficient=0.3, kl_sign=sign, clip=clip)
    for b, length in enumerate(lengths):
        for t in range(mask.shape[1]):
            expected = sign * 0.3 * (log_probs[b, t].item() - reference[b, t].item())
            if t == length - 1:
                expected += scores[b].item()
            expected = min(max(expected, -clip), clip) if t < length else 0.0
            assert shaped[b, t].item() == pytest.approx(expected, abs=1e-9)


@given(lengths=LENGTHS, scale=st.sampled_from([1e-4, 1.0, 30.0]), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_whitening_equals_a_loop_over_tokens(lengths: list[int], scale: float, seed: int) -> None:
    """The variance is divided by the number of tokens, and 1e-8 is added to it."""
    mask = mask_of(lengths)
    values = 2.0 + scale * random_like(mask, seed)
    tokens = [values[b, t].item() for b, length in enumerate(lengths) for t in range(length)]
    mean = sum(tokens) / max(len(tokens), 1)
    variance = sum((token - mean) ** 2 for token in tokens) / max(len(tokens), 1)
    whitened = whiten(values, mask)
    expected = [(token - mean) / math.sqrt(variance + 1e-8) for token in tokens]
    assert whitened[mask].tolist() == pytest.approx(expected, abs=1e-8)
    assert not whitened[~mask].any()


@pytest.mark.golden
def test_actor_loss_by_hand() -> None:
    """Ratio 2 with A = +1 is clipped to 1.2; ratio 0.5 with A = -1 to 0.8; ratio 2 with A = -1 is not."""
    log_ratio = torch.tensor([[math.log(2), math.log(0.5), math.log(2), 5.0]])
    advantages = torch.tensor([[1.0, -1.0, -1.0, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss, clipped = actor_loss(log_ratio, torch.zeros(1, 4), advantages, mask, clip_ratio=0.2, total_tokens=3)
    assert loss.item() == pytest.approx(-(1.2 - 0.8 - 2.0) / 3, abs=1e-6)
    assert int(clipped) == 3


@given(lengths=LENGTHS, clip=st.floats(0.05, 2.0), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_critic_loss_equals_a_loop_over_tokens(lengths: list[int], clip: float, seed: int) -> None:
    """1/2 max((V - G)^2, (V kept within c of V_old - G)^2), summed over tokens and divided by their stated number."""
    mask = mask_of(lengths)
    new, old, target = (random_like(mask, seed + i) for i in range(3))
    loss = critic_loss(new, old, target, mask, value_clip=clip, total_tokens=10)
    expected = 0.0
    for b, length in enumerate(lengths):
        for t in range(length):
            value, before, goal = new[b, t].item(), old[b, t].item(), target[b, t].item()
            kept = min(max(value, before - clip), before + clip)
            expected += 0.5 * max((value - goal) ** 2, (kept - goal) ** 2) / 10
    assert loss.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.golden
def test_critic_loss_by_hand() -> None:
    """Squared errors of V, and of V kept within 0.5 of V_old: 1 and 0.25, 0 and 2.25, 0 and 0.25."""
    values, old = torch.tensor([[2.0, 2.0, -2.0, 9.0]]), torch.tensor([[0.0, 0.0, -1.0, 0.0]])
    returns, mask = torch.tensor([[1.0, 2.0, -2.0, 0.0]]), torch.tensor([[True, True, True, False]])
    loss = critic_loss(values, old, returns, mask, value_clip=0.5, total_tokens=3)
    assert loss.item() == pytest.approx(0.5 * (1.0 + 2.25 + 0.25) / 3)


@given(lengths=st.lists(st.integers(1, 6), min_size=4, max_size=4), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_losses_do_not_depend_on_micro_batches(lengths: list[int], seed: int) -> None:
    mask = mask_of(lengths)
    new, old, target = (random_like(mask, seed + i) for i in range(3))
    tokens = int(mask.sum())
    whole_actor, _ = actor_loss(new, old, target, mask, clip_ratio=0.2, total_tokens=tokens)
    whole_critic = critic_loss(new, old, target, mask, value_clip=0.5, total_tokens=tokens)
    rows = [slice(0, 1), slice(1, 4)]
    parts_actor = sum(
        actor_loss(new[r], old[r], target[r], mask[r], clip_ratio=0.2, total_tokens=tokens)[0] for r in rows
    )
    parts_critic = sum(
        critic_loss(new[r], old[r], target[r], mask[r], value_clip=0.5, total_tokens=tokens) for r in rows
    )
    torch.testing.assert_close(whole_actor, parts_actor)
    torch.testing.assert_close(whole_critic, parts_critic)


@pytest.mark.fault
@pytest.mark.parametrize("lengths", [[0, 3, 2], [0, 0]])
def test_row_25_fully_masked_rows_leave_losses_and_gradients_as_they_are_without_them(lengths: list[int]) -> None:
    """Also where what stands under the mask is huge; and of a part that is nothing but such rows, as a rank may be
    given, loss and gradient are 0."""
    mask = mask_of(lengths)
    full = torch.tensor(lengths) > 0
    new, old, target = (random_like(mask, seed) for seed in range(3))
    for values in (old, target):
        values[~full] = 1e100
    actor, critic = {"clip_ratio": 0.2, "total_tokens": 5}, {"value_clip": 0.5, "total_tokens": 5}
    for loss_of in (lambda *t: actor_loss(*t, **actor)[0], lambda *t: critic_loss(*t, **critic)):
        rows = new.clone().requires_grad_()
        loss = loss_of(rows, old, target, mask)
        loss.backward()
        assert rows.grad is not None
        assert (rows.grad[~full] == 0).all() and torch.isfinite(loss)
        alone = new[full].clone().requires_grad_()
        expected = loss_of(alone, old[full], target[full], mask[full])
        expected.backward()
        torch.testing.assert_close(loss.detach(), expected.detach())
        torch.testing.assert_close(rows.grad[full], alone.grad)


def test_row_25_fully_masked_rows_contribute_nothing() -> None:
    mask = mask_of([0, 3])
    values = random_like(mask, 0)
    advantages, _ = generalized_advantages(values, values, mask, gamma=1.0, gae_lambda=0.95)
    assert torch.isfinite(advantages).all()
    assert (advantages[0] == 0).all()
    whitened = whiten(values, mask)
    assert (whitened[0] == 0).all()
    assert whitened[1].mean().item() == pytest.approx(0.0, abs=1e-9)
    assert whitened[1].square().mean().item() == pytest.approx(1.0, abs=1e-6)


def updated(state: MultiplierState, cost: float, **changes: float) -> MultiplierState:
    options = {"threshold": 0.0, "learning_rate": 0.5, "floor": 0.1, "ceiling": 10.0} | changes
    return update_multiplier(state, [cost] * 4, window=8, **options)  # type: ignore[arg-type]


@pytest.mark.golden
def test_multiplier_step_by_hand() -> None:
    state = updated(MultiplierState(nu=0.0), cost=2.0)
    assert state.value == pytest.approx(math.exp(0.5 * 2.0))
    state = updated(state, cost=-6.0)
    assert state.cost_moving_average == pytest.approx(-2.0)
    assert state.value == pytest.approx(math.exp(1.0 - 0.5 * 2.0))


@given(costs=st.lists(st.floats(-5, 5), min_size=1, max_size=20), start=st.floats(-2, 2))
@settings(deadline=None)
def test_multiplier_follows_the_violation_within_its_bounds(costs: list[float], start: float) -> None:
    state = MultiplierState(nu=start)
    for cost in costs:
        following = updated(state, cost)
        violation = following.cost_moving_average
        assert 0.1 - 1e-12 <= following.value <= 10.0 + 1e-9
        if 0.1 < state.value < 10.0 and abs(violation) > 1e-9:
            assert (following.value > state.value) == (violation > 0)
        state = following


@pytest.mark.fault
def test_multiplier_refuses_costs_that_are_not_finite() -> None:
    with pytest.raises(ConstraintError, match="finite"):
        updated(MultiplierState(nu=0.0), cost=math.nan)


def test_threshold_is_calibrated_between_the_means() -> None:
    assert choose_threshold(None, -6.0, 2.0, target=0.25) == pytest.approx(-4.0)
    assert choose_threshold(0.5, -6.0, 2.0, target=0.25) == 0.5


@pytest.mark.fault
@pytest.mark.parametrize(
    ("requested", "safe", "unsafe", "word"),
    [(3.0, -6.0, 2.0, "inert"), (-7.0, -6.0, 2.0, "impossible"), (None, 2.0, -6.0, "inverted")],
)
def test_useless_thresholds_are_refused(requested: float | None, safe: float, unsafe: float, word: str) -> None:
    with pytest.raises(ConstraintError, match=word):
        choose_threshold(requested, safe, unsafe, target=0.1)


@pytest.mark.golden
def test_costs_count_from_their_floor_up() -> None:
    scores = torch.tensor([-3.0, 0.0, 2.0])
    assert aggregate_cost(scores, None).tolist() == [-3.0, 0.0, 2.0]
    assert aggregate_cost(scores, 0.0).tolist() == [0.0, 0.0, 2.0]
    assert aggregate_cost(scores, -1.0).tolist() == [-1.0, 0.0, 2.0]
    # the safe answer pays for the unsafe one in the first mean only
    assert aggregate_cost(scores, None).mean() < 0 < aggregate_cost(scores, 0.0).mean()


@given(lengths=LENGTHS, cap=st.floats(1.0, 5.0), clip=st.floats(0.05, 0.5), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_weighted_surrogate_and_drift_equal_a_loop_over_tokens(
    lengths: list[int], cap: float, clip: float, seed: int
) -> None:
    """Each token counts min(pi_old / q, cap) times; where nothing is drawn, nothing counts."""
    mask = mask_of(lengths)
    old, drawn, new, advantages = (random_like(mask, seed + i) for i in range(4))
    weights = importance_weights(old, drawn, mask, cap=cap)
    loss, _ = actor_loss(new, old, advantages, mask, clip_ratio=clip, total_tokens=10, weights=weights)
    expected, drift, count = 0.0, 0.0, 0
    for b, length in enumerate(lengths):
        for t in range(length):
            weight = min(math.exp(old[b, t].item() - drawn[b, t].item()), cap)
            assert weights[b, t].item() == pytest.approx(weight)
            ratio, advantage = math.exp(new[b, t].item() - old[b, t].item()), advantages[b, t].item()
            expected -= weight * min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage) / 10
            drift += abs(old[b, t].item() - drawn[b, t].item())
            count += 1
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert rollout_drift(old, drawn, mask).item() == pytest.approx(drift / max(count, 1), abs=1e-9)
    assert (weights[~mask] == 1).all()


@pytest.mark.golden
def test_importance_weights_by_hand() -> None:
    """Half as likely, as likely, three times as likely for the trainer as for the engine; the cap is 2."""
    log_probs = torch.tensor([[0.1, 0.4, 0.6, 0.5]]).log()
    drawn = torch.tensor([[0.2, 0.4, 0.2, 0.1]]).log()
    mask = torch.tensor([[True, True, True, False]])
    weights = importance_weights(log_probs, drawn, mask, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 1.0, 2.0, 1.0]]))
    assert rollout_drift(log_probs, drawn, mask).item() == pytest.approx((math.log(2) + math.log(3)) / 3)
    equal = importance_weights(log_probs, log_probs.clone(), mask, cap=2.0)
    assert torch.equal(equal, torch.ones(1, 4))


def test_weights_get_no_gradient() -> None:
    """They are constants: the derivative of the loss is that of the surrogate, weight by weight."""
    mask = mask_of([3])
    old, drawn, advantages = (random_like(mask, i) for i in range(3))
    weights = importance_weights(old, drawn, mask, cap=2.0)
    new = old.clone().requires_grad_()
    loss, _ = actor_loss(new, old, advantages, mask, clip_ratio=0.2, total_tokens=3, weights=weights)
    loss.backward()
    torch.testing.assert_close(new.grad, -weights * advantages / 3)
