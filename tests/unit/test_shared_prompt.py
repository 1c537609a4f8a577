"""Two answers in one row: nobody can tell from the scores, and models that would tell get rows of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from components.foundation import backbone as backbone_module
from components.foundation.backbone import REFERENCE, Backbone, position_ids
from components.foundation.base_model import TINY_ARCHITECTURES
from components.foundation.batching import SequenceBatch, TokenSequence, collate
from components.foundation.preference_trainer import answer_scores, pair_batch, scores_of_pairs
from components.foundation.setting_sections import LoraSettings
from components.foundation.shared_prompt import (
    AnswerPair,
    PairBatch,
    branch_attention,
    branch_positions,
    collate_pairs,
    respects_branches,
)

LoadTiny = Callable[[str], Backbone]
EOS = 257
CPU = torch.device("cpu")

every_architecture = pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)


def pair(prompt: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]) -> AnswerPair:
    return TokenSequence(prompt, (*first, EOS)), TokenSequence(prompt, (*second, EOS))


PAIRS = [
    pair((256, 72, 105, 256), (79, 107), (200, 199, 198, 197, 196)),
    pair((256, 1, 2, 3, 4, 5, 6, 7, 8, 9, 256), (10,), ()),
    pair((5,), (1, 1, 1), (1, 1, 1)),
    pair((9, 8, 7), (60, 61, 62, 63, 64, 65, 66), (70,)),
]


def with_reward(backbone: Backbone, top_layers: int = 0, *, reads_prompt: bool = False) -> Backbone:
    """A reward model that differs strongly from the base."""
    lora = LoraSettings(rank=4, alpha=8, top_layers=top_layers)
    backbone.add_role("reward", lora, scored=True, reads_prompt=reads_prompt)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.trainable_parameters("reward"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return backbone


def scores_alone(backbone: Backbone, pairs: list[AnswerPair]) -> Tensor:
    """[B, 2]: each answer in a batch of its own, without padding."""
    batches = [[collate([sequence], EOS, backbone.device) for sequence in both] for both in pairs]
    return torch.stack([torch.cat([answer_scores(backbone, "reward", batch) for batch in both]) for both in batches])


@pytest.mark.parametrize("reads_prompt", [False, True], ids=["at the end", "at the prompt too"])
@every_architecture
def test_an_answer_has_the_score_that_it_has_alone(load_tiny: LoadTiny, architecture: str, reads_prompt: bool) -> None:
    backbone = with_reward(load_tiny(architecture), reads_prompt=reads_prompt)
    with backbone.role("reward"):
        batch = pair_batch(backbone, PAIRS)
        assert isinstance(batch, PairBatch)
        scores, alone = scores_of_pairs(backbone, "reward", batch), scores_alone(backbone, PAIRS)
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    assert alone.unique().numel() == alone.numel() - 1  # two answers are the same, all others could be told apart


def test_the_prompt_is_computed_once(load_tiny: LoadTiny) -> None:
    batch = pair_batch(load_tiny("llama"), PAIRS)
    assert batch.input_ids.shape == (4, 14)  # the longest row: 11 of prompt, and answers of 2 and 1
    assert int(batch.attention_mask.sum()) == sum(len(first) + len(second.answer) for first, second in PAIRS)


@every_architecture
def test_gradients_are_those_of_answers_in_rows_of_their_own(load_tiny: LoadTiny, architecture: str) -> None:
    def gradients(alone: bool) -> list[Tensor]:
        backbone = with_reward(load_tiny(architecture))
        with backbone.role("reward", train=True):
            together = scores_of_pairs(backbone, "reward", pair_batch(backbone, PAIRS))
            high, low = (scores_alone(backbone, PAIRS) if alone else together).unbind(-1)
            torch.nn.functional.softplus(low - high).sum().backward()
        return [p.grad for p in backbone.trainable_parameters("reward") if p.grad is not None]

    together, alone = gradients(alone=False), gradients(alone=True)
    assert len(together) == len(alone) > 0
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_layers_computed_again_give_the_same_gradients_bit_for_bit(tiny_folder: Any) -> None:
    def gradients(again: bool) -> list[Tensor]:
        backbone = with_reward(Backbone.load(tiny_folder("llama"), "float32", 0, checkpoints_activations=again))
        with backbone.role("reward", train=True):
            scores_of_pairs(backbone, "reward", pair_batch(backbone, PAIRS)).square().sum().backward()
        return [p.grad for p in backbone.trainable_parameters("reward") if p.grad is not None]

    plain, again = gradients(again=False), gradients(again=True)
    assert len(plain) == len(again) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, again, strict=True))


@every_architecture
def test_on_the_trunk_scores_are_the_same_bit_for_bit(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = with_reward(load_tiny(architecture), top_layers=1)
    with backbone.role("reward"):
        batches = [pair_batch(backbone, PAIRS, with_trunk=with_trunk) for with_trunk in (False, True)]
        plain, on_trunk = (scores_of_pairs(backbone, "reward", batch) for batch in batches)
    assert [batch.trunk is None for batch in batches] == [True, False]
    assert torch.equal(plain, on_trunk)


def test_answers_to_two_prompts_have_rows_of_their_own(load_tiny: LoadTiny) -> None:
    backbone = with_reward(load_tiny("llama"), top_layers=1)
    mixed = [(PAIRS[0][0], PAIRS[1][1]), PAIRS[3]]
    with backbone.role("reward"):
        for with_trunk in (False, True):
            batch = pair_batch(backbone, mixed, with_trunk=with_trunk)
            assert isinstance(batch, SequenceBatch)
            assert (batch.trunk is not None) == with_trunk
            scores = scores_of_pairs(backbone, "reward", batch)
            torch.testing.assert_close(scores, scores_alone(backbone, mixed), atol=1e-5, rtol=0)


def around(backbone: Backbone, model: Any) -> Backbone:
    """Another random model in the place of the backbone's, with its tokenizer."""
    return with_reward(Backbone(model.eval(), backbone.tokenizer))


