"""Six roles of PPO-Lagrangian on one backbone: seconds and memory of a step.

Measured with adapters on all layers and on the upper half (the roles then share the lower half's work), each with and
without activation checkpointing.

    python -m tests.benchmarks.one_card [SHAPE]

SHAPE is 7b (Llama-2-7B's: for one GPU of 80 GB) or 135m (SmolLM2's; the default, for a CPU). Weights are random, and
nothing is downloaded: speed and memory do not depend on what a model has learned. Every role is an adapter of rank 16;
what six models of their own would need is told beside it, as arithmetic.
"""

from __future__ import annotations

import itertools
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from components.foundation.backbone import Backbone
from components.foundation.base_model import make_tiny
from components.foundation.language_model import choose_dtype, import_transformers, load_tokenizer
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.setting_sections import LoraSettings
from components.ppo_lagrangian.episode import COST, COST_CRITIC, REWARD, REWARD_CRITIC
from components.ppo_lagrangian.multiplier import CostConstraint
from components.ppo_lagrangian.trainer import PpoLagrangian

SHAPES: dict[str, dict[str, int | bool]] = {
    "7b": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
ROLES = {ACTOR: False, REWARD: True, COST: True, REWARD_CRITIC: True, COST_CRITIC: True}
GB = 1e9


@dataclass(frozen=True)
class Load:
    """A step's work: episodes, tokens of each prompt and answer, episodes in a minibatch."""

    episodes: int
    prompt: int
    answer: int
    minibatch: int


LOADS = {"7b": Load(episodes=64, prompt=256, answer=256, minibatch=8), "135m": Load(16, 64, 64, 8)}


@dataclass(frozen=True)
class Step:
    """One step of PPO-Lagrangian.

    Attributes:
        base_bytes, base_parameters: of the weights that all roles share.
        at_rest: bytes before the first step, and at most, `peak`: of the GPU, or on a CPU of the process in all.
        rollout_seconds: of `seconds`.
        tokens: of its answers.
    """

    base_bytes: int
    base_parameters: int
    at_rest: float
    peak: float
    rollout_seconds: float
    seconds: float
    tokens: int


def random_model(shape: str) -> Any:
    transformers = import_transformers()
    config = transformers.LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=choose_dtype("auto"), attn_implementation="sdpa"
        )
    return model.eval()


def memory() -> float:
    """The peak until now."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def measure(shape: str, top_layers: int, checkpoints_activations: bool) -> Step:
    """The second of two steps: the first warms up. In a process of its own, whose peak memory is its own, too."""
    model, tokenizer = random_model(shape), load_tokenizer(make_tiny("llama"))
    base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    base_parameters = sum(p.numel() for p in model.parameters())
    backbone = Backbone(model, tokenizer, checkpoints_activations=checkpoints_activations)
    for role, scored in ROLES.items():
        backbone.add_role(role, LoraSettings(rank=16, alpha=32, top_layers=top_layers), scored=scored)
    load = LOADS[shape]
    settings = PpoSettings(episodes_per_step=load.episodes, minibatch_size=load.minibatch, max_new_tokens=load.answer)
    engine = TransformersEngine(backbone, ACTOR)
    trainer = PpoLagrangian(backbone, engine, settings, CostConstraint(0.0), seed=0)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(row) for row in torch.randint(250, (load.episodes, load.prompt), generator=generator).tolist()]
    at_rest = memory()
    trainer.step(prompts, 0)
    started = time.perf_counter()
    metrics = trainer.step(prompts, 1)
    seconds = time.perf_counter() - started
    tokens = load.episodes * load.answer  # random weights end an answer once in tens of thousands of tokens
    rollout_seconds = tokens / metrics.rollout_tokens_per_second
    return Step(base_bytes, base_parameters, at_rest, memory(), rollout_seconds, seconds, tokens)


def main() -> None:
    shape = sys.argv[1] if len(sys.argv) > 1 else "135m"
    if shape not in SHAPES:
        raise SystemExit(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    load = LOADS[shape]
    work = f"{load.episodes} episodes of {load.prompt} + {load.answer} tokens, minibatches of {load.minibatch}"
    print(f"{shape} on {device}, {choose_dtype('auto')}: {work}")
    print(
        "\n| adapters | activation checkpointing | GB at rest | GB at most | s a step | rollout, s | answer tokens/s |"
    )
    print("|---|---|---:|---:|---:|---:|---:|")
    depth = int(SHAPES[shape]["num_hidden_layers"])
    for top_layers, again in itertools.product((depth, depth // 2), (False, True)):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            step = process.submit(measure, shape, top_layers, again).result()
        print(
            f"| top {top_layers} of {depth} layers | {'on' if again else 'off'} "
            f"| {step.at_rest / GB:.1f} | {step.peak / GB:.1f} | {step.seconds:.1f} "
            f"| {step.rollout_seconds:.1f} | {step.tokens / step.seconds:.0f} |",
            flush=True,
        )
    weights = step.base_bytes / GB
    print(f"\nOne backbone: {weights:.1f} GB. Six models with adapters: {6 * weights:.1f} GB, before activations.")
    # bf16 weights; and of those that are trained gradients, and in fp32 weights and Adam's two moments
    trained_whole = (3 * 2 + 3 * (2 + 2 + 12)) * step.base_parameters / GB
    print(f"Six models in bf16, three of them trained whole: {trained_whole:.0f} GB.")


if __name__ == "__main__":
    main()
