"""Activation checkpointing (arXiv 1604.06174): of each layer only the input is kept for the backward pass.

What the layer computes from it is computed again there, bit for bit: a third more work, and of N layers of activations
one is held at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint


@contextmanager
def computed_again_in_backward(layers: Iterable[Any]) -> Iterator[None]:
    """Within the block a forward pass keeps the inputs of these layers alone; the backward pass may come later.

    Layers whose forward has been replaced already (by a trunk's stored states) stay as they are.
    """
    wrapped = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in wrapped:
        # no layer draws random numbers: dropout is off in every role
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in wrapped:
            del layer.forward
