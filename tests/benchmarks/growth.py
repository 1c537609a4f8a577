"""How a PPO-Lagrangian step grows with its episodes, tokens, layers and ranks, and what larger models would take.

    python -m tests.benchmarks.growth            # (20 minutes on two cores) all of it
    python -m tests.benchmarks.growth ranks      # a step on the ranks that torchrun has started, for the last curve

Six roles with SmolLM2-135M's shape, adapters of rank 16 on the upper half of the layers, critics as heads, one epoch.
Each curve changes one size. A slope is the exponent of the power law through the curve's last two points: 1 is
proportional. The extrapolation is arithmetic on the named hardware's data sheet, not a measurement.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch

from components.foundation import distributed
from components.foundation.language_model import choose_dtype
from tests.benchmarks.machine import this_machine
from tests.benchmarks.six_roles import GB, SHAPES, Layout, Load, Shape, Step, measure, operations

EPISODES = (8, 16, 32, 64, 128, 256)
ANSWER = (32, 64, 128, 256, 512, 1024)
LAYERS = (2, 4, 8, 15, 30)
RANKS = (1, 2)
MODEL = SHAPES["135m"]
LOAD = Load(episodes=32, prompt=32, answer=32)


@dataclass(frozen=True)
class Hardware:
    """Cards of one kind: each one's dense bf16 operations a second and bytes a second of memory, by its data sheet."""

    name: str
    cards: int
    rate: float
    bandwidth: float


H100 = Hardware("H100 SXM (989 TFLOP/s bf16, 3.35 TB/s)", 1, 989e12, 3.35e12)
USED = 0.4
"""Share of the card's rate that large matrix products with what lies between them are assumed to reach."""
BATCH = 64
"""Episodes that the engine decodes at a time, its default."""
CLUSTER_LOAD = Load(episodes=512, prompt=512, answer=512)


def upper_half(shape: Shape) -> Layout:
    return Layout(math.ceil(shape.num_hidden_layers / 2), critics="head")


def alone(shape: Shape, load: Load) -> Step:
    """The step, measured in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, shape, load, upper_half(shape)).result()


def curve(name: str, sizes: Sequence[int], work: Callable[[int], tuple[Shape, Load]]) -> None:
    print(f"\n| {name} | s a step | rollout, s | GB at most | GFLOP/s | slope |\n|---:|---:|---:|---:|---:|---:|")
    before: tuple[int, float] | None = None
    for size in sizes:
        shape, load = work(size)
        step = alone(shape, load)
        rate = operations(shape, load, upper_half(shape)).total / step.seconds / 1e9
        slope = f"{math.log(step.seconds / before[1]) / math.log(size / before[0]):.2f}" if before else ""
        before = size, step.seconds
        print(
            f"| {size} | {step.seconds:.1f} | {step.rollout_seconds:.1f} | {step.peak / GB:.1f} "
            f"| {rate:.0f} | {slope} |",
            flush=True,
        )


def step_on_ranks() -> None:
    """Run once a rank, with a thread each; the first prints the seconds."""
    torch.set_num_threads(1)
    with distributed.started(zero_stage=None) as world:
        step = measure(MODEL, LOAD, upper_half(MODEL))
        if world.is_main:
            print(f"{step.seconds:.1f} s, {step.peak / GB:.1f} GB of rank 0", flush=True)


def tell_ranks() -> None:
    for ranks in RANKS:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        told = subprocess.run(
            [*command, "-m", "tests.benchmarks.growth", "ranks"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).stdout
        print(f"{ranks} ranks of one thread: {told.strip()}", flush=True)


def tell_cluster(name: str, hardware: Hardware) -> None:
    """Seconds and memory of a step of a larger model, from operations and bytes alone.

    The engine decodes `BATCH` episodes at a time. A decoding step reads all weights once, or multiplies for the batch,
    whichever takes longer, and reads the keys and values of all tokens before. Everything else is multiplications.
    Work is assumed to divide evenly over the cards, and what they send each other to be hidden.
    """
    shape, load = SHAPES[name], CLUSTER_LOAD
    work = operations(shape, load, upper_half(shape))
    rate, bandwidth = USED * hardware.rate * hardware.cards, hardware.bandwidth * hardware.cards
    weights = 2 * (shape.num_hidden_layers * shape.layer_parameters + 2 * shape.head_parameters)
    readings = load.answer * math.ceil(load.episodes / BATCH)
    token = 4 * shape.num_hidden_layers * shape.hidden_size * shape.num_key_value_heads // shape.num_attention_heads
    cached = token * load.episodes * load.answer * (load.prompt + load.answer / 2)
    rollout = max(readings * weights / bandwidth, work.rollout / rate) + cached / bandwidth
    rest = (work.scoring + work.update) / rate
    print(
        f"""
{name} on {hardware.cards} x {hardware.name}, {load.episodes} episodes of {load.prompt} + {load.answer} tokens:
  weights in bf16 {weights / GB:.0f} GB; six models of their own {6 * weights / GB:.0f} GB
  keys and values of {BATCH} episodes {token * BATCH * (load.prompt + load.answer) / GB:.0f} GB
  rollout: {work.rollout / 1e15:.2f} PFLOP at {USED:.0%} of the rate {work.rollout / rate:.1f} s, or {readings} readings
    of the weights {readings * weights / bandwidth:.1f} s; and {cached / 1e12:.0f} TB of keys and values \
{cached / bandwidth:.1f} s
  scoring {work.scoring / 1e15:.2f} PFLOP, update {work.update / 1e15:.2f} PFLOP: {rest:.1f} s
  a step {rollout + rest:.1f} s, {load.episodes * load.answer / (rollout + rest):.0f} answer tokens/s"""
    )


def main() -> None:
    if sys.argv[1:] == ["ranks"]:
        step_on_ranks()
        return
    print(f"{this_machine()}; {torch.get_num_threads()} threads, {choose_dtype('auto')}")
    print(f"{LOAD.episodes} episodes of {LOAD.prompt} + {LOAD.answer} tokens but for the size that changes")
    curve("episodes", EPISODES, lambda size: (MODEL, replace(LOAD, episodes=size)))
    curve("answer tokens of 8 episodes", ANSWER, lambda size: (MODEL, replace(LOAD, episodes=8, answer=size)))
    curve("layers", LAYERS, lambda size: (replace(MODEL, num_hidden_layers=size), LOAD))
    print()
    tell_ranks()
    tell_cluster("7b", H100)
    tell_cluster("70b", replace(H100, cards=8))


if __name__ == "__main__":
    main()
