"""The training stages against TRL's trainers: the same tokens, the same optimiser, one after the other.

    python -m tests.benchmarks.trainers [ppo] [sft] [reward]

The default is all three. TRL is run by the interpreter that SAFERLHF_TRL_PYTHON names (`make bench-trainers` makes its
environment). Every figure is of a process of its own, whose peak memory is its own, too. Model: SmolLM2-135M-Instruct.

- ppo: episodes a second, the second of two steps: 32 + 32 tokens, one epoch, no answer ends early.
  saferlhf has six roles, TRL four and no costs.
- sft, reward: training tokens a second (padding not counted), and what the trained model is worth on held-out data.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from components.foundation.backbone import Backbone
from components.foundation.base_model import pull_smol
from components.foundation.batching import (
    ChatEncoder,
    TokenSequence,
    answer_cross_entropy,
    answer_tokens,
    batches_by_length,
    collate,
)
from components.foundation.language_model import choose_dtype, load_tokenizer
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference_trainer import (
    ScoredPair,
    ranking_accuracy,
    score_validation,
    train_preference_model,
)
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.setting_sections import DataSettings, LoraSettings, PreferenceModelSettings, SftSettings
from components.ppo_lagrangian.episode import COST, COST_CRITIC, REWARD, REWARD_CRITIC
from components.ppo_lagrangian.multiplier import CostConstraint
from components.ppo_lagrangian.trainer import PpoLagrangian
from components.prepare_data.prepare_data import PreparedData, load_all
from components.reward_model.loss import reward_loss
from components.reward_model.reward_model import helpful_pair
from components.sft.sft import train_sft
from tests.benchmarks.machine import this_machine

GB = 1e9
LORA = LoraSettings(rank=16, alpha=32)
EPISODES, PROMPT, ANSWER, MINIBATCH, STEPS = 32, 32, 32, 8, 2
TRAINING, HELD_OUT, MAX_LENGTH = 256, 96, 96
NEVER_DRAWN = "<reponame>"
"""Stands for EOS where every answer is to have its full length."""


@dataclass(frozen=True)
class Outcome:
    """`quality`: loss or accuracy on held-out data; none for PPO."""

    seconds: float
    peak_bytes: float
    quality: float | None = None


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def in_own_process(measure: Callable[[], Outcome]) -> Outcome:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure).result()


def by_trl(work: dict[str, Any]) -> Outcome:
    program = Path(__file__).parent / "trl_peer.py"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "work.json"
        common = {"model": str(pull_smol()), "dtype": dtype_name(), "rank": LORA.rank, "alpha": LORA.alpha}
        file.write_text(json.dumps(common | work), encoding="utf-8")
        command = [os.environ["SAFERLHF_TRL_PYTHON"], str(program), str(file)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"TRL's {work['kind']} trainer failed:\n{run.stderr[-3000:]}")
    return Outcome(**json.loads(run.stdout.splitlines()[-1]))


def dtype_name() -> str:
    return str(choose_dtype("auto")).removeprefix("torch.")


def ppo_prompts() -> list[tuple[int, ...]]:
    """The first tokens of shipped demonstrations: text, so that the model has something to go on with."""
    tokenizer = load_tokenizer(pull_smol())
    ids = (tokenizer.encode(f"{r.prompt} {r.response}") for r in shipped_data().demonstrations.records)
    return [tuple(row[:PROMPT]) for row in ids if len(row) >= PROMPT][:EPISODES]


def shipped_data() -> PreparedData:
    return load_all(DataSettings())


def own_ppo(prompts: list[tuple[int, ...]], top_layers: int, critics: str) -> Outcome:
    backbone = Backbone.load(pull_smol(), "auto", seed=0)
    backbone.eos_token_id = backbone.tokenizer.convert_tokens_to_ids(NEVER_DRAWN)
    adapter = LORA.model_copy(update={"top_layers": top_layers})
    backbone.add_role(ACTOR, adapter, scored=False)
    for model, critic in ((REWARD, REWARD_CRITIC), (COST, COST_CRITIC)):
        backbone.add_role(model, adapter, scored=True)
        if critics == "head":
            backbone.add_head(critic, model)
        else:
            backbone.add_role(critic, adapter, scored=True)
    settings = PpoSettings(
        episodes_per_step=EPISODES, minibatch_size=MINIBATCH, max_new_tokens=ANSWER, critics=critics, epochs=1
    )
    trainer = PpoLagrangian(backbone, TransformersEngine(backbone, ACTOR), settings, CostConstraint(0.0), seed=0)
    seconds = []
    for step in range(STEPS):
        started = time.perf_counter()
        trainer.step(prompts, step)
        seconds.append(time.perf_counter() - started)
    return Outcome(min(seconds[1:]), peak())


def compare_ppo() -> None:
    prompts = ppo_prompts()
    work = {
        "kind": "ppo",
        "prompts": prompts * STEPS,
        "episodes": EPISODES,
        "minibatch": MINIBATCH,
        "answer": ANSWER,
        "steps": STEPS,
    }
    print(f"\n{EPISODES} episodes of {PROMPT} + {ANSWER} tokens, minibatches of {MINIBATCH}, one epoch")
    print("\n| | roles | episodes/s | GB at most |\n|---|---:|---:|---:|")
    ways: list[tuple[str, int, Callable[[], Outcome]]] = [
        ("TRL, policy and value model trained whole", 4, partial(by_trl, work | {"lora": False})),
        ("TRL, policy as an adapter", 4, partial(by_trl, work | {"lora": True})),
    ]
    for top_layers, where in ((0, "all layers"), (16, "the top 16 of 30 layers")):
        for critics in ("adapter", "head"):
            own = partial(in_own_process, partial(own_ppo, prompts, top_layers, critics))
            ways.append((f"saferlhf, adapters on {where}, `ppo.critics={critics}`", 6, own))
    for name, roles, measure in ways:
        outcome = measure()
        print(f"| {name} | {roles} | {EPISODES / outcome.seconds:.2f} | {outcome.peak_bytes / GB:.1f} |", flush=True)


def own_sft(training: list[TokenSequence], held_out: list[TokenSequence], settings: SftSettings) -> Outcome:
    backbone = Backbone.load(pull_smol(), "auto", seed=0)
    backbone.add_role("sft", LORA, scored=False)
    started = time.perf_counter()
    train_sft(backbone, "sft", training, settings, 0, lambda *_: None)
    seconds, most = time.perf_counter() - started, peak()
    loss = 0.0
    for rows in batches_by_length([len(s) for s in held_out], 32):
        batch = collate([held_out[i] for i in rows], backbone.eos_token_id, backbone.device)
        with backbone.role("sft"):
            logits = backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)
            loss += answer_cross_entropy(logits, batch, answer_tokens(held_out).sum()).item()
    return Outcome(seconds, most, loss)


def compare_sft() -> None:
    settings = SftSettings(learning_rate=2e-3, batch_size=8, max_length=MAX_LENGTH)
    encoder = ChatEncoder(load_tokenizer(pull_smol()), MAX_LENGTH // 2, MAX_LENGTH // 2)
    examples = [encoder.sequence(r.prompt, r.response) for r in shipped_data().demonstrations.records]
    training, held_out = examples[:TRAINING], examples[TRAINING:][:HELD_OUT]
    work = {
        "kind": "sft",
        "training": [(s.prompt, s.answer) for s in training],
        "held_out": [(s.prompt, s.answer) for s in held_out],
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "warmup_share": settings.warmup_share,
    }
    print_supervised(
        f"{len(training)} demonstrations, adapters of rank {LORA.rank} on all layers",
        "held-out loss",
        sum(map(len, training)),
        by_trl(work),
        in_own_process(partial(own_sft, training, held_out, settings)),
    )


def own_reward(
    training: list[ScoredPair], held_out: list[ScoredPair], settings: PreferenceModelSettings, top_layers: int
) -> Outcome:
    backbone = Backbone.load(pull_smol(), "auto", seed=0)
    backbone.add_role(REWARD, LORA.model_copy(update={"top_layers": top_layers}), scored=True)
    loss = partial(reward_loss, regularization=settings.regularization)
    started = time.perf_counter()
    train_preference_model(backbone, REWARD, training, settings, loss, 0, lambda *_: None)
    seconds, most = time.perf_counter() - started, peak()
    return Outcome(seconds, most, ranking_accuracy(score_validation(backbone, REWARD, held_out, 32)))


def compare_reward() -> None:
    # the two regularisers differ, so there is none
    settings = PreferenceModelSettings(learning_rate=1e-3, batch_size=8, max_length=MAX_LENGTH, regularization=0)
    encoder = ChatEncoder(load_tokenizer(pull_smol()), MAX_LENGTH // 2, MAX_LENGTH // 2)
    pairs = [helpful_pair(record, encoder) for record in shipped_data().preferences.records]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    training, held_out = ([pairs[i] for i in part] for part in (order[:TRAINING], order[-HELD_OUT:]))

    def rows(some: list[ScoredPair]) -> list[tuple[tuple[int, ...], ...]]:
        return [(p.high.prompt + p.high.answer, p.low.prompt + p.low.answer) for p in some]

    work = {
        "kind": "reward",
        "training": rows(training),
        "held_out": rows(held_out),
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "warmup_share": 0.05,
    }
    print_supervised(
        f"{len(training)} preference pairs, adapters of rank {LORA.rank}",
        "held-out accuracy",
        sum(len(p.high) + len(p.low) for p in training),
        by_trl(work),
        in_own_process(partial(own_reward, training, held_out, settings, 0)),
        in_own_process(partial(own_reward, training, held_out, settings, 16)),
    )


def print_supervised(title: str, quality: str, tokens: int, peer: Outcome, *own: Outcome) -> None:
    print(f"\n{title}\n\n| | tokens/s | {quality} | GB at most |\n|---|---:|---:|---:|")
    names = ("TRL, all layers", "saferlhf, all layers", "saferlhf, top 16 of 30 layers")
    for name, outcome in zip(names, (peer, *own), strict=False):
        speed = tokens / outcome.seconds
        print(f"| {name} | {speed:.0f} | {outcome.quality:.3f} | {outcome.peak_bytes / GB:.1f} |", flush=True)


COMPARISONS = {"ppo": compare_ppo, "sft": compare_sft, "reward": compare_reward}


def main() -> None:
    chosen = sys.argv[1:] or list(COMPARISONS)
    if unknown := set(chosen) - set(COMPARISONS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; choose of {', '.join(COMPARISONS)}")
    if "SAFERLHF_TRL_PYTHON" not in os.environ:
        raise SystemExit("SAFERLHF_TRL_PYTHON must name an interpreter that has TRL: make bench-trainers sets it")
    if torch.cuda.is_available():
        raise SystemExit("TRL's trainers are told to use the CPU: set CUDA_VISIBLE_DEVICES= to compare")
    print(this_machine())
    for name in chosen:
        COMPARISONS[name]()


if __name__ == "__main__":
    main()
