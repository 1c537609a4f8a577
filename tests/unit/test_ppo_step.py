"""A whole step of the trainer against the formulas, written out token by token in double precision.

The reference reads one answer at a time, without padding, knows nothing of batches, and takes AdamW's steps by hand. Of
the product it uses no more than what a role says of a text: logits, scores, and its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.batching import TokenSequence
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.rollout import Rollout, Sampling
from components.foundation.setting_sections import LoraSettings
from components.ppo_lagrangian.episode import COST, COST_CRITIC, REWARD, REWARD_CRITIC
from components.ppo_lagrangian.multiplier import CostConstraint
from components.ppo_lagrangian.trainer import PpoLagrangian

LoadTiny = Callable[[str], Backbone]
ROLES = (ACTOR, REWARD, COST, REWARD_CRITIC, COST_CRITIC)
MODEL_OF = {REWARD_CRITIC: REWARD, COST_CRITIC: COST}
EOS = 257
SEQUENCES = [
    TokenSequence((256, 72, 105, 256), (79, 107, 3, EOS)),
    TokenSequence((256, 1, 2, 3, 256), (80, EOS)),
    TokenSequence((5,), (81, 20, 30, 40, 50)),  # cut off
    TokenSequence((256, 30, 256), (82, 90, EOS)),
]
DEMONSTRATION = TokenSequence((256, 90, 256), (60, 61, EOS))
CONSTRAINT = CostConstraint(threshold=0.4, floor=1.0)  # one of the answers costs less
SETTINGS = PpoSettings(
    episodes_per_step=4,
    minibatch_size=4,
    epochs=2,
    temperature=0.7,
    gamma=0.9,
    gae_lambda=0.8,
    kl_coefficient=0.3,
    clip_ratio=0.02,
    value_clip=0.01,
    score_clip=0.9,
    importance_cap=1.2,
    missing_eos_penalty=0.6,
    ptx_coefficient=0.5,
    opening_tokens=2,
    continuation_weight=0.6,
    max_gradient_norm=0.2,
    actor_learning_rate=5e-3,
    critic_learning_rate=1e-2,
    lambda_init=2.0,
    lambda_learning_rate=0.1,
)


class Reciting:
    """Gives these answers, drawn from a distribution that is not quite the policy's."""

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self._sequences = sequences

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> Rollout:
        own = [self._sequences[row] for row in (range(len(prompts)) if rows is None else rows)]
        return Rollout([s.answer for s in own], [drawn_log_probs(s) for s in own], exact=False)

    def close(self) -> None:
        """Nothing was started."""


def drawn_log_probs(sequence: TokenSequence) -> tuple[float, ...]:
    return tuple(-5.5 - 0.3 * (t + len(sequence.prompt) % 3) for t in range(len(sequence.answer)))


LoadRoles = Callable[[bool], Backbone]


@pytest.fixture
def load_roles(load_tiny: LoadTiny) -> LoadRoles:
    """Adapters, no two alike, of weights that are far from where new ones start; critics may be heads."""

    def load(heads: bool) -> Backbone:
        backbone = load_tiny("tiny-llama")
        for seed, role in enumerate(ROLES):
            if heads and role in MODEL_OF:
                backbone.add_head(role, MODEL_OF[role])
                continue
            backbone.add_role(role, LoraSettings(rank=4, alpha=8), scored=role != ACTOR)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in backbone.trainable_parameters(role):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return backbone

    return load


def token_log_probs(backbone: Backbone, sequence: TokenSequence, temperature: float) -> list[torch.Tensor]:
    """Of each answer token, in double precision. Call within a role."""
    ids = torch.tensor([[*sequence.prompt, *sequence.answer]])
    logits = backbone.answer_logits(ids, torch.ones_like(ids), len(sequence.answer))[0].double() / temperature
    return [logits[t, token] - logits[t].logsumexp(0) for t, token in enumerate(sequence.answer)]


def token_scores(backbone: Backbone, role: str, sequence: TokenSequence) -> list[torch.Tensor]:
    """Of each token of prompt and answer."""
    ids = torch.tensor([[*sequence.prompt, *sequence.answer]])
    return list(backbone.scores(role, ids, torch.ones_like(ids))[0].double())


