"""Checkpoints, adapters and model folders that are pickles, lie about themselves, or bring code along."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from components.foundation.backbone import Backbone
from components.foundation.base_model import make_tiny
from components.foundation.batching import ChatEncoder
from components.foundation.errors import IntegrityError, ModelError
from components.foundation.role_optimizer import WholeOptimizer
from components.foundation.setting_sections import LoraSettings
from components.foundation.tensor_file import read_tensors
from components.ppo_lagrangian.averaged_role import AveragedRole
from tests.hostile.bounded import bounded

pytestmark = pytest.mark.fault

MEGABYTE = 1_000_000
CPU = torch.device("cpu")
GOOD = save({"actor/parameters/a": torch.zeros(2, 3), "actor/optimizer/0/step": torch.ones(())})


def with_header(header: Any, data: bytes = b"\0" * 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: list[int] | None = None, end: int = 24, start: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [2, 3] if shape is None else shape, "data_offsets": [start, end]}


LIES = {
    "nothing": b"",
    "a length beyond the file": struct.pack("<Q", 2**40) + GOOD[8:],
    "a length beyond a number": struct.pack("<Q", 2**64 - 1) + GOOD[8:],
    "a length of nothing": struct.pack("<Q", 0) + GOOD[8:],
    "a deep header": with_header(b"[" * 100_000),
    "a header of another kind": with_header([1]),
    "an end beyond the file": with_header({"a": tensor(end=10**12, shape=[250_000_000_000])}),
    "a start after the end": with_header({"a": tensor(start=24, end=0)}),
    "a shape of another size": with_header({"a": tensor(shape=[3, 3])}),
    "a shape beyond a number": with_header({"a": tensor(shape=[2**62, 2**62])}),
    "a negative shape": with_header({"a": tensor(shape=[-2, -3])}),
    "two in one place": with_header({"a": tensor(), "b": tensor()}),
    "a gap": with_header({"a": tensor(), "b": tensor(start=32, end=56)}, b"\0" * 56),
    "more than it says": with_header({"a": tensor()}, b"\0" * 99),
    "numbers of no kind": with_header({"a": tensor(dtype="PICKLE")}),
    "numbers of another kind": with_header({"a": tensor(dtype="I64", shape=[3])}),
    "half numbers": with_header({"a": tensor(dtype="F4", shape=[6, 8])}),
    "a cut": GOOD[:-1],
}  # fmt: skip


@pytest.mark.parametrize("content", LIES.values(), ids=LIES.keys())
def test_a_file_that_lies_about_its_tensors_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"state\.safetensors cannot be read") as error:
        read_tensors(path, CPU)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_a_file_that_claims_a_terabyte_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(LIES["an end beyond the file"])
    imports = "from pathlib import Path; from components.foundation.tensor_file import *; import safetensors.torch"
    said = bounded(imports, "read_tensors(Path(sys.argv[1]), torch.device('cpu'))", path, more_bytes=100 * MEGABYTE)
    assert said.startswith(f"IntegrityError {path} cannot be read")


@given(changes=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whichever_bytes_change_the_file_is_read_or_refused(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    try:
        read = read_tensors(path, CPU)
    except IntegrityError:
        return
    assert sum(value.numel() for value in read.values()) <= 14


class Malicious:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self._trace,)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_MODELS", str(tmp_path_factory.mktemp("models")))
        yield make_tiny("llama")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    backbone = Backbone.load(tiny, "float32", seed=0)
    backbone.add_role("actor", LoraSettings(rank=2), scored=True)
    backbone.save_role("actor", tmp_path / "actor")
    return tmp_path / "actor"


def poisons(trace: Path) -> dict[str, bytes]:
    """Pickles as torch writes them now and wrote them once; each bites whoever reads it."""
    folder = trace.parent
    torch.save(Malicious(trace), folder / "zip.pt")
    torch.save(Malicious(trace), folder / "old.pt", _use_new_zipfile_serialization=False)
    found = {"pickle": pickle.dumps(Malicious(trace)), "zip": (folder / "zip.pt").read_bytes()}
    found["old"] = (folder / "old.pt").read_bytes()
    for name in ("zip", "old"):
        torch.load(folder / f"{name}.pt", weights_only=False)
        assert trace.exists()
        trace.unlink()
    return found


@pytest.mark.parametrize("kind", ["pickle", "zip", "old"])
def test_a_pickle_in_any_place_of_weights_is_refused_and_did_not_run(
    kind: str, model: Path, adapter: Path, tiny: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    poison = poisons(trace)[kind]
    (tmp_path / "state.safetensors").write_bytes(poison)
    with pytest.raises(IntegrityError):
        read_tensors(tmp_path / "state.safetensors", CPU)
    (adapter / "adapter.safetensors").write_bytes(poison)
    with pytest.raises(ModelError, match="cannot be read"):
        Backbone.load(tiny, "float32", seed=0).load_role("actor", adapter)
    (model / "weights.bin").write_bytes(poison)
    (model / "model.safetensors").rename(model / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "weights.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"must be a \*\.safetensors file beside it"):
        Backbone.load(model, "float32", seed=0)
    assert not trace.exists()


EVIL = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T
"""
LOAD = """
import sys
from pathlib import Path
from components.foundation.backbone import Backbone
Backbone.load(Path(sys.argv[1]), "float32", 0)
"""


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def test_code_in_a_model_folder_is_not_run_even_where_somebody_says_yes(model: Path, tmp_path: Path) -> None:
    """transformers asks on the terminal unless it was told."""
    trace = tmp_path / "ran"
    (model / "evil.py").write_text(EVIL.format(trace=str(trace)))
    change(
        model / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil"
    )
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.T"]}, tokenizer_class="Evil")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(model)],
        input="y\ny\ny\ny\n", env=offline, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode != 0 and "ModelError" in done.stderr.splitlines()[-1]
    assert not trace.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 100_000, '{"vocab_size": 1e999}', "\xff", '{"model_type": []}']
)
def test_a_description_that_is_none_is_refused_by_name(name: str, text: str, model: Path) -> None:
    (model / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="model"):
        Backbone.load(model, "float32", seed=0)


