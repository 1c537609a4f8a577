"""Start-up time and speed of both rollout engines on the same prompts.

    python -m tests.benchmarks.rollout [FOLDER]

FOLDER is a model folder (SmolLM2-135M-Instruct by default). SAFERLHF_VLLM_PYTHON names the interpreter that has vLLM.
OMP_NUM_THREADS limits the threads of both engines, if it is set.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from pathlib import Path

import torch

from components.foundation.backbone import Backbone
from components.foundation.base_model import pull_smol
from components.foundation.batching import ChatEncoder, TokenSequence, collate, token_log_probs
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.rollout import Rollout, RolloutEngine, Sampling
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.rollout.vllm_engine import VllmEngine
from components.foundation.setting_sections import LoraSettings

TEXTS = [f"Tell me something about the number {number}, and why people like it." for number in range(64)]
SAMPLING = Sampling(temperature=0.7, max_new_tokens=32, seed=0)


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


def measure(name: str, engine: RolloutEngine, backbone: Backbone, prompts: list[tuple[int, ...]]) -> None:
    started = time.perf_counter()
    engine.generate(prompts[:1], SAMPLING)
    first = time.perf_counter() - started
    speeds = []
    for _ in range(2):
        started = time.perf_counter()
        rollout = engine.generate(prompts, SAMPLING)
        speeds.append(sum(map(len, rollout.answers)) / (time.perf_counter() - started))
    print(
        f"{name}: first answer after {first:.1f} s; then {' '.join(f'{s:.0f}' for s in speeds)} tokens/s; "
        f"drift {drift(backbone, prompts, rollout):.4f}"
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else pull_smol()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    backbone = Backbone.load(folder, "auto", seed=0)
    backbone.add_role(ACTOR, LoraSettings(top_layers=16), scored=False)
    for parameter in backbone.trainable_parameters(ACTOR):
        torch.nn.init.normal_(parameter, std=0.01)
    encoder = ChatEncoder(backbone.tokenizer, 48, SAMPLING.max_new_tokens)
    prompts = [encoder.prompt(text) for text in TEXTS]
    print(f"{folder.name}, {backbone.dtype}, {len(prompts)} prompts, up to {SAMPLING.max_new_tokens} tokens each")
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    measure("transformers", TransformersEngine(backbone, ACTOR), backbone, prompts)
    for weights in ("adapter", "full"):
        settings = PpoSettings(vllm_weights=weights)
        with closing(VllmEngine(backbone, ACTOR, folder, settings)) as engine:
            measure(f"vllm ({weights})", engine, backbone, prompts)


if __name__ == "__main__":
    main()
