"""Critics that are heads: the fit against an independent solution, and what a value may have seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.foundation.backbone import Backbone
from components.ppo_lagrangian.head_critic import FOLDS, HeadCritic, TokenSums, ridge_regression


def with_constant(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=-1)


@pytest.mark.golden
@given(st.integers(0, 10_000), st.sampled_from([1e-3, 0.5, 10.0]))
@settings(max_examples=25, deadline=None)
def test_the_fit_is_the_ridge_solution_of_a_stacked_least_squares_problem(seed: int, ridge: float) -> None:
    """Independent reference: numpy's least squares on centred data with sqrt(penalty) rows below."""
    rng = np.random.default_rng(seed)
    features, returns = rng.normal(size=(40, 6)) + rng.normal(size=6) * 5, rng.normal(size=40) * 3 - 2
    centred, gaps = features - features.mean(0), returns - returns.mean()
    penalty = ridge * (centred**2).sum(0).mean()
    stacked = np.concatenate([centred, np.sqrt(penalty) * np.eye(6)])
    expected, *_ = np.linalg.lstsq(stacked, np.concatenate([gaps, np.zeros(6)]), rcond=None)
    weights = ridge_regression(TokenSums.of(with_constant(torch.tensor(features)), torch.tensor(returns)), ridge)
    np.testing.assert_allclose(weights[:-1].numpy(), expected, rtol=1e-6, atol=1e-9)
    assert weights[-1].item() == pytest.approx(returns.mean() - features.mean(0) @ expected)


class Head:
    """As much of a backbone as a head critic sees."""

    def __init__(self, size: int) -> None:
        self.tensors = {
            "head.weight": torch.nn.Parameter(torch.zeros(1, size)),
            "head.bias": torch.nn.Parameter(torch.zeros(1)),
        }

    def role_tensors(self, role: str) -> dict[str, torch.nn.Parameter]:
        return self.tensors


def critic(head: Head, ridge: float = 0.5, memory: float = 0.9) -> HeadCritic:
    backbone: Backbone = head  # type: ignore[assignment]
    return HeadCritic(backbone, "critic", ridge, memory)


def batch(seed: int, episodes: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, returns that are mostly linear in them, mask, folds."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(episodes, 5, 3, generator=generator)
    returns = features @ torch.tensor([1.0, -2.0, 0.5]) + 4 + 0.1 * torch.randn(episodes, 5, generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (episodes, 1), generator=generator)
    return features, returns * mask, mask, torch.arange(episodes) % FOLDS


def test_a_value_has_not_seen_what_its_answer_got() -> None:
    """Other returns for one answer: its own fold's values stay to the last bit, those of other folds move."""
    features, returns, mask, folds = batch(0)
    before = critic(Head(3)).fit(features, returns, mask, folds)
    changed = returns.clone()
    changed[2] += 100 * mask[2]
    after = critic(Head(3)).fit(features, changed, mask, folds)
    own = folds == folds[2]
    torch.testing.assert_close(after[own], before[own], rtol=0, atol=1e-4)
    assert (after - before)[~own][mask[~own]].abs().min() > 0.1
    assert not before[~mask].any()


def test_what_an_answer_counts_fades_by_the_memory() -> None:
    """After a first batch and a second, the head is that of one fit in which the first counts `memory`."""
    first, second = batch(1), batch(2)
    head = Head(3)
    fitted = critic(head, ridge=0.2, memory=0.25)
    for features, returns, mask, folds in (first, second):
        fitted.fit(features, returns, mask, folds)
    rows, targets, counts = (
        torch.cat(parts).double()
        for parts in (
            [first[0][first[2]], second[0][second[2]]],
            [first[1][first[2]], second[1][second[2]]],
            [torch.full((int(first[2].sum()),), 0.25), torch.ones(int(second[2].sum()))],
        )
    )
    inputs = with_constant(rows) * counts.sqrt().unsqueeze(-1)
    expected = ridge_regression(TokenSums.of(inputs, targets * counts.sqrt()), 0.2)
    torch.testing.assert_close(head.tensors["head.weight"].detach()[0], expected[:-1].float())
    torch.testing.assert_close(head.tensors["head.bias"].detach()[0], expected[-1].float())


def test_a_second_batch_is_valued_by_what_the_first_taught() -> None:
    """One answer a fold and hardly a penalty: three answers say little, those and 64 of the batch before much."""
    alone, taught = critic(Head(3), ridge=1e-3), critic(Head(3), ridge=1e-3)
    taught.fit(*batch(3, episodes=64))
    features, returns, mask, folds = batch(4, episodes=4)
    errors = [((c.fit(features, returns, mask, folds) - returns)[mask] ** 2).mean().item() for c in (alone, taught)]
    assert errors[1] < 0.5 * errors[0]


def test_restored_it_goes_on_bit_for_bit() -> None:
    head, other = Head(3), Head(3)
    first = critic(head)
    first.fit(*batch(5))
    restored = critic(other)
    restored.load([tensor.detach().clone() for tensor in head.tensors.values()], first.moments())
    assert torch.equal(first.fit(*batch(6)), restored.fit(*batch(6)))
    assert torch.equal(head.tensors["head.weight"], other.tensors["head.weight"])
    assert critic(Head(3)).moments() == {}


def test_one_token_or_none_in_a_fold_is_enough() -> None:
    """Two answers of one token each: a value is the other answer's return, as there is nothing else to go by."""
    features, mask = torch.randn(2, 1, 3), torch.ones(2, 1, dtype=torch.bool)
    values = critic(Head(3)).fit(features, torch.tensor([[3.0], [5.0]]), mask, torch.tensor([0, 1]))
    torch.testing.assert_close(values, torch.tensor([[5.0], [3.0]]))
