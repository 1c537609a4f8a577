"""Loads an exported model as its users will and answers one question: `python -I trial_program.py FOLDER QUESTION`.

It runs in a process of its own and imports transformers alone, nothing of this project. The answer is printed as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import transformers

LONGEST_ANSWER = 32
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def answer(folder: str, question: str) -> str:
    """Greedy, on the CPU, where there is room whatever else uses the accelerators."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **_LOCAL, dtype="auto")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    print(json.dumps({"answer": answer(*sys.argv[1:])}))