def values_of(backbone: Backbone, critic: str, sequence: TokenSequence) -> list[torch.Tensor]:
    """Of each answer token, from the text before it."""
    return token_scores(backbone, critic, sequence)[len(sequence.prompt) - 1 : -1]


@dataclass
class Answer:
    """What the reference knows of an answer; lists have an entry a token."""

    sequence: TokenSequence
    old: list[float]
    reference: list[float]
    reward: float
    cost: float
    values: dict[str, list[float]]


def judged(backbone: Backbone, sequence: TokenSequence, heads: bool) -> Answer:
    def numbers(role: str, measure: Callable[[], list[torch.Tensor]]) -> list[float]:
        with backbone.role(role):
            return [number.item() for number in measure()]

    reward, cost = (numbers(m, lambda m=m: token_scores(backbone, m, sequence)) for m in (REWARD, COST))
    return Answer(
        sequence=sequence,
        old=numbers(ACTOR, lambda: token_log_probs(backbone, sequence, SETTINGS.temperature)),
        reference=numbers(REFERENCE, lambda: token_log_probs(backbone, sequence, SETTINGS.temperature)),
        reward=reward[-1] - (0.0 if sequence.answer[-1] == EOS else SETTINGS.missing_eos_penalty),
        cost=max(cost[-1], 1.0),
        values={} if heads else {c: numbers(c, lambda c=c: values_of(backbone, c, sequence)) for c in MODEL_OF},
    )


def shaped(answer: Answer, score: float, sign: float) -> list[float]:
    """`sign beta k_t`, and the score at the last token."""
    last, signals = len(answer.old) - 1, []
    for t, (old, reference) in enumerate(zip(answer.old, answer.reference, strict=True)):
        signal = sign * SETTINGS.kl_coefficient * (old - reference) + (score if t == last else 0.0)
        signals.append(min(max(signal, -SETTINGS.score_clip), SETTINGS.score_clip))
    return signals


