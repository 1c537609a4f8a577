"""The shared backbone, for every architecture: scores, isolation of roles, saving, merging, exporting."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.base_model import TINY_ARCHITECTURES
from components.foundation.batching import SequenceBatch, TokenSequence, collate
from components.foundation.errors import ModelError
from components.foundation.language_model import load_causal_lm, load_tokenizer, save_causal_lm
from components.foundation.preference_trainer import answer_scores
from components.foundation.setting_sections import LoraSettings
from components.ppo_lagrangian.ppo_lagrangian import export_policy

LoadTiny = Callable[[str], Backbone]
MakeTiny = Callable[[str], Path]
LoadPlain = Callable[[Path], Any]
LORA = LoraSettings(rank=4, alpha=8)
SEQUENCES = [
    TokenSequence(prompt=(256, 72, 105, 256), answer=(79, 107, 257)),
    TokenSequence(prompt=(256, 1, 2, 3, 4, 5, 6, 7, 8, 9, 256), answer=(10, 257)),
    TokenSequence(prompt=(5,), answer=(200, 199, 198, 197, 196, 195, 194)),
    TokenSequence(prompt=(256, 30, 256), answer=(257,)),
]

every_architecture = pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)


def randomize(backbone: Backbone, role: str, seed: int) -> None:
    """A fresh adapter changes nothing; this one does, and strongly, so that attention looks at particular tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.trainable_parameters(role):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_roles(backbone: Backbone, *roles: str, scored: Sequence[str] = ("reward", "cost")) -> Backbone:
    for seed, role in enumerate(roles):
        backbone.add_role(role, LORA, scored=role in scored)
        randomize(backbone, role, seed)
    return backbone


def batch_of(backbone: Backbone, sequences: Sequence[TokenSequence]) -> SequenceBatch:
    return collate(sequences, backbone.eos_token_id, backbone.device)


def scores_of(backbone: Backbone, role: str, batch: SequenceBatch) -> Tensor:
    with backbone.role(role):
        return answer_scores(backbone, role, batch)


def logits_of(backbone: Backbone, role: str) -> Tensor:
    batch = batch_of(backbone, SEQUENCES)
    with backbone.role(role):
        return backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)


def padded(backbone: Backbone, sequence: TokenSequence, left: int, right: int, padding_id: int) -> SequenceBatch:
    answer_length = len(sequence.answer) + right
    ids = [padding_id] * left + [*sequence.prompt, *sequence.answer] + [padding_id] * right
    mask = [0] * left + [1] * (len(ids) - left - right) + [0] * right
    attention_mask = torch.tensor([mask], device=backbone.device)
    return SequenceBatch(
        torch.tensor([ids], device=backbone.device), attention_mask, attention_mask[:, -answer_length:].bool()
    )


