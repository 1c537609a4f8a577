"""The frozen trunk: what every role shares is computed once, and nobody can tell from the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.base_model import TINY_ARCHITECTURES
from components.foundation.batching import SequenceBatch, TokenSequence, collate
from components.foundation.preference_trainer import answer_scores
from components.foundation.setting_sections import LoraSettings
from components.foundation.trunk import FrozenTrunk

LoadTiny = Callable[[str], Backbone]
TOP = LoraSettings(rank=4, alpha=8, top_layers=1)
ALL = LoraSettings(rank=4, alpha=8)
SEQUENCES = [
    TokenSequence(prompt=(256, 72, 105, 256), answer=(79, 107, 257)),
    TokenSequence(prompt=(256, 1, 2, 3, 4, 5, 6, 7, 8, 9, 256), answer=(10, 257)),
    TokenSequence(prompt=(5,), answer=(200, 199, 198, 197, 196, 195, 194)),
]
ROLES = (REFERENCE, "actor", "reward")

every_architecture = pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)


def with_roles(backbone: Backbone, **lora_of_role: LoraSettings) -> Backbone:
    """Adapters that differ strongly from the base and from each other; all roles but the actor score."""
    for seed, (role, lora) in enumerate(lora_of_role.items()):
        backbone.add_role(role, lora, scored=role != "actor")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in backbone.trainable_parameters(role):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return backbone


def on_trunk(backbone: Backbone) -> tuple[SequenceBatch, SequenceBatch]:
    """The same batch without and with the trunk's output."""
    plain = collate(SEQUENCES, backbone.eos_token_id, backbone.device)
    trunk = backbone.trunk_states(plain.input_ids, plain.attention_mask)
    assert trunk is not None
    return plain, replace(plain, trunk=trunk)


def hidden_states(backbone: Backbone, batch: SequenceBatch) -> Tensor:
    return backbone.hidden_states(batch.input_ids, batch.attention_mask, batch.trunk)


def answer_logits(backbone: Backbone, batch: SequenceBatch) -> Tensor:
    return backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length, batch.trunk)


@every_architecture
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("compute", [hidden_states, answer_logits])
def test_outputs_are_the_same_bit_for_bit(
    load_tiny: LoadTiny, architecture: str, role: str, compute: Callable[[Backbone, SequenceBatch], Tensor]
) -> None:
    backbone = with_roles(load_tiny(architecture), actor=TOP, reward=TOP)
    plain, shared = on_trunk(backbone)
    with backbone.role(role):
        assert torch.equal(compute(backbone, shared), compute(backbone, plain))