def estimated(signals: list[float], values: list[float], length: int) -> tuple[list[float], list[float]]:
    """Advantages and returns of every token, by the sum over all deltas that follow; an action is `length` tokens."""
    actions = [slice(start, start + length) for start in range(0, len(signals), length)]
    rewards = [sum(signals[action]) for action in actions]
    worth = [sum(values[action]) / len(values[action]) for action in actions] + [0.0]
    gamma, decay = SETTINGS.gamma, SETTINGS.gamma * SETTINGS.gae_lambda
    deltas = [reward + gamma * worth[k + 1] - worth[k] for k, reward in enumerate(rewards)]
    advantages = [sum(decay ** (j - k) * deltas[j] for j in range(k, len(deltas))) for k in range(len(deltas))]
    of_token = [t // length for t in range(len(signals))]
    return [advantages[k] for k in of_token], [advantages[k] + worth[k] for k in of_token]


def fitted(features: torch.Tensor, returns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] and [N] -> weights and constant of ridge regression: least squares with rows for the penalty."""
    centred, size = features - features.mean(0), features.shape[1]
    penalty = SETTINGS.critic_ridge * centred.square().sum(0).mean()
    stacked = torch.cat([centred, penalty.sqrt() * torch.eye(size, dtype=torch.double)])
    goals = torch.cat([returns - returns.mean(), torch.zeros(size, dtype=torch.double)])
    weights = torch.linalg.lstsq(stacked, goals.unsqueeze(1)).solution.squeeze(1)
    return weights, returns.mean() - features.mean(0) @ weights


def fit_head(backbone: Backbone, critic: str, answers: Sequence[Answer], signals: list[list[float]]) -> None:
    """Of four answers each is a quarter: its values are a fit to the other three. The head is the fit to all."""
    with backbone.role(MODEL_OF[critic]):
        features = []
        for answer in answers:
            ids = torch.tensor([[*answer.sequence.prompt, *answer.sequence.answer]])
            hidden = backbone.hidden_states(ids, torch.ones_like(ids))[0].double()
            features.append(hidden[len(answer.sequence.prompt) - 1 : -1])
    returns = [
        torch.tensor([sum(SETTINGS.gamma ** (j - t) * s[j] for j in range(t, len(s))) for t in range(len(s))]).double()
        for s in signals
    ]
    for own, answer in enumerate(answers):
        others = [i for i in range(len(answers)) if i != own]
        weights, constant = fitted(torch.cat([features[i] for i in others]), torch.cat([returns[i] for i in others]))
        answer.values[critic] = (features[own] @ weights + constant).tolist()
    weights, constant = fitted(torch.cat(features), torch.cat(returns))
    head = backbone.role_tensors(critic)
    with torch.no_grad():
        head["head.weight"].copy_(weights.unsqueeze(0))
        head["head.bias"].copy_(constant)


class HandAdamW:
    """AdamW with betas 0.9 and 0.95 and no decay, on gradients scaled down to a norm."""

    def __init__(self, backbone: Backbone, role: str, rate: float) -> None:
        self._parameters, self._rate, self._steps = backbone.trainable_parameters(role), rate, 0
        self._first, self._second = ([torch.zeros_like(p, dtype=torch.double) for p in self._parameters] for _ in "mv")

    def step(self, loss: torch.Tensor) -> None:
        gradients = [g.double() for g in torch.autograd.grad(loss, self._parameters)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        self._steps += 1
        for parameter, gradient, m, v in zip(self._parameters, gradients, self._first, self._second, strict=True):
            scaled = gradient * min(1.0, SETTINGS.max_gradient_norm / (norm + 1e-6))
            m.mul_(0.9).add_(0.1 * scaled)
            v.mul_(0.95).add_(0.05 * scaled.square())
            mean, root = m / (1 - 0.9**self._steps), (v / (1 - 0.95**self._steps)).sqrt()
            with torch.no_grad():
                parameter.sub_((self._rate * mean / (root + 1e-8)).float())


def place(t: int) -> float:
    """What the token at this place of an answer counts for the actor."""
    return 1.0 if t < 2 else 0.6


def surrogate(
    backbone: Backbone, answers: Sequence[Answer], advantages: list[list[float]], weights: list[list[float]]
) -> tuple[torch.Tensor, int]:
    """Sum over tokens, each clipped and as often as it counts, and how many ratios were clipped."""
    total, clipped = torch.zeros((), dtype=torch.double), 0
    for answer, of_tokens, counts in zip(answers, advantages, weights, strict=True):
        now = token_log_probs(backbone, answer.sequence, SETTINGS.temperature)
        for log_prob, old, advantage, count in zip(now, answer.old, of_tokens, counts, strict=True):
            ratio = torch.exp(log_prob - old)
            kept = ratio.clamp(0.98, 1.02)
            clipped += int(kept != ratio)
            total += count * torch.minimum(ratio * advantage, kept * advantage)
    return total, clipped


def value_error(backbone: Backbone, critic: str, answers: Sequence[Answer], returns: list[list[float]]) -> torch.Tensor:
    """Half the sum over tokens of the larger squared error, of the value and of the value kept near the old one."""
    total = torch.zeros((), dtype=torch.double)
    for answer, goals in zip(answers, returns, strict=True):
        now = values_of(backbone, critic, answer.sequence)
        for value, old, goal in zip(now, answer.values[critic], goals, strict=True):
            kept = old + (value - old).clamp(-SETTINGS.value_clip, SETTINGS.value_clip)
            total += 0.5 * torch.maximum((value - goal) ** 2, (kept - goal) ** 2)
    return total


def expected_step(
    backbone: Backbone, sequences: Sequence[TokenSequence], minibatch: int, length: int, heads: bool
) -> dict[str, float]:
    """Train the backbone as a step should; returns what it should report. Every minibatch holds the first answers."""
    answers = [judged(backbone, sequence, heads) for sequence in sequences]
    signals = {
        REWARD_CRITIC: [shaped(answer, answer.reward, -1.0) for answer in answers],
        COST_CRITIC: [shaped(answer, answer.cost, +1.0) for answer in answers],
    }
    advantages, returns, losses = {}, {}, dict[str, float]()
    tokens = sum(len(answer.old) for answer in answers)
    for critic, of_answers in signals.items():
        if heads:
            fit_head(backbone, critic, answers, of_answers)
        found = [estimated(s, answer.values[critic], length) for s, answer in zip(of_answers, answers, strict=True)]
        advantages[critic], returns[critic] = ([of_answer[i] for of_answer in found] for i in range(2))
        if heads:
            goals = zip(answers, returns[critic], strict=True)
            errors = [v - g for answer, goal in goals for v, g in zip(answer.values[critic], goal, strict=True)]
            losses[f"{critic}_loss"] = sum(0.5 * error**2 for error in errors) / tokens
    pairs = zip(advantages[REWARD_CRITIC], advantages[COST_CRITIC], strict=True)
    combined = [[(r - 2.0 * c) / 3.0 for r, c in zip(reward, cost, strict=True)] for reward, cost in pairs]
    mean = sum(map(sum, combined)) / tokens
    deviation = math.sqrt(sum((a - mean) ** 2 for row in combined for a in row) / tokens + 1e-8)
    whitened = [[(a - mean) / deviation for a in row] for row in combined]
    log_ratios = [
        [old - q for old, q in zip(answer.old, drawn_log_probs(answer.sequence), strict=True)] for answer in answers
    ]
    weights = [[min(math.exp(gap), 1.2) * place(t) for t, gap in enumerate(row)] for row in log_ratios]

    some = slice(minibatch)
    tokens_of_some, clipped_tokens = sum(len(answer.old) for answer in answers[some]), 0
    weight_of_some = sum(place(t) for answer in answers[some] for t in range(len(answer.old)))
    ptx_places = [place(t) for t in range(len(DEMONSTRATION.answer))]
    critics = () if heads else tuple(MODEL_OF)
    optimizers = {role: HandAdamW(backbone, role, 5e-3 if role == ACTOR else 1e-2) for role in (ACTOR, *critics)}
    for _ in range(2 * len(answers) // minibatch):
        with backbone.role(ACTOR, train=True):
            total, clipped = surrogate(backbone, answers[some], whitened[some], weights[some])
            log_probs = token_log_probs(backbone, DEMONSTRATION, 1.0)
            ptx = -sum(p * w for p, w in zip(log_probs, ptx_places, strict=True)) / sum(ptx_places)
            optimizers[ACTOR].step(-total / weight_of_some + 0.5 * ptx)
        clipped_tokens += clipped
        losses |= {"actor_loss": -total.item() / weight_of_some, "ptx_loss": ptx.item()}
        for critic in critics:
            with backbone.role(critic, train=True):
                error = value_error(backbone, critic, answers[some], returns[critic][some])
                optimizers[critic].step(error / tokens_of_some)
            losses[f"{critic}_loss"] = error.item() / tokens_of_some
    cost = sum(answer.cost for answer in answers) / len(answers)
    return losses | {
        "multiplier": 2.0 * math.exp(0.1 * (cost - 0.4)),
        "cost": cost,
        "reward": sum(answer.reward for answer in answers) / len(answers),
        "kl": sum(sum(answer.old) - sum(answer.reference) for answer in answers) / tokens,
        "drift": sum(abs(gap) for row in log_ratios for gap in row) / tokens,
        "clip_fraction": clipped_tokens / (2 * tokens),
    }


@pytest.mark.golden
@pytest.mark.parametrize(
    ("sequences", "minibatch", "length", "heads"),
    [
        pytest.param(SEQUENCES, 4, 1, False, id="answers of all lengths in one minibatch"),
        pytest.param(SEQUENCES, 4, 2, False, id="the same, two tokens a macro action"),
        pytest.param(SEQUENCES, 4, 1, True, id="the same, critics that are heads"),
        pytest.param(SEQUENCES[:1] * 4, 2, 1, False, id="minibatches, alike whatever their order"),
    ],
)
def test_a_step_is_what_the_formulas_say_to_the_last_weight(
    load_roles: LoadRoles, sequences: Sequence[TokenSequence], minibatch: int, length: int, heads: bool
) -> None:
    """With clips that bite at scores, ratios, values, weights and gradients, two passes, and a PTX term."""
    by_hand, backbone = load_roles(heads), load_roles(heads)
    expected = expected_step(by_hand, sequences, minibatch, length, heads)
    macro = {} if length == 1 else {"macro_action": "ngram", "macro_action_length": length}
    settings = SETTINGS.model_copy(update={"minibatch_size": minibatch, **macro})
    trainer = PpoLagrangian(backbone, Reciting(sequences), settings, CONSTRAINT, 0, [DEMONSTRATION])
    metrics = trainer.step([sequence.prompt for sequence in sequences], step=0)
    assert {name: getattr(metrics, name) for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < expected["clip_fraction"] < 1
    for role in ROLES:
        state = backbone.role_state(role)
        for name, tensor in by_hand.role_state(role).items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-4)
