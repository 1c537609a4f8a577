"""Rollout engines on the same prompts, beside plain `generate` of transformers, and beside what the machine allows.

    python -m tests.benchmarks.rollout [FOLDER]

FOLDER is a model folder (SmolLM2-135M-Instruct by default). vLLM is measured where SAFERLHF_VLLM_PYTHON names the
interpreter that has it. OMP_NUM_THREADS limits the threads of all of them, if it is set.

The floor is the least time that a decoding step of all prompts could take: every weight read once at the bandwidth of
the memory, or every multiplication made at the rate of a large matrix product, whichever takes longer. Both are
measured here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from components.foundation.backbone import Backbone
from components.foundation.base_model import pull_smol
from components.foundation.batching import ChatEncoder, TokenSequence, collate, token_log_probs
from components.foundation.language_model import choose_dtype, import_transformers
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.rollout import Rollout, RolloutEngine, Sampling
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.rollout.vllm_engine import VllmEngine
from components.foundation.setting_sections import LoraSettings
from tests.benchmarks.machine import this_machine

TEXTS = [f"Tell me something about the number {number}, and why people like it." for number in range(64)]
SAMPLING = Sampling(temperature=0.7, max_new_tokens=32, seed=0)
LORA = LoraSettings(top_layers=16)
REPEATS = 3


def drift(backbone: Backbone, prompts: list[tuple[int, ...]], rollout: Rollout) -> float:
    """Mean |difference| of the engine's and the trainer's log-probabilities, in nats a token."""
    difference, tokens = 0.0, 0
    for prompt, answer, log_probs in zip(prompts, rollout.answers, rollout.log_probs, strict=True):
        batch = collate([TokenSequence(prompt, answer)], backbone.eos_token_id, backbone.device)
        with backbone.role(ACTOR):
            logits = backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)
        own = token_log_probs(logits, batch.answers, SAMPLING.temperature)[0]
        difference += float((own - torch.tensor(log_probs, device=own.device)).abs().sum())
        tokens += len(answer)
    return difference / tokens


def speeds(answer: Callable[[], int]) -> list[float]:
    """Answer tokens a second, of each repetition after a first one that warms up; the fastest first."""
    answer()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        tokens = answer()
        found.append(tokens / (time.perf_counter() - started))
    return sorted(found, reverse=True)


def told(name: str, found: list[float], peer: float | None, more: str = "") -> None:
    ratio = "" if peer is None else f"; {found[0] / peer:.2f} times plain generate"
    print(f"{name}: {' '.join(f'{s:.0f}' for s in found)} tokens/s{ratio}{more}", flush=True)


def measure(
    name: str, engine: RolloutEngine, backbone: Backbone, prompts: list[tuple[int, ...]], peer: float | None
) -> None:
    started = time.perf_counter()
    rollout = engine.generate(prompts, SAMPLING)
    first = time.perf_counter() - started

    def answer() -> int:
        return sum(map(len, engine.generate(prompts, SAMPLING).answers))

    found = speeds(answer)
    told(name, found, peer, f"; first batch after {first:.1f} s; drift {drift(backbone, prompts, rollout):.4f}")


def plain_generate(folder: Path, prompts: list[tuple[int, ...]], eos: int) -> tuple[list[float], int]:
    """One call of transformers' own `generate` for all prompts, with an adapter of the same size on the same layers:
    (answer tokens a second, parameters of model and adapter)."""
    transformers = import_transformers()
    from peft import LoraConfig, get_peft_model

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=choose_dtype("auto"))
    depth = model.config.num_hidden_layers
    config = LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.alpha,
        target_modules="all-linear",
        layers_to_transform=list(range(depth - LORA.top_layers, depth)),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config).eval()
    batch = collate([TokenSequence(prompt, ()) for prompt in prompts], eos, model.device)

    def answer() -> int:
        torch.manual_seed(SAMPLING.seed)
        ids = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=True,
            temperature=SAMPLING.temperature,
            top_k=0,
            max_new_tokens=SAMPLING.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        rows = ids[:, batch.input_ids.shape[1] :].tolist()
        return sum(row.index(eos) + 1 if eos in row else len(row) for row in rows)

    return speeds(answer), sum(p.numel() for p in model.parameters())


def least_seconds(act: Callable[[], object]) -> float:
    act()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        act()
        found.append(time.perf_counter() - started)
    return min(found)


def tell_floor(parameters: int, dtype: torch.dtype, rows: int) -> None:
    """Tokens a second that no engine could exceed here with so many rows at a time."""
    size = dtype.itemsize
    memory = torch.ones(
        1 << 28, dtype=torch.uint8
    )  # larger than any cache, and written: an untouched page is no memory
    bandwidth = memory.numel() / least_seconds(lambda: memory.view(torch.int64).sum())
    matrix = torch.randn(2048, 2048, dtype=dtype)
    rate = 2 * 2048**3 / least_seconds(lambda: matrix @ matrix)
    reading, multiplying = parameters * size / bandwidth, 2 * parameters * rows / rate
    print(
        f"floor: {bandwidth / 1e9:.1f} GB/s and {rate / 1e9:.0f} GFLOP/s; a step of {rows} rows reads its weights in "
        f"{reading * 1e3:.0f} ms and multiplies for {multiplying * 1e3:.0f} ms: "
        f"{rows / max(reading, multiplying):.0f} tokens/s"
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else pull_smol()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if torch.cuda.is_available():
        raise SystemExit("plain generate and the floor are measured on the CPU: set CUDA_VISIBLE_DEVICES= to compare")
    print(f"{this_machine()}; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    backbone = Backbone.load(folder, "auto", seed=0)
    backbone.add_role(ACTOR, LORA, scored=False)
    for parameter in backbone.trainable_parameters(ACTOR):
        torch.nn.init.normal_(parameter, std=0.01)
    encoder = ChatEncoder(backbone.tokenizer, 48, SAMPLING.max_new_tokens)
    prompts = [encoder.prompt(text) for text in TEXTS]
    print(f"{folder.name}, {backbone.dtype}, {len(prompts)} prompts, up to {SAMPLING.max_new_tokens} tokens each")
    plain, parameters = plain_generate(folder, prompts, backbone.eos_token_id)
    told("plain generate", plain, None)
    measure("transformers engine", TransformersEngine(backbone, ACTOR), backbone, prompts, plain[0])
    tell_floor(parameters, backbone.dtype, len(prompts))
    if "SAFERLHF_VLLM_PYTHON" in os.environ:
        for weights in ("adapter", "full"):
            settings = PpoSettings(vllm_weights=weights)
            with closing(VllmEngine(backbone, ACTOR, folder, settings)) as engine:
                measure(f"vllm ({weights})", engine, backbone, prompts, plain[0])


if __name__ == "__main__":
    main()