def test_a_row_is_no_longer_than_what_a_model_looks_back(load_tiny: LoadTiny) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=13,
    )
    backbone = around(load_tiny("llama"), transformers.MistralForCausalLM(config))
    with backbone.role("reward"):
        short, long = pair_batch(backbone, PAIRS[:1]), pair_batch(backbone, PAIRS)
        assert isinstance(short, PairBatch)  # of 13 tokens, where the longest of all has 14
        assert isinstance(long, SequenceBatch)
        for batch, pairs in ((short, PAIRS[:1]), (long, PAIRS)):
            scores = scores_of_pairs(backbone, "reward", batch)
            torch.testing.assert_close(scores, scores_alone(backbone, pairs), atol=1e-5, rtol=0)


def test_a_model_that_makes_its_own_positions_gets_a_row_for_each_answer(load_tiny: LoadTiny) -> None:
    """ALiBi: distances are counted by the model, from its mask."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, bos_token_id=EOS
    )
    backbone = around(load_tiny("llama"), transformers.FalconForCausalLM(config))
    with backbone.role("reward"):
        batch = pair_batch(backbone, PAIRS)
        assert isinstance(batch, SequenceBatch)
        scores = scores_of_pairs(backbone, "reward", batch)
        torch.testing.assert_close(scores, scores_alone(backbone, PAIRS), atol=1e-5, rtol=0)


def test_a_model_that_hands_on_a_state_gets_a_row_for_each_answer(load_tiny: LoadTiny) -> None:
    """Short convolutions run along the row, whatever the mask says."""
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    backbone = around(load_tiny("llama"), transformers.Lfm2ForCausalLM(config))
    with backbone.role("reward"):
        batch = pair_batch(backbone, PAIRS)
        assert isinstance(batch, SequenceBatch)
        scores = scores_of_pairs(backbone, "reward", batch)
        torch.testing.assert_close(scores, scores_alone(backbone, PAIRS), atol=1e-5, rtol=0)


CUT = [(TokenSequence(tuple(range(100)), tuple(range(200, 250))), TokenSequence(tuple(range(100)), tuple(range(190))))]
"""Two long answers without EOS."""


@pytest.mark.parametrize("pairs", [PAIRS, CUT], ids=["short", "long"])
def test_in_bfloat16_scores_are_those_alone_up_to_rounding(
    load_tiny: LoadTiny, tiny_folder: Any, pairs: list[AnswerPair]
) -> None:
    """Of adapters and full copies; with plain attention and, in a row of more than 128 tokens, with the fused one."""
    for lora in (LoraSettings(rank=4, alpha=8), None):
        backbone = Backbone.load(tiny_folder("llama"), "bfloat16", seed=0)
        backbone.add_role("reward", lora, scored=True)
        with torch.no_grad():
            backbone.role_tensors("reward")["head.weight"].normal_(generator=torch.Generator().manual_seed(0))
        with backbone.role("reward"):
            batch = pair_batch(backbone, pairs)
            assert isinstance(batch, PairBatch)
            scores, alone = scores_of_pairs(backbone, "reward", batch), scores_alone(backbone, pairs)
        torch.testing.assert_close(scores, alone, atol=0.1, rtol=0.02)
        assert alone.std() > 0.5


@every_architecture
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_who_does_not_keep_answers_apart_is_found_out(
    load_tiny: LoadTiny, tiny_folder: Any, architecture: str, dtype: str
) -> None:
    backbone = Backbone.load(tiny_folder(architecture), dtype, seed=0)

    def blind(input_ids: Tensor, attention_mask: Tensor, branches: Tensor | None = None) -> Tensor:
        return backbone.hidden_states(input_ids, attention_mask)

    def broken(input_ids: Tensor, attention_mask: Tensor, branches: Tensor | None = None) -> Tensor:
        if branches is not None:
            raise ValueError("a mask of two dimensions is needed")
        return backbone.hidden_states(input_ids, attention_mask)

    def nowhere(input_ids: Tensor, attention_mask: Tensor, branches: Tensor | None = None) -> Tensor:
        states = backbone.hidden_states(input_ids, attention_mask)
        return states if branches is None else states * torch.nan

    with backbone.role(REFERENCE):
        assert respects_branches(backbone.hidden_states, backbone.dtype, backbone.device)
        for hidden_states in (blind, broken, nowhere):
            assert not respects_branches(hidden_states, backbone.dtype, backbone.device)


def test_who_counts_positions_along_the_row_is_found_out(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "branch_positions", lambda mask, branches: position_ids(mask))
    for architecture in ("llama", "gpt2", "qwen2"):
        assert not load_tiny(architecture).shares_prompts(1)


TOKENS = st.lists(st.integers(0, 255), max_size=5).map(tuple)


@given(st.lists(st.tuples(TOKENS, TOKENS, TOKENS), min_size=1, max_size=4))
def test_a_token_sees_its_own_way_back_and_nothing_else(parts: list[tuple[tuple[int, ...], ...]]) -> None:
    """Against the definition, token by token."""
    pairs = [pair(*part) for part in parts]
    batch = collate_pairs(pairs, EOS, CPU)
    seen = branch_attention(batch.attention_mask, batch.branches, torch.float32)[:, 0] == 0
    positions = branch_positions(batch.attention_mask, batch.branches)
    for row, (first, second) in enumerate(pairs):
        prompt = list(range(len(first.prompt)))
        ways = [  # places in the row, in the order in which each answer is read
            prompt + list(range(len(prompt), len(first))),
            prompt + list(range(len(first), len(first) + len(second.answer))),
        ]
        for way, sequence, end in zip(ways, (first, second), batch.ends[row].tolist(), strict=True):
            assert batch.input_ids[row, way].tolist() == [*sequence.prompt, *sequence.answer]
            assert positions[row, way].tolist() == list(range(len(way)))
            assert end == way[-1]
            for i, place in enumerate(way):
                assert seen[row, place].nonzero().flatten().tolist() == way[: i + 1]
        assert positions[row].max() < max(len(first), len(second))  # padding's too: a model may have no more