@every_architecture
def test_scores_are_the_same_bit_for_bit(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = with_roles(load_tiny(architecture), actor=TOP, reward=TOP)
    plain, shared = on_trunk(backbone)
    with backbone.role("reward"):
        assert torch.equal(
            backbone.scores("reward", shared.input_ids, shared.attention_mask, shared.trunk),
            backbone.scores("reward", plain.input_ids, plain.attention_mask),
        )


@every_architecture
@pytest.mark.parametrize("role", ["actor", "reward"])
def test_gradients_are_the_same_bit_for_bit(load_tiny: LoadTiny, architecture: str, role: str) -> None:
    backbone = with_roles(load_tiny(architecture), actor=TOP, reward=TOP)

    def gradients(batch: SequenceBatch) -> list[Tensor]:
        with backbone.role(role, train=True):
            outputs = answer_logits(backbone, batch) if role == "actor" else answer_scores(backbone, role, batch)
            return list(torch.autograd.grad(outputs.square().mean(), backbone.trainable_parameters(role)))

    without, with_trunk = (gradients(batch) for batch in on_trunk(backbone))
    assert all(gradient.any() for gradient in without)
    assert all(torch.equal(a, b) for a, b in zip(without, with_trunk, strict=True))


@every_architecture
def test_the_trunk_is_taken_from_what_is_given(load_tiny: LoadTiny, architecture: str) -> None:
    """Or the comparisons above would hold for a trunk that is computed anew each time."""
    backbone = with_roles(load_tiny(architecture), actor=TOP)
    _, shared = on_trunk(backbone)
    assert shared.trunk is not None
    with backbone.role("actor"):
        changed = hidden_states(backbone, replace(shared, trunk=shared.trunk.flip(-1)))
        assert not torch.equal(changed, hidden_states(backbone, shared))


@every_architecture
def test_the_trunk_is_the_output_of_the_layers_below_every_adapter(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = with_roles(load_tiny(architecture), actor=TOP)
    plain, shared = on_trunk(backbone)
    outputs: list[Tensor] = []
    handle = layers_of(backbone)[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with backbone.role("actor"):
        hidden_states(backbone, plain)
    handle.remove()
    assert shared.trunk is not None
    assert not shared.trunk.requires_grad
    assert torch.equal(shared.trunk, outputs[0])


@every_architecture
def test_a_trunk_does_not_depend_on_the_role(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = with_roles(load_tiny(architecture), actor=TOP, reward=TOP)
    trunks: list[Any] = [on_trunk(backbone)[1].trunk]
    for role in ROLES:
        with backbone.role(role):
            trunks.append(on_trunk(backbone)[1].trunk)
    assert all(torch.equal(trunk, trunks[0]) for trunk in trunks)


@pytest.mark.parametrize("roles", [{}, {"actor": ALL}, {"actor": TOP, "reward": ALL}], ids=["none", "one", "mixed"])
def test_nothing_is_shared_where_a_role_adapts_every_layer(load_tiny: LoadTiny, roles: dict[str, LoraSettings]) -> None:
    backbone = with_roles(load_tiny("llama"), **roles)
    batch = collate(SEQUENCES, backbone.eos_token_id, backbone.device)
    assert backbone.trunk_states(batch.input_ids, batch.attention_mask) is None
    with backbone.role(REFERENCE):
        hidden_states(backbone, replace(batch, trunk=None))


def test_rows_take_their_share_of_the_trunk(load_tiny: LoadTiny) -> None:
    backbone = with_roles(load_tiny("llama"), reward=TOP)
    plain, shared = on_trunk(backbone)
    rows = torch.tensor([2, 0], device=backbone.device)
    picked = shared.rows(rows)
    assert picked.trunk is not None
    assert shared.trunk is not None
    content = picked.attention_mask.bool()
    assert torch.equal(picked.trunk[content], shared.trunk[rows][shared.attention_mask[rows].bool()])
    assert plain.rows(rows).trunk is None
    with backbone.role("reward"):
        expected = answer_scores(backbone, "reward", plain)[rows]
        torch.testing.assert_close(answer_scores(backbone, "reward", picked), expected, atol=1e-5, rtol=0)


def layers_of(backbone: Backbone) -> nn.ModuleList:
    return backbone._layers


def is_untouched(layer: Any) -> bool:
    return "forward" not in vars(layer) and not layer._forward_hooks


@every_architecture
def test_layers_run_as_before_afterwards(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = with_roles(load_tiny(architecture), actor=TOP)
    with backbone.role("actor"):
        before = hidden_states(backbone, collate(SEQUENCES, backbone.eos_token_id, backbone.device))
        plain, shared = on_trunk(backbone)
        hidden_states(backbone, shared)
        assert all(is_untouched(layer) for layer in layers_of(backbone))
        assert torch.equal(hidden_states(backbone, plain), before)


@pytest.mark.fault
@pytest.mark.parametrize("block", ["recording", "replaced"])
def test_layers_run_as_before_after_an_error(load_tiny: LoadTiny, block: str) -> None:
    layers = layers_of(load_tiny("llama"))
    trunk = FrozenTrunk(layers, depth=1)
    switched = trunk.recording(lambda states: None) if block == "recording" else trunk.replaced(torch.zeros(1, 1, 32))
    with pytest.raises(KeyError), switched:
        assert not all(is_untouched(layer) for layer in layers)
        raise KeyError
    assert all(is_untouched(layer) for layer in layers)


@pytest.mark.fault
def test_a_batch_that_does_not_fit_the_trunk_leaves_the_model_whole(load_tiny: LoadTiny) -> None:
    backbone = with_roles(load_tiny("llama"), actor=TOP)
    plain, shared = on_trunk(backbone)
    assert shared.trunk is not None
    with backbone.role("actor"):
        before = hidden_states(backbone, plain)
        with pytest.raises(RuntimeError):
            hidden_states(backbone, replace(shared, trunk=shared.trunk[:, :-1]))
        assert torch.equal(hidden_states(backbone, plain), before)
