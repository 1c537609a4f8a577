"""A PPO-Lagrangian step of six roles on one backbone, with random weights: what it takes, and what it computes.

Nothing is downloaded: speed and memory do not depend on what a model has learned.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any, Literal

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

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, by the names of transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = False

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer."""
        grouped = self.hidden_size * self.num_key_value_heads // self.num_attention_heads
        return self.hidden_size * (2 * self.hidden_size + 2 * grouped + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size


SHAPES = {
    "135m": Shape(49_152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),  # SmolLM2-135M
    "7b": Shape(32_000, 4096, 11_008, 32, 32, 32),  # Llama-2-7B
    "70b": Shape(32_000, 8192, 28_672, 80, 64, 8),  # Llama-2-70B
}


@dataclass(frozen=True)
class Load:
    """A step's work: episodes, tokens of each prompt and of each answer, episodes in a minibatch."""

    episodes: int
    prompt: int
    answer: int
    minibatch: int = 8


@dataclass(frozen=True)
class Layout:
    """Where the roles' adapters are, and what the critics are (`lora.top_layers`, `ppo.critics`)."""

    top_layers: int
    critics: Literal["adapter", "head"] = "adapter"
    checkpoints_activations: bool = False


@dataclass(frozen=True)
class Step:
    """What a step took.

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


def measure(shape: Shape, load: Load, layout: Layout) -> Step:
    """One step, after a small one that warms up. In a process of its own, whose peak memory is its own, too."""
    model, tokenizer = _random_model(shape), load_tokenizer(make_tiny("llama"))
    base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    base_parameters = sum(p.numel() for p in model.parameters())
    backbone = Backbone(model, tokenizer, checkpoints_activations=layout.checkpoints_activations)
    adapter = LoraSettings(rank=16, alpha=32, top_layers=layout.top_layers)
    backbone.add_role(ACTOR, adapter, scored=False)
    for scorer, critic in ((REWARD, REWARD_CRITIC), (COST, COST_CRITIC)):
        backbone.add_role(scorer, adapter, scored=True)
        if layout.critics == "head":
            backbone.add_head(critic, scorer)
        else:
            backbone.add_role(critic, adapter, scored=True)
    at_rest = _memory()
    settings = PpoSettings(
        episodes_per_step=load.episodes,
        minibatch_size=load.minibatch,
        max_new_tokens=load.answer,
        critics=layout.critics,
        epochs=1,
    )
    trainer = PpoLagrangian(backbone, TransformersEngine(backbone, ACTOR), settings, CostConstraint(0.0), seed=0)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(row) for row in torch.randint(250, (load.episodes, load.prompt), generator=generator).tolist()]
    # the same trainer: with ranks, the actor's weights take one DeepSpeed engine
    trainer.step(prompts[: load.minibatch], 0)
    started = time.perf_counter()
    metrics = trainer.step(prompts, 1)
    seconds = time.perf_counter() - started
    tokens = load.episodes * load.answer  # random weights end an answer once in tens of thousands of tokens
    rollout_seconds = tokens / metrics.rollout_tokens_per_second
    return Step(base_bytes, base_parameters, at_rest, _memory(), rollout_seconds, seconds, tokens)


def _random_model(shape: Shape) -> Any:
    transformers = import_transformers()
    config = transformers.LlamaConfig(**vars(shape), max_position_embeddings=4096)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=choose_dtype("auto"), attn_implementation="sdpa"
        )
    return model.eval()


def _memory() -> float:
    """The peak until now."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions of the phases of a step; adapters, norms and sampling are left out."""

    rollout: float
    scoring: float
    update: float

    @property
    def total(self) -> float:
        return self.rollout + self.scoring + self.update


def operations(shape: Shape, load: Load, layout: Layout) -> Operations:
    """What a step computes, from its sizes.

    A token takes 2 operations a parameter of a layer, and 4 D for each earlier token that it attends to, half of the
    sequence on average. The backward pass takes as many as the forward pass: base weights need no gradient, only what
    flows through them does.
    """
    length = load.prompt + load.answer
    layer = length * (2 * shape.layer_parameters + 2 * shape.hidden_size * length)
    head = load.answer * 2 * shape.head_parameters
    critics = 2 if layout.critics == "adapter" else 0
    upper = layout.top_layers
    trunk = shape.num_hidden_layers - upper
    rollout = shape.num_hidden_layers * layer + head
    scoring = (trunk + (4 + critics) * upper) * layer + 2 * head  # actor, reference, reward, cost; two of them speak
    passes = 3 if layout.checkpoints_activations else 2
    update = passes * ((1 + critics) * upper * layer + head)
    return Operations(*(load.episodes * each for each in (rollout, scoring, update)))
