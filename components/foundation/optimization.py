"""The optimiser that all training stages share."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from components.foundation.errors import DivergenceError

T = TypeVar("T")
log = logging.getLogger("saferlhf")

MAX_SKIPPED_UPDATES = 3
"""So many updates in a row may be skipped because they are not finite; one more stops training."""


def make_optimizer(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW with the paper's betas (0.9, 0.95) and no weight decay (paper appendix, training hyper-parameters)."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)


def cosine_factor(step: int, total_steps: int, warmup_share: float) -> float:
    """Learning-rate factor in (0, 1] at `step` (0-based): linear warm-up, then cosine decay to zero."""
    warmup_steps = math.ceil(warmup_share * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_step(optimizer: torch.optim.Optimizer, max_gradient_norm: float, loss: float) -> float:
    """Clip, step, clear; returns the gradient norm before clipping.

    Where the loss or the norm is not finite, parameters and moments stay as they are.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, max_gradient_norm))
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class UpdateGuard:
    """Makes the updates of a training loop, and counts those that `optimizer_step` skips.

    One bad batch costs its update and no more. A role that is beyond mending skips all of its updates: more than
    `limit` in a row, counted for each role alone, end the training.

    Attributes:
        skipped: updates of all roles so far.
    """

    def __init__(self, limit: int = MAX_SKIPPED_UPDATES) -> None:
        self._limit = limit
        self._in_a_row: dict[str, int] = {}
        self.skipped = 0

    def update(
        self, role: str, optimizer: torch.optim.Optimizer, *, loss: float, max_gradient_norm: float, step: int
    ) -> float:
        """`optimizer_step`; `step` counts from 1, for messages.

        Raises:
            DivergenceError: this update is one too many.
        """
        norm = optimizer_step(optimizer, max_gradient_norm, loss)
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row[role] = 0
            return norm
        self.skipped += 1
        self._in_a_row[role] = self._in_a_row.get(role, 0) + 1
        what = f"{role}, step {step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        if self._in_a_row[role] > self._limit:
            raise DivergenceError(
                f"{what}: not finite, and neither were the {self._limit} updates before; all of them were skipped. "
                "Look at the batch, or lower the learning rate"
            )
        log.warning("%s: not finite, update skipped (%d in a row)", what, self._in_a_row[role])
        return norm


def shuffled_batches(items: Sequence[T], batch_size: int, epochs: int, seed: int) -> Iterator[list[T]]:
    """Batches of `epochs` passes; each pass has its own order, a function of seed and pass alone."""
    for epoch in range(epochs):
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for start in range(0, len(order), batch_size):
            yield [items[i] for i in order[start : start + batch_size]]


def batch_count(items: int, batch_size: int, epochs: int) -> int:
    """How many batches `shuffled_batches` yields."""
    return epochs * math.ceil(items / batch_size)
