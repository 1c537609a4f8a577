"""TRL's trainers at the work that `trainers.py` writes down: run by the interpreter of .venv-trl, without saferlhf.

    .venv-trl/bin/python tests/benchmarks/trl_peer.py WORK.json

The last line of its output is JSON: seconds of the training loop, peak memory of the process, held-out quality.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer

COMMON = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}


class Clock(TrainerCallback):
    """When each optimiser step (in PPO: each rollout batch with its updates) ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.ends.append(time.perf_counter())


def lora(work: dict[str, Any], task: str) -> LoraConfig:
    return LoraConfig(r=work["rank"], lora_alpha=work["alpha"], target_modules="all-linear", task_type=task)


def precision(work: dict[str, Any]) -> tuple[torch.dtype, bool]:
    """What the weights are, and whether the trainer is told to mix."""
    return getattr(torch, work["dtype"]), work["dtype"] == "bfloat16"


def train_ppo(work: dict[str, Any], folder: str) -> dict[str, float]:
    """Four roles: policy, reference, reward and value model. With `lora` the policy is an adapter; the value model is
    trained whole in any case, as this trainer has no other way."""
    dtype, mixed = precision(work)
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    policy = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = None  # every answer has its full length
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=dtype) for _ in range(2)
    )
    batch, minibatch = work["episodes"], work["minibatch"]
    clock = Clock()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=folder,
            # its accelerator updates once in so many minibatches: once in each
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            num_mini_batches=batch // minibatch,
            local_rollout_forward_batch_size=batch,
            num_ppo_epochs=1,
            total_episodes=batch * work["steps"],
            response_length=work["answer"],
            temperature=0.7,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=mixed,
            **COMMON,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None if work["lora"] else AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype),
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": work["prompts"]}),
        eval_dataset=Dataset.from_dict({"input_ids": work["prompts"][:1]}),
        peft_config=lora(work, "CAUSAL_LM") if work["lora"] else None,
        callbacks=[clock],
    )
    trainer.train()
    steps = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    return {"seconds": min(steps[1:]), "peak_bytes": peak()}


def train_sft(work: dict[str, Any], folder: str) -> dict[str, float]:
    dtype, mixed = precision(work)

    def rows(name: str) -> Dataset:
        return Dataset.from_dict(
            {
                "input_ids": [prompt + answer for prompt, answer in work[name]],
                "labels": [[-100] * len(prompt) + answer for prompt, answer in work[name]],
            }
        )

    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype),
        args=SFTConfig(**training(work, folder, mixed), max_length=None),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        train_dataset=rows("training"),
        eval_dataset=rows("held_out"),
        peft_config=lora(work, "CAUSAL_LM"),
        callbacks=[clock],
    )
    return supervised(trainer, clock, "eval_loss")


def train_reward(work: dict[str, Any], folder: str) -> dict[str, float]:
    dtype, mixed = precision(work)

    def rows(name: str) -> Dataset:
        high, low = zip(*work[name], strict=True)
        return Dataset.from_dict({"chosen_ids": list(high), "rejected_ids": list(low)})

    clock = Clock()
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=dtype),
        args=RewardConfig(**training(work, folder, mixed), max_length=None),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        train_dataset=rows("training"),
        eval_dataset=rows("held_out"),
        peft_config=lora(work, "SEQ_CLS"),
        callbacks=[clock],
    )
    return supervised(trainer, clock, "eval_accuracy")


def supervised(trainer: Any, clock: Clock, quality: str) -> dict[str, float]:
    """Train, read the memory before it is evaluated, evaluate."""
    trainer.train()
    outcome = {"seconds": clock.ends[-1] - clock.ends[0], "peak_bytes": peak()}
    return outcome | {"quality": trainer.evaluate()[quality]}


def peak() -> int:
    """Most memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def training(work: dict[str, Any], folder: str, mixed: bool) -> dict[str, Any]:
    """Arguments that the two supervised trainers share; those of the optimiser are saferlhf's."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": work["batch_size"],
        "per_device_eval_batch_size": len(work["held_out"]),  # in one batch a mean is one over all tokens
        "num_train_epochs": 1,
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": work["warmup_share"],
        "adam_beta2": 0.95,
        "gradient_checkpointing": False,
        "bf16": mixed,
        **COMMON,
    }


TRAINERS = {"ppo": train_ppo, "sft": train_sft, "reward": train_reward}


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        outcome = TRAINERS[work["kind"]](work, folder)
    print(json.dumps({"quality": None, **outcome}))


if __name__ == "__main__":
    main()
