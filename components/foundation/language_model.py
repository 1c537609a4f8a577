"""Loading and saving of plain Hugging Face folders, without assuming an architecture.

A folder holds config.json, *.safetensors, a tokenizer and a chat template. Pickled weights are refused:
unpickling runs code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from components.foundation import distributed
from components.foundation.errors import ModelError
from components.foundation.model_folder import check_model_folder
from components.foundation.untrusted import one_line


def import_transformers() -> Any:
    """`transformers`, without the parts that we never use.

    It imports scikit-learn for assisted decoding, SciPy for the losses of object detectors, and Accelerate for
    sharded loading: 3 s that every stage would pay at start-up. Its progress bars and advice would spill over the log.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    import transformers.utils
    import transformers.utils.import_utils

    for module in (transformers.utils, transformers.utils.import_utils):
        for package in ("sklearn", "scipy", "accelerate"):
            setattr(module, f"is_{package}_available", _unavailable)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


def _unavailable(*arguments: Any, **options: Any) -> bool:
    return False


def load_tokenizer(folder: Path) -> Any:
    """Tokenizer of a model folder.

    Raises:
        ModelError: no tokenizer, no EOS token, or no chat template (prompts could not be laid out).
    """
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a broken file raises a dozen unrelated types, bare Exception among them
        raise ModelError(f"{folder} has no tokenizer that transformers can read: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {folder} has no end-of-sequence token: set eos_token")
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {folder} has no chat template: add chat_template.jinja to the folder")
    return tokenizer


def vocabulary(tokenizer: Any) -> dict[str, int | str]:
    """Number of a tokenizer's tokens, and a digest of them with their ids: what is trained with one fits no other."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {"tokens": len(tokenizer), "sha256": hashlib.sha256(tokens.encode()).hexdigest()}


def check_vocabulary(trained_with: Mapping[str, int | str], tokenizer: Any, what: str) -> None:
    """Refuse what was trained with another tokenizer, also one of as many tokens.

    Raises:
        ModelError: with the sizes of both.
    """
    own = vocabulary(tokenizer)
    if trained_with != own:
        raise ModelError(
            f"{what} was trained with a tokenizer of {trained_with['tokens']} tokens, and is not for the base model's "
            f"of {own['tokens']} tokens (digests {str(trained_with['sha256'])[:12]} and {str(own['sha256'])[:12]}): "
            "train all roles on one base model"
        )


def load_causal_lm(folder: Path, dtype: torch.dtype) -> Any:
    """Causal language model of a folder, on this rank's device, in eval mode.

    Raises:
        ModelError: files or weights are missing or damaged, or the weights are pickled.
    """
    check_model_folder(folder)
    transformers = import_transformers()
    try:
        _check_described_size(folder, transformers)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,  # else somebody at a terminal is asked whether to run a folder's code
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:  # as above
        raise ModelError(f"{folder} is not a model that transformers can load: {one_line(error)}") from error
    missing = sorted(loading["missing_keys"])  # tied weights do not count; all others would be left random
    if missing:
        raise ModelError(
            f"the weights of {folder} lack {missing[0]} ({len(missing)} of the model's tensors in all): "
            "the files are not complete, or config.json is another model's"
        )
    if getattr(model.config, "attn_logit_softcapping", None):  # as Gemma 2; torch's fused attention would leave it out
        model.set_attn_implementation("eager")
    return model.to(distributed.loading_device()).eval()


def _check_described_size(folder: Path, transformers: Any) -> None:
    """Weights that config.json describes and no file holds would be made, and could fill the memory."""
    from safetensors import safe_open

    files = list(folder.glob("*.safetensors"))
    tensors = 0
    for path in files:
        with safe_open(path, framework="pt") as weights:
            tensors += len(weights.keys())
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > tensors:
        raise ModelError(f"{folder}/config.json describes {layers} layers, but its weights have {tensors} tensors")
    with torch.device("meta"):  # shapes alone
        described = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    parameters, size = sum(p.numel() for p in described.parameters()), sum(path.stat().st_size for path in files)
    if parameters > size:  # in any of the formats that are read, a parameter has at least a byte
        raise ModelError(f"{folder}/config.json describes {parameters} parameters, but its weights have {size} bytes")


def choose_dtype(name: str) -> torch.dtype:
    """`auto`: bfloat16 on a GPU and on CPUs that multiply it natively, else float32.

    Other CPUs emulate bfloat16 at half the speed of float32; those with the instructions are twice as fast in it.
    """
    if name == "auto":
        cpu = torch.cpu.get_capabilities()
        native = torch.cuda.is_available() or cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)
        return torch.bfloat16 if native else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def save_causal_lm(
    model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a plain folder that `transformers` loads with no code of ours; `weights` in place of the model's own.

    The weights are written by safetensors itself: `save_pretrained` would import DeepSpeed for it.

    Raises:
        ModelError: the tokenizer has no chat template: nobody could talk with the model. Nothing is written.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder} is not written: the tokenizer has no chat template, so nobody could serve the model"
        )
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {
        name: tensor.detach().to(dtype).cpu().contiguous()
        for name, tensor in (weights or model.state_dict()).items()
        if name not in tied
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("quantization_config", None)  # the weights written here are plain
    type(model.config).from_dict(config).save_pretrained(folder)
    generation = import_transformers().GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
