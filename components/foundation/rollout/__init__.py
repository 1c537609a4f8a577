"""Rollout engines: prompts in, sampled answers out, behind one Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How to draw answer tokens. Temperature 0 is greedy decoding."""

    temperature: float
    max_new_tokens: int
    seed: int


class RolloutEngine(Protocol):
    """Generates answers with the current weights of the policy."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> list[tuple[int, ...]]:
        """Prompt ids -> answer ids in the same order; an answer ends with EOS unless it hit the length limit.

        Args:
            rows: answer these prompts alone, in this order, with the draws that they get among all of them.
        """
        ...