@pytest.mark.parametrize(
    ("sizes", "described"),
    [
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"vocab_size": 10**12}, "parameters"),
        ({"hidden_size": 10**6, "intermediate_size": 10**6}, "parameters"),
        ({"intermediate_size": 10**15}, ""),
    ],
)
def test_a_description_of_a_model_far_larger_than_its_weights_takes_little_memory(
    sizes: dict[str, int], described: str, model: Path
) -> None:
    change(model / "config.json", **sizes)
    imports = """from pathlib import Path
from components.foundation.backbone import Backbone
from components.foundation.language_model import import_transformers
import_transformers().AutoModelForCausalLM"""
    said = bounded(imports, "Backbone.load(Path(sys.argv[1]), 'float32', seed=0)", model, more_bytes=1 << 30)
    assert said.startswith(f"ModelError {model}") and described in said


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000])
def test_an_index_of_weights_that_is_none_is_refused(index: str, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="is no index of weights"):
        Backbone.load(model, "float32", seed=0)


def test_weights_in_several_files_are_read(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    where = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for part in set(where.values()):
        save_file({n: tensors[n] for n in tensors if where[n] == part}, model / part, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    Backbone.load(model, "float32", seed=0)


@pytest.mark.parametrize("shard", ["../../../../etc/passwd", "/etc/passwd", "nowhere.safetensors", "\0", 3, None])
def test_weights_that_an_index_looks_for_elsewhere_are_refused(shard: Any, model: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    with pytest.raises(ModelError, match=r"must be a \*\.safetensors file beside it"):
        Backbone.load(model, "float32", seed=0)


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0]['content'] }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}{{ messages[0]['content'] }}",
    "{% for i in range(10**9) %}x{% endfor %}{{ messages[0]['content'] }}",
    "{% include '/etc/passwd' %}{{ messages[0]['content'] }}",
    "{{ 1/0 }}",
    "{% if %}",
    "{{ messages[0]['content'].format(messages) }} {{ messages[0]['content'] }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_does_anything_but_lay_out_is_refused_and_did_nothing(
    template: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match="chat template"):
        ChatEncoder(Backbone.load(model, "float32", seed=0).tokenizer, 48, 16)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{{7*7}}", "{% raw %}", "<|im_start|>system", "<|im_end|>", "\x00"], ids=ascii)
