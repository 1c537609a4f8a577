"""Which episodes of a rollout batch are this rank's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Minibatch:
    """What this rank has of a minibatch.

    Attributes:
        rows: rows of this rank's episodes; one of no account where it has none, so that all ranks take part.
        counts: 1, or 0 where this rank has none.
        places: [rows of the minibatch] places in the rollout batch, over all ranks.
        lengths: [rows of the minibatch] answer tokens of each of its episodes, over all ranks.
    """

    rows: Tensor
    counts: float
    places: Tensor
    lengths: Tensor

    @property
    def tokens(self) -> int:
        """Answer tokens of the minibatch, over all ranks."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Share:
    """This rank's episodes of a rollout batch.

    Attributes:
        places: [B] of its episodes in the rollout batch, in rising order.
        tokens: [episodes of all ranks] answer tokens of each.
    """

    places: Tensor
    tokens: Tensor

    def minibatch(self, places: Tensor) -> Minibatch:
        rows = {place: row for row, place in enumerate(self.places.tolist())}
        own = [rows[place] for place in places.tolist() if place in rows]
        return Minibatch(torch.tensor(own or [0]), float(bool(own)), places, self.tokens[places])
