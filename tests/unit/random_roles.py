"""Roles with random weights: a new adapter changes nothing, so two of them could be mistaken for each other."""

from __future__ import annotations

from pathlib import Path

import torch

from components.foundation.backbone import Backbone
from components.foundation.setting_sections import LoraSettings


def save_random_role(backbone: Backbone, role: str, folder: Path, seed: int) -> None:
    """Add a scored role whose every tensor is random, and save it; it adapts the last layer alone."""
    backbone.add_role(role, LoraSettings(rank=4, alpha=8, top_layers=1), scored=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in backbone.role_tensors(role).values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    backbone.save_role(role, folder)