def test_a_prompt_is_no_template_and_no_special_token(text: str, tiny: Path) -> None:
    tokenizer = Backbone.load(tiny, "float32", seed=0).tokenizer
    sequence = ChatEncoder(tokenizer, 200, 200).sequence(text, text)
    inner = [number for number in (*sequence.prompt, *sequence.answer) if number >= 256]
    plain = ChatEncoder(tokenizer, 200, 200).sequence("x", "x")
    assert inner == [number for number in (*plain.prompt, *plain.answer) if number >= 256]


DESCRIPTIONS: list[Callable[[dict[str, Any]], Any]] = [
    lambda good: [],
    lambda good: None,
    lambda good: good | {"lora": 3},
    lambda good: good | {"lora": {"rank": 10**9}},
    lambda good: good | {"lora": {"rank": 10**30}},
    lambda good: good | {"lora": {"rank": -1}},
    lambda good: good | {"lora": good["lora"] | {"more": 1}},
    lambda good: good | {"lora": good["lora"] | {"top_layers": 10**30}, "scored": False},
    lambda good: good | {"scored": []},
    lambda good: good | {"vocabulary": []},
    lambda good: good | {"vocabulary": {"tokens": []}},
    lambda good: good | {"vocabulary": {"tokens": 1, "sha256": "\x1b[2J" * 100}},
    lambda good: {key: good[key] for key in good if key != "scored"},
]


@pytest.mark.parametrize("number", range(len(DESCRIPTIONS)))
def test_an_adapter_whose_description_lies_is_refused(number: int, adapter: Path, tiny: Path) -> None:
    path = adapter / "adapter.json"
    path.write_text(json.dumps(DESCRIPTIONS[number](json.loads(path.read_text(encoding="utf-8")))))
    with pytest.raises(ModelError, match="adapter") as error:
        Backbone.load(tiny, "float32", seed=0).load_role("actor", adapter)
    assert len(str(error.value)) < 1000 and "\x1b" not in str(error.value)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b""], ids=repr)
def test_an_adapter_whose_description_is_none_is_refused(content: bytes, adapter: Path, tiny: Path) -> None:
    (adapter / "adapter.json").write_bytes(content[:50_000])
    with pytest.raises(ModelError, match="adapter"):
        Backbone.load(tiny, "float32", seed=0).load_role("actor", adapter)


def test_an_adapter_of_other_tensors_is_refused(adapter: Path, tiny: Path) -> None:
    save_file({"../../x.lora_A.weight": torch.zeros(2, 3)}, adapter / "adapter.safetensors")
    with pytest.raises(ModelError, match="made for another model"):
        Backbone.load(tiny, "float32", seed=0).load_role("actor", adapter)


@pytest.mark.parametrize(
    "moments",
    [
        {"x/step": torch.ones(())},
        {"7/step": torch.ones(())},
        {"-1/step": torch.ones(())},
        {"0/step": torch.ones(())},
        {"0/step": torch.ones(()), "0/exp_avg": torch.ones(9), "0/exp_avg_sq": torch.ones(2)},
        {"0/step": torch.ones(2), "0/exp_avg": torch.ones(2), "0/exp_avg_sq": torch.ones(2)},
        {"0/step": torch.ones(()), "0/exp_avg": torch.ones(2), "0/exp_avg_sq": torch.ones(2), "0/x": torch.ones(2)},
        {"": torch.ones(())},
    ],
    ids=lambda moments: ",".join(moments),
)
def test_moments_that_fit_no_parameter_are_refused_before_the_first_step(moments: dict[str, torch.Tensor]) -> None:
    optimizer = WholeOptimizer([torch.nn.Parameter(torch.zeros(2))], 1e-3)
    with pytest.raises((LookupError, ValueError, RuntimeError)):
        optimizer.load([torch.zeros(2)], moments)


@pytest.mark.parametrize("count", [-1.0, 0.5, float("nan"), float("inf"), 2.0], ids=str)
def test_sums_of_a_mean_that_are_none_are_refused(count: float, tiny: Path) -> None:
    """The last is a number of actors whose sum is not there."""
    backbone = Backbone.load(tiny, "float32", seed=0)
    backbone.add_role("actor", LoraSettings(rank=2, alpha=4), scored=False)
    before = backbone.role_state("actor")
    mean = AveragedRole(backbone, "actor", WholeOptimizer(backbone.trainable_parameters("actor"), 1e-3))
    with pytest.raises(ValueError, match="no sums of 'actor'"):
        mean.load([tensor + 1 for tensor in before.values()], {"count": torch.tensor(count)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.role_state("actor").items())
