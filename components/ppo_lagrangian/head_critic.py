"""A critic that is a head on the hidden states by which a frozen model scores.

Its value is linear in them, so the value loss needs no gradient steps: sums over all answers of the round so far give
its minimum. After one rollout batch such a critic explains what gradient steps on the head take a round to learn.
Shapes: B episodes (of this rank), T answer tokens, D hidden size; an input is the D features and a constant 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.foundation import distributed
from components.foundation.backbone import Backbone

FOLDS = 4
"""The value of an answer comes from a fit to three quarters of its batch, and to all batches before."""


@dataclass(frozen=True)
class TokenSums:
    """Sums over answer tokens, in double precision.

    Attributes:
        inputs: [D + 1, D + 1] of x x^T, x the inputs.
        returns: [D + 1] of x g, g the return.
    """

    inputs: Tensor
    returns: Tensor

    @classmethod
    def of(cls, inputs: Tensor, returns: Tensor) -> TokenSums:
        """[N, D + 1] inputs and [N] returns of N tokens -> their sums over all ranks."""
        return cls(distributed.total(inputs.T @ inputs), distributed.total(inputs.T @ returns))

    def __add__(self, other: TokenSums) -> TokenSums:
        return TokenSums(self.inputs + other.inputs, self.returns + other.returns)

    def __sub__(self, other: TokenSums) -> TokenSums:
        return TokenSums(self.inputs - other.inputs, self.returns - other.returns)

    def __mul__(self, factor: float) -> TokenSums:
        return TokenSums(self.inputs * factor, self.returns * factor)


def ridge_regression(sums: TokenSums, ridge: float) -> Tensor:
    """Weights [D + 1], the constant's last, that minimise the mean squared error + penalty x the squared weights.

    The penalty is `ridge` x the mean squared deviation of a feature from its mean; the constant is free.
    """
    count = sums.inputs[-1, -1]
    means, mean_return = sums.inputs[-1, :-1] / count, sums.returns[-1] / count
    deviations = sums.inputs[:-1, :-1] - count * torch.outer(means, means)
    products = sums.returns[:-1] - count * means * mean_return
    penalty = (ridge * deviations.diagonal().mean()).clamp(min=1e-6)
    weights = torch.linalg.solve(deviations + penalty * torch.eye(len(means), dtype=means.dtype).to(means), products)
    return torch.cat([weights, (mean_return - means @ weights).unsqueeze(0)])


class HeadCritic:
    """Fits a role's head by ridge regression on the returns of the round's answers, the older the less."""

    def __init__(self, backbone: Backbone, role: str, ridge: float, memory: float) -> None:
        """`memory` is what an answer counts a step later, relative to what it counted before."""
        self._head = backbone.role_tensors(role)
        self._ridge = ridge
        self._memory = memory
        self._sums: TokenSums | None = None

    def fit(self, features: Tensor, returns: Tensor, mask: Tensor, folds: Tensor) -> Tensor:
        """Learn from a rollout batch -> [B, T] values of its tokens, each by a fit that has not seen its answer.

        A value that knew what the answer went on to get would take the advantage away with the noise.

        Args:
            features: [B, T, D] before each answer token.
            returns, mask: [B, T].
            folds: [B] in [0, FOLDS); answers of one fold are left out together.
        """
        inputs = torch.cat([features.double(), torch.ones_like(features[..., :1], dtype=torch.double)], dim=-1)
        chosen = [mask.bool() & (folds == fold).to(mask.device).unsqueeze(-1) for fold in range(FOLDS)]
        parts = [TokenSums.of(inputs[tokens], returns[tokens].double()) for tokens in chosen]
        known = sum(parts[1:], start=parts[0])
        if self._sums is not None:
            known = known + self._sums * self._memory
        values = torch.zeros_like(returns)
        for tokens, part in zip(chosen, parts, strict=True):
            values[tokens] = (inputs[tokens] @ ridge_regression(known - part, self._ridge)).to(values.dtype)
        self._keep(known)
        return values

    def _keep(self, sums: TokenSums) -> None:
        self._sums = sums
        weights = ridge_regression(sums, self._ridge).float()
        with torch.no_grad():
            self._head["head.weight"].copy_(weights[:-1].unsqueeze(0))
            self._head["head.bias"].copy_(weights[-1:])

    def moments(self) -> dict[str, Tensor]:
        """The sums; empty before the first batch."""
        return {} if self._sums is None else {"inputs": self._sums.inputs, "returns": self._sums.returns}

    def load(self, parameters: Sequence[Tensor], moments: Mapping[str, Tensor]) -> None:
        """Bring back the head, and what `moments` returned."""
        with torch.no_grad():
            for own, stored in zip(self._head.values(), parameters, strict=True):
                own.copy_(stored)
        kept = {name: moment.to(self._head["head.weight"].device) for name, moment in moments.items()}
        self._sums = TokenSums(kept["inputs"], kept["returns"]) if kept else None
        size = self._head["head.weight"].shape[1] + 1
        if self._sums and (self._sums.inputs.shape, self._sums.returns.shape) != ((size, size), (size,)):
            raise ValueError(f"the sums of a critic are of {size} inputs")
