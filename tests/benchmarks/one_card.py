"""Six roles of PPO-Lagrangian on one backbone: seconds and memory of a step.

Measured with adapters on all layers and on the upper half (the roles then share the lower half's work), each with and
without activation checkpointing.

    python -m tests.benchmarks.one_card [SHAPE]

SHAPE is 7b (Llama-2-7B's: for one GPU of 80 GB) or 135m (SmolLM2's; the default, for a CPU). Weights are random.
Every role is an adapter of rank 16; what six models of their own would need is told beside it, as arithmetic.
"""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from components.foundation.language_model import choose_dtype
from tests.benchmarks.six_roles import GB, SHAPES, Layout, Load, measure, operations

LOADS = {"7b": Load(episodes=64, prompt=256, answer=256), "135m": Load(episodes=16, prompt=64, answer=64)}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "135m"
    if name not in LOADS:
        raise SystemExit(f"unknown shape {name!r}: choose one of {', '.join(LOADS)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    shape, load = SHAPES[name], LOADS[name]
    work = f"{load.episodes} episodes of {load.prompt} + {load.answer} tokens, minibatches of {load.minibatch}"
    print(f"{name} on {device}, {choose_dtype('auto')}: {work}")
    print(
        "\n| adapters | activation checkpointing | GB at rest | GB at most | s a step | rollout, s | answer tokens/s "
        "| TFLOP/s |\n|---|---|---:|---:|---:|---:|---:|---:|"
    )
    depth = shape.num_hidden_layers
    for top_layers, again in itertools.product((depth, depth // 2), (False, True)):
        layout = Layout(top_layers, checkpoints_activations=again)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            step = process.submit(measure, shape, load, layout).result()
        print(
            f"| top {top_layers} of {depth} layers | {'on' if again else 'off'} "
            f"| {step.at_rest / GB:.1f} | {step.peak / GB:.1f} | {step.seconds:.1f} "
            f"| {step.rollout_seconds:.1f} | {step.tokens / step.seconds:.0f} "
            f"| {operations(shape, load, layout).total / step.seconds / 1e12:.3f} |",
            flush=True,
        )
    weights = step.base_bytes / GB
    print(f"\nOne backbone: {weights:.1f} GB. Six models with adapters: {6 * weights:.1f} GB, before activations.")
    # bf16 weights; and of those that are trained gradients, and in fp32 weights and Adam's two moments
    trained_whole = (3 * 2 + 3 * (2 + 2 + 12)) * step.base_parameters / GB
    print(f"Six models in bf16, three of them trained whole: {trained_whole:.0f} GB.")


if __name__ == "__main__":
    main()
