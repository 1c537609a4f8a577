"""Where a causal language model keeps its layers and their linear maps, for any architecture."""

from __future__ import annotations

from typing import Any

from torch import nn

from components.foundation.errors import ModelError


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """(full name, layers) of the stack of transformer layers, first layer first, for any architecture."""
    depth = int(model.config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ModelError(f"{type(model).__name__} has no list of {depth} layers to put adapters on")


def linear_names(layer: nn.Module, layer_name: str) -> list[str]:
    """Full names of a layer's linear maps, as they are before any adapter wraps them."""
    from transformers.pytorch_utils import Conv1D

    return [f"{layer_name}.{name}" for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)]


def has_transposed_maps(model: nn.Module) -> bool:
    """Whether the linear maps are GPT-2's, whose weights are stored as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())