@every_architecture
def test_a_score_does_not_depend_on_batch_mates(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = with_roles(load_tiny(architecture), "reward")
    together = scores_of(backbone, "reward", batch_of(backbone, SEQUENCES))
    alone = torch.cat([scores_of(backbone, "reward", batch_of(backbone, [s])) for s in SEQUENCES])
    assert together.dtype == torch.float32
    assert together.std() > 0.05  # not all the same, or the comparison would say nothing
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    reverse = scores_of(backbone, "reward", batch_of(backbone, SEQUENCES[::-1]))
    torch.testing.assert_close(reverse.flip(0), alone, atol=1e-5, rtol=0)


@every_architecture
def test_a_score_does_not_depend_on_padding(load_tiny: LoadTiny, architecture: str) -> None:
    """Neither on its amount, nor its side, nor its id, which may be EOS."""
    backbone = with_roles(load_tiny(architecture), "reward")
    expected = scores_of(backbone, "reward", batch_of(backbone, SEQUENCES[:1]))

    @given(left=st.integers(0, 40), right=st.integers(0, 40), padding_id=st.sampled_from([0, 65, 256, 257, 258]))
    @settings(deadline=None, max_examples=15)
    def check(left: int, right: int, padding_id: int) -> None:
        batch = padded(backbone, SEQUENCES[0], left, right, padding_id)
        torch.testing.assert_close(scores_of(backbone, "reward", batch), expected, atol=1e-5, rtol=0)

    check()


@pytest.mark.fault
@every_architecture
def test_row_25_a_row_of_padding_alone_spoils_neither_scores_nor_gradients(
    load_tiny: LoadTiny, architecture: str
) -> None:
    """A softmax over nothing would be NaN, and NaN times a mask of 0 is NaN."""
    backbone = with_roles(load_tiny(architecture), "reward")

    def scores_and_gradients(batch: SequenceBatch, rows: int) -> tuple[Tensor, Tensor]:
        for parameter in backbone.trainable_parameters("reward"):
            parameter.grad = None
        with backbone.role("reward", train=True):
            scores = answer_scores(backbone, "reward", batch)
            (scores * torch.tensor([1.0] * rows + [0.0] * (len(scores) - rows))).sum().backward()
        gradients = [parameter.grad.flatten() for parameter in backbone.trainable_parameters("reward")]  # type: ignore[union-attr]
        return scores[:rows].detach(), torch.cat(gradients)

    batch = batch_of(backbone, SEQUENCES)
    masked = SequenceBatch(
        torch.cat([batch.input_ids, batch.input_ids[:1]]),
        torch.cat([batch.attention_mask, torch.zeros_like(batch.attention_mask[:1])]),
        torch.cat([batch.answer_mask, torch.zeros_like(batch.answer_mask[:1])]),
    )
    expected = scores_and_gradients(batch, len(SEQUENCES))
    found = scores_and_gradients(masked, len(SEQUENCES))
    for value, reference in zip(found, expected, strict=True):
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)


