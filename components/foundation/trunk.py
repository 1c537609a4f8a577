"""The frozen trunk: the layers below every adapter, computed once per batch and shared by all roles.

Where adapters sit only in the top k of N layers, the first N - k layers give every role the same hidden states.
Scoring a batch as six roles then costs (N - k) + 6 k layers instead of 6 N, and an update computes k layers.
Shapes: B sequences, L tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class FrozenTrunk:
    """Splits a model's stack of layers at `depth`, for any architecture whose layers map hidden states to the same.

    The model's own forward is always used (its embeddings, masks, rotations, final norm); the layers that shall not
    run are switched to the identity for its duration.
    """

    def __init__(self, layers: nn.ModuleList, depth: int) -> None:
        self._below, self._above = list(layers[:depth]), list(layers[depth:])

    @contextmanager
    def recording(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Within the block a forward runs the trunk alone and gives `keep` its [B, L, D] output."""

        def take(module: nn.Module, inputs: Any, output: Tensor) -> None:
            keep(output.detach())

        handle = self._below[-1].register_forward_hook(take)
        try:
            with _replaced_by(self._above, _identity):
                yield
        finally:
            handle.remove()

    @contextmanager
    def replaced(self, states: Tensor) -> Iterator[None]:
        """Within the block a forward takes the trunk's output from `states`, [B, L, D], and runs the other layers."""

        def stored(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return states

        with _replaced_by(self._below, stored):
            yield


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def _replaced_by(layers: Sequence[Any], forward: Callable[..., Tensor]) -> Iterator[None]:
    for layer in layers:
        layer.forward = forward  # hides the class's method; deleting it brings that back
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
