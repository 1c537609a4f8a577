"""Rollout engines: prompts in, sampled answers out, behind one Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How to draw answer tokens.

    Attributes:
        temperature: 0 is greedy decoding.
        top_p: draw among the fewest most likely tokens whose probabilities reach this sum; 1 is all of them.
        top_k: draw among so many most likely tokens; 0 is all of them. Comes before top_p.
    """

    temperature: float
    max_new_tokens: int
    seed: int
    top_p: float = 1.0
    top_k: int = 0

    @property
    def truncated(self) -> bool:
        """Whether some tokens that the policy could say are never drawn."""
        return self.top_p < 1.0 or self.top_k > 0


@dataclass(frozen=True)
class Rollout:
    """Sampled answers, in the order of the prompts.

    Attributes:
        answers: ids; an answer holds at least one token and ends with EOS unless it hit the length limit.
        log_probs: of every answer token, under the distribution that it was drawn from; 0 where nothing was drawn by
            chance (temperature 0).
        exact: the policy's own distribution was drawn from, by the training weights themselves; else the trainer
            corrects for the difference.
    """

    answers: list[tuple[int, ...]]
    log_probs: list[tuple[float, ...]]
    exact: bool


class RolloutEngine(Protocol):
    """Generates answers with the current weights of the policy, which may change between two calls."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> Rollout:
        """Prompt ids -> answers in the same order; the same seed and weights give the same answers.

        Args:
            rows: answer these prompts alone, in this order, with the draws that they get among all of them.
        """
        ...

    def close(self) -> None:
        """Stop whatever the engine started."""
        ...
