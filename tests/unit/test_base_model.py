"""From the setting `base_model` to a folder: tiny models, given folders, and folders that cannot be used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from components.foundation.backbone import Backbone
from components.foundation.base_model import (
    TINY_ARCHITECTURES,
    check_base_model,
    check_model_name,
    make_tiny,
    push_model,
    resolve_base_model,
)
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ModelError
from components.foundation.gguf_conversion import CHAT_TEMPLATE, convert_gguf
from components.foundation.language_model import load_causal_lm, load_tokenizer, save_causal_lm
from components.foundation.model_folder import check_model_folder

MakeTiny = Callable[[str], Path]
LoadPlain = Callable[[Path], Any]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A store that nothing below may need: its server does not exist."""
    environment = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    return CheckpointStore("s3://nowhere", cache_dir=tmp_path / "cache", environment=environment)


@pytest.fixture
def folder(tiny_folder: MakeTiny, tmp_path: Path) -> Path:
    """A copy of the tiny llama, to be damaged."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_tiny_models_are_plain_folders_of_their_architecture(
    tiny_folder: MakeTiny, load_plain: LoadPlain, architecture: str
) -> None:
    folder = tiny_folder(architecture)
    check_model_folder(folder)
    model = load_plain(folder)
    assert model.config.model_type == architecture
    assert model.config.num_hidden_layers == 2
    assert model.dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_tiny_models_have_the_same_weights_every_time(
    tiny_folder: MakeTiny, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_file(tiny_folder(architecture) / "model.safetensors")
    monkeypatch.setenv("SAFERLHF_MODELS", str(tmp_path))
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    second = load_file(make_tiny(architecture) / "model.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's random numbers are used up
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_model_is_not_made_again(tiny_folder: MakeTiny) -> None:
    stamp = (tiny_folder("llama") / "model.safetensors").stat().st_mtime_ns
    assert (tiny_folder("llama") / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_every_weight_is_written(
    tiny_folder: MakeTiny, load_plain: LoadPlain, architecture: str, tmp_path: Path
) -> None:
    """Norms and tied weights too, at values that no initialisation would give back."""
    model = load_plain(tiny_folder(architecture))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_causal_lm(model, load_tokenizer(tiny_folder(architecture)), tmp_path, torch.float32)
    again = load_plain(tmp_path).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.fault
@pytest.mark.parametrize("own_process_id", [False, True])
def test_a_half_written_model_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_process_id: bool
) -> None:
    """What a killed process left is not taken for a model; in a container its process id comes back."""
    monkeypatch.setenv("SAFERLHF_MODELS", str(tmp_path))
    left = tmp_path / f"tiny-llama.{os.getpid() + (not own_process_id)}"
    shutil.copytree(make_tiny("llama"), left)
    shutil.rmtree(tmp_path / "tiny-llama")
    (left / "complete").unlink()
    check_model_folder(make_tiny("llama"))


@given(text=st.text(max_size=40))
@settings(deadline=None, max_examples=50)
def test_the_byte_tokenizer_loses_nothing(tiny_folder: MakeTiny, text: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder("llama"))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "expected"), [("tiny", "tiny-llama"), *((f"tiny-{a}", f"tiny-{a}") for a in TINY_ARCHITECTURES)]
)
def test_names_of_tiny_models(tiny_folder: MakeTiny, store: CheckpointStore, name: str, expected: str) -> None:
    assert resolve_base_model(name, store).name == expected


def test_a_local_folder_is_taken_as_it_is(folder: Path, store: CheckpointStore) -> None:
    assert resolve_base_model(str(folder), store) == folder
    check_base_model(str(folder))


@pytest.mark.fault
@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "no-such-model", "a/b/c", "tiny-mamba"])
def test_a_name_that_means_nothing_is_refused(tiny_folder: MakeTiny, store: CheckpointStore, name: str) -> None:
    with pytest.raises(ModelError, match=name):
        resolve_base_model(name, store)


@pytest.mark.fault
@pytest.mark.parametrize(
    "name",
    ["/no/such", "./no-such-folder", "~/mine", "tiny-foo", "tiny-", "gpt2", "smollm2", "file.gguf", "a/b/c", "a/"],
)
def test_a_name_that_no_model_can_have_is_refused_before_anything_starts(name: str) -> None:
    """`gpt2` is no id of the form OWNER/NAME; least of all is it the random model `tiny-gpt2`."""
    with pytest.raises(ModelError, match=f"base_model '{name}'") as error:
        check_base_model(name)
    said = str(error.value)
    assert "\n" not in said
    assert all(choice in said for choice in ("smollm2-135m-instruct", "tiny-gemma", "folder", "s3://", "OWNER/NAME"))


@pytest.mark.fault
def test_a_file_is_no_model_folder_and_no_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/mine.gguf").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("models/mine.gguf", str(tmp_path / "models/mine.gguf")):
        with pytest.raises(ModelError, match="is a file, not a folder"):
            check_base_model(name)


@pytest.mark.parametrize(
    "name", ["tiny", "tiny-gemma", "s3://bucket/base", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b_1.c"]
)
def test_what_only_the_run_can_fetch_passes_the_early_check(name: str) -> None:
    check_base_model(name)
    check_model_name(name)


def test_a_folder_that_only_a_pod_has_is_no_wrong_name() -> None:
    check_model_name("/mnt/volume/model")
    with pytest.raises(ModelError, match="base_model 'smollm2' is not known"):
        check_model_name("smollm2")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
"""What a git clone without Git LFS has in place of weights."""


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)


def with_template_in(name: str) -> Callable[[Path], None]:
    """The chat template somewhere else, where transformers finds it as well."""

    def move(folder: Path) -> None:
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        if name == "tokenizer_config.json":
            edit_config(folder, name, chat_template=template)
        else:
            (folder / name).parent.mkdir()
            (folder / name).write_text(template)

    return move


@pytest.mark.parametrize("name", ["tokenizer_config.json", "additional_chat_templates/default.jinja"])
def test_a_chat_template_may_stand_wherever_transformers_looks(folder: Path, name: str) -> None:
    with_template_in(name)(folder)
    check_base_model(str(folder))
    assert load_tokenizer(folder).chat_template


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_weights, r"model holds no \*\.safetensors weights$"),
        (with_pickled_weights, r"pytorch_model\.bin is pickled, which is refused"),
        (lambda folder: (folder / "config.json").unlink(), "model has no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "model has no tokenizer.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": '), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"safetensors of 0 bytes cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(POINTER), r"cannot be read .*`git lfs pull`"),
        (lambda folder: cut_weights(folder), r"model\.safetensors of \d+ bytes cannot be read"),
        (lambda folder: save_file({}, folder / "model.safetensors"), "weights without a tensor"),
        (
            lambda folder: (folder / "chat_template.jinja").unlink(),
            "model has no chat template: add chat_template.jinja",
        ),
        (lambda folder: (folder / "chat_template.jinja").write_text(""), "model has no chat template"),
        (lambda folder: shutil.rmtree(folder), "model does not exist"),
    ],
    ids=[
        *("no weights", "pickled", "no config", "no tokenizer", "cut config", "binary config", "empty weights"),
        *("LFS pointer", "cut weights", "no tensors", "no chat template", "empty chat template", "no folder"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_at_once(
    folder: Path, store: CheckpointStore, damage: Callable[[Path], None], words: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=words):
        check_model_folder(folder)
    with pytest.raises(ModelError):
        check_base_model(str(folder))
    with pytest.raises(ModelError):
        push_model(folder, "s3://nowhere/base")
    with pytest.raises(ModelError):
        resolve_base_model(str(folder), store)
    with pytest.raises(ModelError):
        load_causal_lm(folder, torch.float32)


def edit_config(folder: Path, name: str = "config.json", **changes: object) -> None:
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def drop_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.fault
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: edit_config(folder, model_type="nonsense"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: edit_config(folder, intermediate_size=96),
        cut_weights,
        drop_a_layer,
    ],
    ids=["unknown type", "config is a list", "other sizes", "cut weights", "missing layer"],
)
def test_a_folder_that_cannot_be_loaded_whole_is_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    """A missing layer above all: random weights in its place would look like a bad model, not like an error."""
    damage(folder)
    with pytest.raises(ModelError, match=str(folder)):
        load_causal_lm(folder, torch.float32)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template: add chat_template.jinja"),
        (lambda folder: edit_config(folder, "tokenizer_config.json", eos_token=None), "no end-of-sequence token"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no tokenizer that transformers can read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no tokenizer that transformers can read"),
    ],
    ids=["no chat template", "no eos", "cut tokenizer", "empty tokenizer"],
)
def test_row_28_a_tokenizer_that_cannot_be_used_is_refused(
    folder: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=words) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)


@pytest.mark.fault
def test_row_27_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(10)])
    save_causal_lm(load_causal_lm(folder, torch.float32), tokenizer, tmp_path / "more", torch.float32)
    with pytest.raises(ModelError, match=r"269 tokens but the model embeds only 260"):
        Backbone.load(tmp_path / "more", "float32", seed=0)


@pytest.mark.golden
def test_the_default_chat_template_is_chatml_without_a_system_message() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    template = jinja2.Template(CHAT_TEMPLATE)
    whole = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    assert template.render(messages=messages) == whole
    assert template.render(messages=messages[:1], add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.fault
def test_a_file_that_is_no_gguf_is_refused_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"model\.gguf cannot be converted") as error:
        convert_gguf(broken, tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
