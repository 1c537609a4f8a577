"""What a plain Hugging Face folder must hold, checked without loading it: safetensors, config.json, a tokenizer."""

from __future__ import annotations

from pathlib import Path

from components.foundation.errors import ModelError
from components.foundation.untrusted import one_line, parse_json, read_text, shown

_REQUIRED_FILES = ("config.json", "tokenizer.json")


def check_model_folder(folder: Path) -> None:
    """Cheap checks before anything long starts.

    Raises:
        ModelError: naming what is missing.
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
    try:
        parse_json(read_text(folder / "config.json"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: {one_line(error)}") from error


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