@every_architecture
def test_a_score_sees_the_whole_sequence_in_its_order(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = with_roles(load_tiny(architecture), "reward")
    base = SEQUENCES[1]
    changed = [
        base,
        TokenSequence((66, *base.prompt[1:]), base.answer),
        TokenSequence((*base.prompt[:3], base.prompt[4], base.prompt[3], *base.prompt[5:]), base.answer),
        TokenSequence(base.prompt, (11, 257)),
    ]
    scores = torch.stack([scores_of(backbone, "reward", batch_of(backbone, [s]))[0] for s in changed])
    assert (scores[1:] - scores[0]).abs().min() > 1e-4


@every_architecture
def test_answer_logits_equal_plain_transformers(
    load_tiny: LoadTiny, tiny_folder: MakeTiny, load_plain: LoadPlain, architecture: str
) -> None:
    """One sequence at a time, without padding, masks or positions given: the plainest call there is."""
    backbone = load_tiny(architecture)
    plain = load_plain(tiny_folder(architecture))
    logits = logits_of(backbone, REFERENCE)
    for row, sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            ids = torch.tensor([[*sequence.prompt, *sequence.answer]], device=backbone.device)
            expected = plain(ids).logits[0, len(sequence.prompt) - 1 : -1]
        torch.testing.assert_close(logits[row, : len(sequence.answer)], expected, atol=1e-5, rtol=0)


@every_architecture
def test_a_new_role_changes_nothing_yet(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = load_tiny(architecture)
    before = logits_of(backbone, REFERENCE)
    backbone.add_role("actor", LORA, scored=False)
    assert torch.equal(logits_of(backbone, "actor"), before)
    assert backbone.has_adapter("actor")
    assert not backbone.has_adapter("reward")


@every_architecture
def test_training_one_role_changes_no_other_bit_for_bit(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = with_roles(load_tiny(architecture), "actor", "reward", "cost", "reward_critic")
    batch = batch_of(backbone, SEQUENCES)

    def outputs() -> dict[str, Tensor]:
        found = {role: logits_of(backbone, role) for role in (REFERENCE, "actor", "reward_critic")}
        return found | {role: scores_of(backbone, role, batch) for role in ("reward", "cost")}

    before = outputs()
    for trained in ("actor", "reward"):
        optimizer = torch.optim.AdamW(backbone.trainable_parameters(trained), lr=0.05)
        for _ in range(2):
            with backbone.role(trained, train=True):
                if trained == "actor":
                    loss = -backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length).var()
                else:
                    loss = answer_scores(backbone, trained, batch).square().sum()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        after = outputs()
        assert {role for role in before if not torch.equal(before[role], after[role])} == {trained}
        before = after


def test_gradients_reach_the_trained_role_alone(load_tiny: LoadTiny) -> None:
    backbone = with_roles(load_tiny("llama"), "actor", "reward", "cost")
    batch = batch_of(backbone, SEQUENCES)
    with backbone.role("reward", train=True):
        answer_scores(backbone, "reward", batch).sum().backward()
    assert all(p.grad is not None for p in backbone.trainable_parameters("reward"))
    assert all(p.grad is None for role in ("actor", "cost") for p in backbone.trainable_parameters(role))
    with backbone.role("reward"):
        assert not answer_scores(backbone, "reward", batch).requires_grad
    with backbone.role(REFERENCE):
        assert not backbone.hidden_states(batch.input_ids, batch.attention_mask).requires_grad


@pytest.mark.parametrize("inner", [REFERENCE, "reward"])
def test_a_role_holds_to_the_end_of_its_block(load_tiny: LoadTiny, inner: str) -> None:
    backbone = with_roles(load_tiny("llama"), "actor", "reward")
    batch = batch_of(backbone, SEQUENCES)
    with backbone.role("actor"):
        before = backbone.hidden_states(batch.input_ids, batch.attention_mask)
        with backbone.role(inner):
            other = backbone.hidden_states(batch.input_ids, batch.attention_mask)
        after = backbone.hidden_states(batch.input_ids, batch.attention_mask)
    assert not torch.equal(before, other)
    assert torch.equal(before, after)


def test_a_role_within_the_reference_is_that_role(load_tiny: LoadTiny) -> None:
    backbone = with_roles(load_tiny("llama"), "actor")
    expected = logits_of(backbone, "actor")
    with backbone.role(REFERENCE):
        assert torch.equal(logits_of(backbone, "actor"), expected)


def test_training_goes_on_after_an_inner_block_even_one_that_failed(load_tiny: LoadTiny) -> None:
    backbone = with_roles(load_tiny("llama"), "actor", "reward")
    batch = batch_of(backbone, SEQUENCES)
    with backbone.role("reward", train=True):
        score = answer_scores(backbone, "reward", batch).sum()
        with pytest.raises(KeyError), backbone.role("actor"):
            raise KeyError
        score.backward()
    assert all(p.grad is not None for p in backbone.trainable_parameters("reward"))


@every_architecture
def test_adapters_are_made_without_a_warning(load_tiny: LoadTiny, architecture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tiny(architecture).add_role("actor", LORA, scored=False)


@every_architecture
@pytest.mark.parametrize("top_layers", [0, 1, 2, 9])
def test_only_the_top_layers_are_adapted(
    load_tiny: LoadTiny, architecture: str, top_layers: int, tmp_path: Path
) -> None:
    backbone = load_tiny(architecture)
    backbone.add_role("reward", LoraSettings(rank=2, alpha=4, top_layers=top_layers), scored=True)
    backbone.save_role("reward", tmp_path)
    names = load_file(tmp_path / "adapter.safetensors")
    layers = {part for name in names for part in name.split(".") if part.isdigit()}
    assert layers == ({"1"} if top_layers == 1 else {"0", "1"})
    assert {"head.weight", "head.bias"} <= set(names)


@every_architecture
def test_a_saved_role_is_loaded_bit_for_bit_under_any_name(
    load_tiny: LoadTiny, architecture: str, tmp_path: Path
) -> None:
    backbone = with_roles(load_tiny(architecture), "actor", "reward")
    for role in ("actor", "reward"):
        backbone.save_role(role, tmp_path / role)
    other = load_tiny(architecture)
    torch.manual_seed(1234)
    other.add_role("bystander", LORA, scored=True)
    other.load_role("cost_critic", tmp_path / "reward")
    other.load_role("policy", tmp_path / "actor")
    batch = batch_of(backbone, SEQUENCES)
    assert torch.equal(scores_of(other, "cost_critic", batch), scores_of(backbone, "reward", batch))
    assert torch.equal(logits_of(other, "policy"), logits_of(backbone, "actor"))
    other.save_role("cost_critic", tmp_path / "again")
    for name in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "reward" / name).read_bytes()


@every_architecture
def test_merging_keeps_what_the_adapter_says(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = with_roles(load_tiny(architecture), "actor", "reward")
    reference, actor = logits_of(backbone, REFERENCE), logits_of(backbone, "actor")
    assert (actor - reference).abs().max() > 0.05
    backbone.merge_role("actor")
    assert not backbone.has_adapter("actor")
    assert not backbone.has_adapter("reward")
    torch.testing.assert_close(logits_of(backbone, REFERENCE), actor, atol=1e-4, rtol=1e-4)


@every_architecture
def test_an_exported_policy_is_plain_transformers(
    load_tiny: LoadTiny, load_plain: LoadPlain, architecture: str, tmp_path: Path
) -> None:
    backbone = with_roles(load_tiny(architecture), "actor")
    backbone.merge_role("actor")
    expected = logits_of(backbone, REFERENCE)
    backbone.export(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix in {".bin", ".pt", ".py"}]
    plain = load_plain(tmp_path)
    assert plain.config.model_type == architecture
    for row, sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            ids = torch.tensor([[*sequence.prompt, *sequence.answer]], device=backbone.device)
            logits = plain(ids).logits[0, len(sequence.prompt) - 1 : -1]
        torch.testing.assert_close(expected[row, : len(sequence.answer)], logits, atol=1e-5, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == backbone.tokenizer.chat_template
    again = Backbone.load(tmp_path, "float32", seed=0)
    assert torch.equal(logits_of(again, REFERENCE), expected)


@every_architecture
def test_a_policy_is_exported_merged_while_training_goes_on(
    load_tiny: LoadTiny, architecture: str, tmp_path: Path
) -> None:
    """The same folder as merging for good would give, and roles that are not touched."""
    backbone = with_roles(load_tiny(architecture), "actor", "reward")
    before = [logits_of(backbone, role) for role in (REFERENCE, "actor")]
    backbone.export_merged("actor", tmp_path / "live")
    assert all(torch.equal(logits_of(backbone, r), old) for r, old in zip((REFERENCE, "actor"), before, strict=True))
    backbone.merge_role("actor")
    backbone.export(tmp_path / "merged")
    live, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "merged"))
    assert live.keys() == merged.keys()
    for name in live:
        torch.testing.assert_close(live[name], merged[name], atol=1e-6, rtol=1e-5)


@every_architecture
def test_an_exported_adapter_is_one_of_peft(
    load_tiny: LoadTiny, tiny_folder: MakeTiny, load_plain: LoadPlain, architecture: str, tmp_path: Path
) -> None:
    """PEFT alone puts it on the plain base model; a head stays at home."""
    from peft import PeftModel

    backbone = with_roles(load_tiny(architecture), "actor", "reward")
    for role in ("actor", "reward"):
        backbone.export_adapter(role, tmp_path / role)
        plain = PeftModel.from_pretrained(load_plain(tiny_folder(architecture)), str(tmp_path / role)).eval()
        expected = logits_of(backbone, role)
        for row, sequence in enumerate(SEQUENCES):
            with torch.no_grad():
                ids = torch.tensor([[*sequence.prompt, *sequence.answer]], device=backbone.device)
                logits = plain(ids).logits[0, len(sequence.prompt) - 1 : -1]
            torch.testing.assert_close(expected[row, : len(sequence.answer)], logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_its_base_is_the_merged_policy(
    tiny_folder: MakeTiny, load_plain: LoadPlain, tmp_path: Path
) -> None:
    """Both are loaded as their users would, without our code."""
    from peft import PeftModel

    base = tiny_folder("llama")
    backbone = with_roles(Backbone.load(base, "float32", seed=0), "actor")
    export_policy(backbone, base, "s3://bucket/sft", tmp_path)
    merged = load_plain(tmp_path / "model")
    adapted = PeftModel.from_pretrained(load_plain(base), str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[5, 9, 17, 33, 2, 80]], device=backbone.device)
    with torch.no_grad():
        expected, logits, plain = (model(ids).logits for model in (merged, adapted, load_plain(base)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)
    description = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == "s3://bucket/sft"
    assert description["target_modules"] == sorted(description["target_modules"])


def test_a_bfloat16_policy_is_exported_in_bfloat16(
    tiny_folder: MakeTiny, load_plain: LoadPlain, tmp_path: Path
) -> None:
    backbone = with_roles(Backbone.load(tiny_folder("llama"), "bfloat16", seed=0), "actor")
    backbone.merge_role("actor")
    backbone.export(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert load_plain(tmp_path).dtype == torch.bfloat16


def test_first_weights_follow_the_seed(tiny_folder: MakeTiny) -> None:
    def first_scores(seed: int) -> Tensor:
        backbone = Backbone.load(tiny_folder("llama"), "float32", seed)
        backbone.add_role("reward", LORA, scored=True)
        return scores_of(backbone, "reward", batch_of(backbone, SEQUENCES))

    assert torch.equal(first_scores(3), first_scores(3))
    assert not torch.equal(first_scores(3), first_scores(4))


def test_text_of_an_answer_holds_no_control_characters(load_tiny: LoadTiny) -> None:
    backbone = load_tiny("llama")
    encoded = backbone.tokenizer.encode("\x1b[31mred\x07\x00 and\nplain\t", add_special_tokens=False)
    assert backbone.text([256, *encoded, 257]) == "[31mred and\nplain"


@pytest.mark.fault
def test_an_adapter_for_another_architecture_is_refused(load_tiny: LoadTiny, tmp_path: Path) -> None:
    with_roles(load_tiny("llama"), "actor").save_role("actor", tmp_path)
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_tiny("gpt2").load_role("actor", tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewritten(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.golden
def test_a_score_may_also_be_read_at_the_end_of_the_prompt(load_tiny: LoadTiny, tmp_path: Path) -> None:
    """The soft minimum of the head's outputs at two tokens, of a text alone; saved and loaded, it is so again."""
    backbone = load_tiny("llama")
    backbone.add_role("cost", LORA, scored=True, reads_prompt=True)
    randomize(backbone, "cost", 0)
    backbone.save_role("cost", tmp_path)
    loaded = load_tiny("llama")
    loaded.load_role("cost", tmp_path)
    expected = []
    for sequence in SEQUENCES:
        ids = torch.tensor([[*sequence.prompt, *sequence.answer]])
        with backbone.role("cost"):
            hidden = backbone.hidden_states(ids, torch.ones_like(ids))[0].double()
        head = {name: tensor.double() for name, tensor in backbone.role_tensors("cost").items() if "head" in name}
        outputs = hidden @ head["head.weight"][0] + head["head.bias"]
        expected.append(-torch.log(sum(torch.exp(-outputs[i]) for i in (len(sequence.prompt) - 1, -1))))
    for model in (backbone, loaded):
        scores = scores_of(model, "cost", batch_of(model, SEQUENCES))
        torch.testing.assert_close(scores.double(), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.fault
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "adapter.safetensors"),
        lambda folder: (folder / "adapter.safetensors").unlink(),
        lambda folder: (folder / "adapter.json").unlink(),
        lambda folder: (folder / "adapter.json").write_text("{"),
        lambda folder: (folder / "adapter.json").write_text("{}"),
        lambda folder: rewritten(folder / "adapter.json", '"reads_prompt": false', '"reads_prompt": "no"'),
        lambda folder: shutil.rmtree(folder),
    ],
    ids=[
        "cut weights",
        "no weights",
        "no description",
        "cut description",
        "empty description",
        "no truth",
        "no folder",
    ],
)
def test_a_damaged_adapter_is_refused(load_tiny: LoadTiny, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "adapter"
    with_roles(load_tiny("llama"), "actor").save_role("actor", folder)
    damage(folder)
    with pytest.raises(ModelError, match=str(folder)):
        load_tiny("llama").load_role("actor", folder)


@pytest.mark.fault
def test_row_27_an_adapter_for_another_width_is_refused(load_tiny: LoadTiny, tmp_path: Path) -> None:
    """The same architecture, so all names fit; only the shapes do not."""
    backbone = load_tiny("llama")
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=257,
    )
    wide = transformers.AutoModelForCausalLM.from_config(config)
    save_causal_lm(wide, backbone.tokenizer, tmp_path / "wide", torch.float32)
    with_roles(backbone, "actor").save_role("actor", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text())["scored"] is False
    with pytest.raises(ModelError, match="adapter"):
        Backbone.load(tmp_path / "wide", "float32", seed=0).load_role("actor", tmp_path / "adapter")


@pytest.mark.fault
@pytest.mark.parametrize("tokens", [259, 264], ids=["as many tokens", "more tokens"])
def test_row_27_an_adapter_trained_with_another_tokenizer_is_refused_with_both_sizes(
    tiny_folder: MakeTiny, tmp_path: Path, tokens: int
) -> None:
    """All its tensors would fit, and it would score noise."""
    own, other = (Backbone.load(tiny_folder("llama"), "float32", seed=0) for _ in range(2))
    assert len(own.tokenizer) == 259
    if tokens > 259:
        other.tokenizer.add_tokens([f"<extra {number}>" for number in range(tokens - 259)])
    else:
        text = other.tokenizer.backend_tokenizer.to_str().replace('"<|pad|>"', '"<|filler|>"')
        other.tokenizer = type(other.tokenizer)(tokenizer_object=Tokenizer.from_str(text))
    assert len(other.tokenizer) == tokens
    with_roles(other, "reward").save_role("reward", tmp_path)
    with pytest.raises(ModelError, match=rf"{tmp_path} was trained with a tokenizer of {tokens} .* of 259 tokens"):
        own.load_role("reward", tmp_path)


@pytest.mark.fault
def test_row_27_an_adapter_of_before_vocabularies_were_noted_still_loads(load_tiny: LoadTiny, tmp_path: Path) -> None:
    with_roles(load_tiny("llama"), "reward").save_role("reward", tmp_path)
    description = json.loads((tmp_path / "adapter.json").read_text())
    assert description.pop("vocabulary")["tokens"] == 259
    assert description.pop("reads_prompt") is False
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    load_tiny("llama").load_role("reward", tmp_path)


@pytest.mark.fault
def test_row_28_a_model_whose_chat_template_is_lost_is_not_exported(load_tiny: LoadTiny, tmp_path: Path) -> None:
    backbone = load_tiny("llama")
    backbone.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="is not written: the tokenizer has no chat template"):
        backbone.export(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@every_architecture
@pytest.mark.parametrize("longer", [1, 15], ids=["plain attention", "fused attention"])
def test_a_bfloat16_backbone_keeps_its_adapters_in_float32_and_agrees_with_the_float32_one(
    tiny_folder: MakeTiny, architecture: str, longer: int
) -> None:
    """Mixed precision: same scores and same gradients but for rounding, and full-precision weights for Adam."""
    exact, mixed = (
        with_roles(Backbone.load(tiny_folder(architecture), dtype, seed=0), "reward")
        for dtype in ("float32", "bfloat16")
    )
    sequences = [TokenSequence(s.prompt * longer, s.answer) for s in SEQUENCES]
    gradients = []
    scores = []
    for backbone in (exact, mixed):
        batch = batch_of(backbone, sequences)
        with backbone.role("reward", train=True):
            score = backbone.scores("reward", batch.input_ids, batch.attention_mask)[:, -1]
            score.square().sum().backward()
        assert {p.dtype for p in backbone.trainable_parameters("reward")} == {torch.float32}
        scores.append(score.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.trainable_parameters("reward")]))  # type: ignore[union-attr]
    torch.testing.assert_close(scores[0], scores[1], atol=0.05, rtol=0.05)
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98


def test_attention_that_caps_its_logits_is_computed_with_the_cap(tiny_folder: MakeTiny, tmp_path: Path) -> None:
    """As Gemma 2's: torch's fused attention knows no cap, and would be another model."""
    shutil.copytree(tiny_folder("llama"), tmp_path, dirs_exist_ok=True)  # its tokenizer
    config = transformers.Gemma2Config(
        vocab_size=len(load_tokenizer(tmp_path)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attn_logit_softcapping=0.05,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])

    def logits(attention: str) -> Tensor:
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
        return cast(Tensor, plain(ids).logits.detach())

    model = load_causal_lm(tmp_path, torch.float32)
    torch.testing.assert_close(model(ids.to(model.device)).logits.detach().cpu(), logits("eager"))
    assert not torch.allclose(logits("sdpa"), logits("eager"), atol=0.01)  # else the cap would not show
    half = with_roles(Backbone.load(tmp_path, "bfloat16", seed=0), "reward")
    scores_of(half, "reward", batch_of(half, SEQUENCES))
    assert half._model.config._attn_implementation == "eager"


def test_a_bfloat16_pass_is_the_same_bits_whatever_came_before(tiny_folder: MakeTiny) -> None:
    """What computes attention is chosen by a pass's length; a run that was resumed has another history."""
    backbone = with_roles(Backbone.load(tiny_folder("llama"), "bfloat16", seed=0), "reward")
    short, long = (
        batch_of(backbone, [TokenSequence(s.prompt * times, s.answer) for s in SEQUENCES]) for times in (1, 15)
    )
    first = scores_of(backbone, "reward", short), scores_of(backbone, "reward", long)
    assert torch.equal(scores_of(backbone, "reward", long), first[1])
    assert torch.equal(scores_of(backbone, "reward", short), first[0])


def test_a_prepared_role_answers_the_same_bits_and_is_as_it_was_afterwards(tiny_folder: MakeTiny) -> None:
    """Its adapter is rounded once, not in each pass; what the optimiser works on keeps its bits, whatever fails."""
    backbone = with_roles(Backbone.load(tiny_folder("llama"), "bfloat16", seed=0), "actor", "reward")
    batch = batch_of(backbone, SEQUENCES)
    logits, scores = logits_of(backbone, "actor"), scores_of(backbone, "reward", batch)
    before = {name: tensor.detach().clone() for name, tensor in backbone.role_tensors("actor").items()}
    with pytest.raises(ZeroDivisionError), backbone.prepared("actor"):
        assert {tensor.dtype for tensor in backbone.role_tensors("actor").values()} == {torch.bfloat16}
        assert {tensor.dtype for tensor in backbone.role_tensors("reward").values()} == {torch.float32}
        assert torch.equal(logits_of(backbone, "actor"), logits)
        _ = 1 / 0
    with backbone.prepared("reward"):
        assert torch.equal(scores_of(backbone, "reward", batch), scores)
    after = backbone.role_tensors("actor")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
