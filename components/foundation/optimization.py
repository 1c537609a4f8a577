"""The optimiser that all training stages share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW with the paper's betas (0.9, 0.95) and no weight decay (paper appendix, training hyper-parameters)."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)


def cosine_factor(step: int, total_steps: int, warmup_share: float) -> float:
    """Learning-rate factor in (0, 1] at `step` (0-based): linear warm-up, then cosine decay to zero."""
    warmup_steps = math.ceil(warmup_share * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def trapezoid_factor(step: int, total_steps: int, warmup_share: float) -> float:
    """Learning-rate factor in (0, 1] at `step` (0-based): linear warm-up, a plateau, and a linear decay from 1 to 1 / n
    over the last n = total_steps // 4 steps (warm-up, stable, decay: arXiv 2404.06395)."""
    warmup_steps = max(1, math.ceil(warmup_share * total_steps))
    decay_steps = max(1, total_steps // 4)
    return min((step + 1) / warmup_steps, 1.0, (total_steps - step) / decay_steps)


_BATCHES_SORTED_TOGETHER = 8
"""More save little padding, and make the batches of a pass less like random ones."""


def shuffled_batches(
    items: Sequence[T], batch_size: int, epochs: int, seed: int, length: Callable[[T], int]
) -> Iterator[list[T]]:
    """Batches of `epochs` passes; each pass has its own order, a function of seed and pass alone.

    Eight batches of a shuffled pass are sorted by `length` together and come in an order of chance: rows of a batch
    are of like length, so that little of it is padding, and what a batch holds still changes from pass to pass.
    """
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(items), generator=generator).tolist()
        for window in _parts(order, batch_size * _BATCHES_SORTED_TOGETHER):
            batches = _parts(sorted(window, key=lambda i: length(items[i])), batch_size)
            for turn in torch.randperm(len(batches), generator=generator).tolist():
                yield [items[i] for i in batches[turn]]


def _parts(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def batch_count(items: int, batch_size: int, epochs: int) -> int:
    """How many batches `shuffled_batches` yields."""
    return epochs * math.ceil(items / batch_size)
