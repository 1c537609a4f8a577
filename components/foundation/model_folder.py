"""What a plain Hugging Face folder must hold, checked without loading it: safetensors, config.json, a tokenizer with a
chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.foundation.errors import ModelError
from components.foundation.untrusted import one_line, parse_json, read_text, shown

_REQUIRED_FILES = ("config.json", "tokenizer.json")


def check_model_folder(folder: Path) -> None:
    """Cheap checks before anything long starts.

    Raises:
        ModelError: naming what is missing or broken.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist")
    for name in _REQUIRED_FILES:
        if not (folder / name).is_file():
            raise ModelError(f"model folder {folder} has no {name}")
    if not list(folder.glob("*.safetensors")):
        pickled = [path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"}]
        hint = f"; {pickled[0]} is pickled, which is refused: convert it to safetensors" if pickled else ""
        raise ModelError(f"model folder {folder} holds no *.safetensors weights{hint}")
    _check_shards(folder)
    _check_weights(folder)
    _read_json(folder / "config.json")
    if not _has_chat_template(folder):
        raise ModelError(
            f"model folder {folder} has no chat template: add chat_template.jinja (a model that was trained for chats "
            "comes with one, there or in tokenizer_config.json)"
        )


def _check_shards(folder: Path) -> None:
    """transformers reads whatever file an index names, wherever it lies, and unpickles what is no safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = set(parse_json(read_text(index))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights: {one_line(error)}") from error
    for shard in shards:
        plain = isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")
        if not plain or not (folder / shard).is_file():
            raise ModelError(f"{index} names the weights {shown(shard)}: they must be a *.safetensors file beside it")


def _check_weights(folder: Path) -> None:
    """Reads headers alone, which say how long the files are."""
    from safetensors import SafetensorError, safe_open

    tensors = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as weights:
                tensors += len(weights.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"the weights {path} of {path.stat().st_size} bytes cannot be read ({one_line(error)}): copy or "
                "download the file anew (in a git clone, `git lfs pull`)"
            ) from error
    if not tensors:
        raise ModelError(f"model folder {folder} holds *.safetensors weights without a tensor")


def _has_chat_template(folder: Path) -> bool:
    """As transformers looks for it: the files count more than tokenizer_config.json."""
    file, more = folder / "chat_template.jinja", folder / "additional_chat_templates"
    if any(more.glob("*.jinja")):
        return True
    if file.is_file():
        return file.stat().st_size > 0
    config = folder / "tokenizer_config.json"
    described = _read_json(config) if config.is_file() else {}
    return isinstance(described, dict) and bool(described.get("chat_template"))


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {one_line(error)}") from error
