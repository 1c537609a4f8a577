"""The mathematics of PPO-Lagrangian (Safe RLHF, arXiv 2310.12773, section 3.3) as pure functions of tensors.

Shapes: B episodes, T answer tokens. `mask` is [B, T], True for answer tokens; masked entries contribute nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def aggregate_cost(scores: Tensor, floor: float | None) -> Tensor:
    """[B] cost scores -> [B] costs whose mean is constrained.

    Without a floor, as they are (paper equation 9). With one, max(C, floor): an answer that is safe enough already
    earns nothing by being safer, and cannot pay for an unsafe one (RePO, arXiv 2410.19933, has the floor at 0).
    """
    return scores if floor is None else scores.clamp(min=floor)


def shape_rewards(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    score: Tensor,
    mask: Tensor,
    *,
    kl_coefficient: float,
    kl_sign: float,
    clip: float,
) -> Tensor:
    """Per-token rewards or costs: the KL term at every token, the score at the last one.

    `r_t = -beta k_t (+ R at the last token)` with kl_sign=-1, `c_t = +beta k_t (+ C at the last token)` with
    kl_sign=+1, where `k_t = log pi - log pi_ref`. With these signs the combined objective
    `(r - lambda c) / (1 + lambda)` carries beta exactly once, whatever lambda is.

    Args:
        log_probs, reference_log_probs: [B, T].
        score: [B] score of the whole answer.
        clip: results are clamped to [-clip, clip].

    Returns:
        [B, T], zero outside the mask.
    """
    shaped = kl_sign * kl_coefficient * (log_probs - reference_log_probs)
    last = (mask.long().sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    at_last = torch.zeros_like(shaped).scatter_(-1, last, 1.0)
    shaped = shaped + at_last * score.unsqueeze(-1)
    return shaped.clamp(-clip, clip) * mask


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) -> ([B, T] advantages, [B, T] returns).

    The value after the last answer token is 0: the episode ends there.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * gae_lambda * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """[B, T] discounted sum of the rewards from each token on, which a value before that token estimates."""
    return generalized_advantages(rewards, torch.zeros_like(rewards), mask, gamma=gamma, gae_lambda=1.0)[1]


def ngram_actions(mask: Tensor, length: int) -> Tensor:
    """[B, T] -> [B, T] number of each token's macro action: runs of `length` tokens, counted from the first."""
    return (torch.arange(mask.shape[1], device=mask.device) // length).expand_as(mask)


def perplexity_actions(log_probs: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> [B, T] number of each token's macro action, which goes on while its perplexity does not rise.

    A token that would raise the mean negative log-probability of the macro action begins the next one
    (MA-RLHF, arXiv 2410.02743, perplexity-based termination).
    """
    actions = torch.zeros_like(mask, dtype=torch.long)
    surprise = -log_probs.double()
    for row in range(mask.shape[0]):
        action, total, count = 0, 0.0, 0
        for t in range(mask.shape[1]):
            now = float(surprise[row, t])
            if count and now > total / count:
                action, total, count = action + 1, 0.0, 0
            actions[row, t] = action
            total, count = total + now, count + 1
    return actions


def macro_action_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, actions: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """GAE in which a macro action is one step (MA-RLHF, arXiv 2410.02743) -> ([B, T] advantages, [B, T] returns).

    A macro action's reward is the sum of its tokens' rewards and its value the mean of their values. Every token gets
    the advantage and the return of its macro action. With one token each, it is `generalized_advantages`, bit for bit.

    Args:
        actions: [B, T] number of the macro action of each token, 0 at the first and never falling.
    """
    shape = (mask.shape[0], int(actions.max()) + 1)

    def total(per_token: Tensor) -> Tensor:
        return torch.zeros(shape, dtype=values.dtype, device=values.device).scatter_add(1, actions, per_token)

    lengths = total(mask.to(values.dtype))
    advantages, returns = generalized_advantages(
        total(rewards * mask),
        total(values * mask) / lengths.clamp(min=1),
        lengths > 0,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    return advantages.gather(1, actions) * mask, returns.gather(1, actions) * mask


def combine_advantages(reward_advantages: Tensor, cost_advantages: Tensor, multiplier: float) -> Tensor:
    """`(A_r - lambda A_c) / (1 + lambda)` (paper equation 10 with the code's normalisation)."""
    return (reward_advantages - multiplier * cost_advantages) / (1.0 + multiplier)


def whiten(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = lambda own: own) -> Tensor:
    """Zero mean and unit variance over the masked-in entries; zero elsewhere.

    Args:
        total: own sum -> the sum over all parts of the batch, where others hold parts of it.
    """
    count = total(mask.sum()).clamp(min=1)
    mean = total((values * mask).sum()) / count
    variance = total(((values - mean).square() * mask).sum()) / count
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def rollout_drift(log_probs: Tensor, drawn_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Scalar: mean over answer tokens of |log pi - log q|, in nats; [B, T] each, q what the engine drew from."""
    return ((log_probs - drawn_log_probs).abs() * mask).sum() / mask.sum().clamp(min=1)


def importance_weights(log_probs: Tensor, drawn_log_probs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """Truncated importance weights `min(pi / q, cap)` -> [B, T], 1 outside the mask (arXiv 0806.2810, per token).

    Tokens were drawn from the engine's q, and the surrogate is an expectation under the trainer's pi. The cap bounds
    the variance; what it cuts off is a bias.

    Args:
        log_probs, drawn_log_probs: [B, T] log pi and log q of the drawn tokens.
    """
    return torch.exp((log_probs - drawn_log_probs) * mask).clamp(max=cap)


def position_weights(length: int, opening: int, continuation_weight: float) -> Tensor:
    """[T] what the tokens of an answer count: 1 in its opening, less after it.

    Whether an answer helps or declines is decided in its first few tokens. All later ones carry the same advantage but
    little of the choice, so that with equal weights most of the update is their noise.
    """
    return torch.where(torch.arange(length) < opening, 1.0, continuation_weight)


def total_weight(lengths: Tensor, opening: int, continuation_weight: float) -> float:
    """[B] answer tokens (at least 1 each) -> the sum of their `position_weights`."""
    sums = position_weights(int(lengths.max()), opening, continuation_weight).double().cumsum(0)
    return float(sums[lengths - 1].sum())


def actor_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio: float,
    total_tokens: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (arXiv 1707.06347), summed over tokens and divided by `total_tokens`.

    `total_tokens` counts the answer tokens of the *whole* optimiser batch, by their `position_weights`, so the sum of
    the losses of its micro-batches is the same however the episodes fall into them.

    Args:
        weights: [B, T] or [T] importance weights of the tokens times their position weights; None where both are 1.

    Returns:
        (scalar loss, number of tokens whose ratio was clipped).
    """
    ratio = torch.exp((log_probs - old_log_probs) * mask)
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if weights is not None:
        surrogate = surrogate * weights
    clipped_tokens = (((ratio - 1).abs() > clip_ratio) & mask.bool()).sum()
    return -(surrogate * mask).sum() / total_tokens, clipped_tokens


def critic_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, value_clip: float, total_tokens: int
) -> Tensor:
    """Clipped value loss: half the larger of the two squared errors, weighted by tokens like `actor_loss`."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (error * mask).sum() / total_tokens
