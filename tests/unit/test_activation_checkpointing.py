"""Layers computed again in the backward pass: the same losses and gradients, with less held in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from components.foundation.backbone import Backbone
from components.foundation.base_model import TINY_ARCHITECTURES
from components.foundation.batching import TokenSequence, collate
from components.foundation.preference_trainer import answer_scores
from components.foundation.setting_sections import LoraSettings

ADAPTERS = {
    "every layer": LoraSettings(rank=4, alpha=8),
    "the last layer": LoraSettings(rank=4, alpha=8, top_layers=1),
    "a full copy": None,
}
SEQUENCES = [TokenSequence((256, *range(10 * n, 10 * n + 3 + n)), (*range(90, 99 - n), 257)) for n in range(4)]


@dataclass(frozen=True)
class Trained:
    """A training step's forward and backward pass.

    Attributes:
        held_bytes: of tensors held for the backward pass, but for weights.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    held_bytes: int


def trained(backbone: Backbone, *, on_trunk: bool) -> Trained:
    weights = {parameter.data_ptr() for parameter in backbone.trainable_parameters("reward")}
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = collate(SEQUENCES, backbone.eos_token_id, backbone.device)
    trunk = backbone.trunk_states(batch.input_ids, batch.attention_mask) if on_trunk else None
    with backbone.role("reward", train=True):
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            states = backbone.scores("reward", batch.input_ids, batch.attention_mask, trunk)
            loss = (states[:, -batch.answer_length :] * batch.answer_mask).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in backbone.role_tensors("reward").items() if p.grad is not None}
    return Trained(loss.detach(), gradients, sum(held.values()))


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_loss_and_gradients_are_the_same_bits_and_less_is_held(
    tiny_folder: Callable[[str], Path], architecture: str, adapters: str
) -> None:
    results = []
    for again in (False, True):
        backbone = Backbone.load(tiny_folder(architecture), "float32", seed=0, checkpoints_activations=again)
        backbone.add_role("reward", ADAPTERS[adapters], scored=True)
        results.append(trained(backbone, on_trunk=adapters == "the last layer"))
    plain, again = results
    assert plain.gradients
    torch.testing.assert_close((again.loss, again.gradients), (plain.loss, plain.gradients), atol=0, rtol=0)
    assert again.held_bytes < plain.held_bytes / 2


def test_without_gradients_nothing_is_computed_again(tiny_folder: Callable[[str], Path]) -> None:
    backbone = Backbone.load(tiny_folder("llama"), "float32", seed=0, checkpoints_activations=True)
    backbone.add_role("reward", LoraSettings(rank=4, alpha=8), scored=True)
    batch = collate(SEQUENCES, backbone.eos_token_id, backbone.device)
    with backbone.role("reward"):
        expected = answer_scores(backbone, "reward", batch)
    with backbone.role("reward", train=True):
        scores = answer_scores(backbone, "reward", batch)
    assert torch.equal(scores.detach(), expected)
    assert not expected.requires_grad and scores.requires_grad
