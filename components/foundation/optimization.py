"""The optimiser that all training stages share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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


def shuffled_batches(items: Sequence[T], batch_size: int, epochs: int, seed: int) -> Iterator[list[T]]:
    """Batches of `epochs` passes; each pass has its own order, a function of seed and pass alone."""
    for epoch in range(epochs):
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for start in range(0, len(order), batch_size):
            yield [items[i] for i in order[start : start + batch_size]]


def batch_count(items: int, batch_size: int, epochs: int) -> int:
    """How many batches `shuffled_batches` yields."""
    return epochs * math.ceil(items / batch_size)
