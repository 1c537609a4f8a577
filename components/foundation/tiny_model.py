"""Random language models of two layers, for tests and the profile `tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from components.foundation.language_model import import_transformers, save_causal_lm


def save_tiny(architecture: str, folder: Path) -> None:
    """Write a model of an architecture (llama, gpt2, qwen2, gemma) with a byte-level tokenizer; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = import_transformers().AutoModelForCausalLM.from_config(_config(architecture))
    save_causal_lm(model, _byte_tokenizer(), folder, torch.float32)


def _config(architecture: str) -> Any:
    transformers = import_transformers()
    common = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    if architecture == "gpt2":
        return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **common)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if architecture == "gemma":
        return transformers.GemmaConfig(head_dim=8, **sizes, **common)
    kind = transformers.Qwen2Config if architecture == "qwen2" else transformers.LlamaConfig
    return kind(**sizes, **common)


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    wrapped = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_start|>{% endfor %}"
    return wrapped
