"""GGUF -> a plain Hugging Face folder: `python -m components.foundation.gguf_conversion FILE FOLDER`.

A process of its own, because transformers reads GGUF with Accelerate, which `import_transformers` hides from every
other process of ours to save its import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from components.foundation.errors import ModelError

# ChatML without a default system message: twenty fewer tokens in front of every prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PADDING = "<|endoftext|>"  # a file may declare padding = EOS; this one is in every ChatML vocabulary


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file with a ChatML vocabulary into bfloat16 safetensors, tokenizer and chat template.

    Raises:
        ModelError: the file cannot be converted, with the last line of what transformers said.
    """
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        [sys.executable, "-m", "components.foundation.gguf_conversion", str(gguf), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ModelError(f"{gguf} cannot be converted to a Hugging Face folder: {reason}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    from components.foundation.language_model import save_causal_lm

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.pad_token = PADDING
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    save_causal_lm(model, tokenizer, folder, torch.bfloat16)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
