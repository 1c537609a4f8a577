"""Small trainings of every kind, to run on any number of ranks and compare; torchrun starts this file once a rank."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from components.cost_model.loss import cost_loss
from components.foundation import distributed, launch
from components.foundation.backbone import Backbone
from components.foundation.base_model import make_tiny
from components.foundation.batching import TokenSequence, collate
from components.foundation.errors import TrainingError
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference_trainer import (
    ScoredPair,
    answer_scores,
    score_validation,
    train_preference_model,
)
from components.foundation.role_optimizer import RoleOptimizer, make_optimizers
from components.foundation.rollout import Sampling
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.setting_sections import LoraSettings, PreferenceModelSettings, SftSettings
from components.foundation.settings import resolve_settings
from components.ppo_lagrangian.episode import COST, COST_CRITIC, REWARD, REWARD_CRITIC, safe_sequences
from components.ppo_lagrangian.multiplier import CostConstraint
from components.ppo_lagrangian.trainer import PpoLagrangian
from components.reward_model.loss import reward_loss
from components.sft.sft import train_sft

LORA = LoraSettings(rank=4, alpha=8)
Results = tuple[list[dict[str, float]], dict[str, torch.Tensor]]
"""(what each step reports, weights at the end)."""


def sequence(number: int) -> TokenSequence:
    """Prompts and answers of many lengths."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(250, (12,), generator=generator).tolist()
    return TokenSequence((256, *ids[: 2 + number % 5]), (*ids[6 : 7 + number % 4], 257))


def backbone_with(
    finetune: str, top_layers: int = 0, layers_again: bool = False, dtype: str = "float32", **roles: bool
) -> Backbone:
    """The tiny model with these roles, scored or not; their weights are moved away from where new ones start."""
    lora = LORA.model_copy(update={"top_layers": top_layers}) if finetune == "lora" else None
    backbone = Backbone.load(make_tiny("llama"), dtype, seed=0, checkpoints_activations=layers_again)
    for number, (role, scored) in enumerate(roles.items()):
        backbone.add_role(role, lora, scored=scored)
        generator, size = torch.Generator().manual_seed(number), 0.1 if finetune == "lora" else 0.02
        with torch.no_grad():
            for parameter in backbone.trainable_parameters(role):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return backbone


def sft(finetune: str, *, layers_again: bool = False) -> Results:
    """Seven examples in batches of three, so that the last batch leaves a rank without a part."""
    backbone, steps = backbone_with(finetune, layers_again=layers_again, sft=False), []
    settings = SftSettings(batch_size=3, epochs=2, learning_rate=1e-3)
    examples = [sequence(i) for i in range(7)]
    train_sft(backbone, "sft", examples, settings, 0, lambda step, total, metrics: steps.append(metrics))
    return steps, backbone.role_state("sft")


def preference_model(finetune: str, *, is_cost: bool) -> Results:
    """Seven pairs in batches of three; the last entry holds scores of all pairs, measured afterwards.

    The answers of one pair do not share their prompt, so that a rank may have rows of another kind than the other has.
    """
    backbone, steps = backbone_with(finetune, model=True), []
    settings = PreferenceModelSettings(batch_size=3, epochs=1, learning_rate=1e-3)
    loss = partial(cost_loss if is_cost else reward_loss, regularization=0.01)
    answers = [(sequence(2 * i), sequence(2 * i + 1)) for i in range(7)]
    answers = [(a, b if i == 3 else dataclasses.replace(b, prompt=a.prompt)) for i, (a, b) in enumerate(answers)]
    pairs = [ScoredPair(*pair, 1, -1 if i % 2 else 1) for i, pair in enumerate(answers)]
    train_preference_model(backbone, "model", pairs, settings, loss, 0, lambda step, total, m: steps.append(m))
    scores = score_validation(backbone, "model", pairs, batch_size=3)
    return [*steps, {str(i): score for i, score in enumerate(scores.high.tolist())}], backbone.role_state("model")


def ppo(finetune: str, *, heads: bool = False) -> Results:
    """Five episodes a step in minibatches of two, the last of which leaves a rank without any; with PTX and a trunk.
    The actor ends as the mean of its steps, and between them is loaded anew from what a checkpoint would keep; the last
    entry is of logits that every rank computes with it.

    `heads` are critics that are heads, as in profile `smol`, with two passes over each rollout batch.
    """
    critics = {REWARD_CRITIC: REWARD, COST_CRITIC: COST}
    roles = {ACTOR: False, REWARD: True, COST: True} | ({} if heads else dict.fromkeys(critics, True))
    backbone = backbone_with(finetune, top_layers=1, **roles)
    settings = PpoSettings(
        steps=2,
        average_steps=2,
        episodes_per_step=5,
        minibatch_size=2,
        max_new_tokens=6,
        ptx_coefficient=0.5,
        opening_tokens=2,
        continuation_weight=0.5,
    )
    if heads:
        settings = settings.model_copy(update={"critics": "head", "epochs": 2})
        for critic, model in critics.items():
            backbone.add_head(critic, model)
    trainer = PpoLagrangian(
        backbone, TransformersEngine(backbone, ACTOR), settings, CostConstraint(0.0), 0, [sequence(i) for i in range(4)]
    )
    safe = safe_sequences(backbone, [sequence(i) for i in range(4, 20)])
    trainer.attack_demonstrations = [*safe, sequence(4)]
    prompts = [sequence(i).prompt for i in range(5)]
    steps = [dataclasses.asdict(trainer.step(prompts, 0))]
    own = list(backbone.role_state(ACTOR).values()), trainer.actor_mean.moments()
    trainer.actor_mean.load(*distributed.from_main(lambda: copy.deepcopy(own)))
    steps.append(dataclasses.asdict(trainer.step(prompts, 1)))
    for metrics in steps:
        del metrics["rollout_tokens_per_second"]
    steps.append({"safe answers": float(len(safe))})
    trainer.finish()
    batch = collate([sequence(3)], backbone.eos_token_id, backbone.device)
    with backbone.role(ACTOR):
        logits = backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)
    steps.append({"logits": logits.square().mean().item()})
    weights = {
        f"{role}/{name}": tensor
        for role in (ACTOR, REWARD_CRITIC, COST_CRITIC)
        for name, tensor in backbone.role_state(role).items()
    }
    return steps, weights


def optimizer_state(finetune: str) -> Results:
    """Three steps, and the third again by a fresh optimizer that loads the state after two, which is returned too."""
    sequences = [sequence(i) for i in range(5)]

    def started() -> tuple[Backbone, RoleOptimizer]:
        backbone = backbone_with(finetune, model=True)
        return backbone, make_optimizers(backbone, {"model": 1e-3})["model"]

    def step(backbone: Backbone, optimizer: RoleOptimizer) -> dict[str, float]:
        part = distributed.own_part(sequences)
        batch = collate(part.items, backbone.eos_token_id, backbone.device)
        with backbone.role("model", train=True):
            optimizer.backward(part.share * answer_scores(backbone, "model", batch).square().mean())
        return {"gradient_norm": optimizer.step(max_gradient_norm=1.0, loss=0.0)}

    first, fresh = started(), started()
    steps = [step(*first), step(*first)]
    own = first[0].role_state("model"), first[1].moments()
    parameters, moments = distributed.from_main(lambda: copy.deepcopy(own))
    steps.append(step(*first))
    third = first[0].role_state("model")
    fresh[1].load(list(parameters.values()), copy.deepcopy(moments))
    steps.append(step(*fresh))
    for name, tensor in fresh[0].role_state("model").items():
        assert torch.equal(tensor, third[name]), name
    return steps, third | moments


def prepared(finetune: str) -> Results:
    """Steps of a bfloat16 model, with and without a pass between them for which its adapter is rounded: how many of
    the tensors differ afterwards."""
    batch_of = [sequence(i) for i in range(4)]

    def trained(looks_between: bool) -> dict[str, torch.Tensor]:
        backbone = backbone_with(finetune, dtype="bfloat16", model=True)
        optimizer = make_optimizers(backbone, {"model": 1e-3})["model"]
        batch = collate(distributed.own_part(batch_of).items, backbone.eos_token_id, backbone.device)
        for _ in range(3):
            with backbone.role("model", train=True):
                optimizer.backward(answer_scores(backbone, "model", batch).square().mean())
            optimizer.step(max_gradient_norm=1.0, loss=0.0)
            if looks_between:
                with backbone.role("model"), backbone.prepared("model"):
                    answer_scores(backbone, "model", batch)
        return backbone.role_state("model")

    peaceful, looked_at = trained(looks_between=False), trained(looks_between=True)
    differing = sum(not torch.equal(tensor, looked_at[name]) for name, tensor in peaceful.items())
    return [{"differing": float(differing)}], {}


def generation(finetune: str) -> Results:
    """Answers of every rank's share, short and long, and how many gathers of weights each took."""
    backbone = backbone_with(finetune, actor=False)
    make_optimizers(backbone, {ACTOR: 1e-3})
    prompts = [sequence(i).prompt for i in range(5)]
    rows = range(distributed.world().rank, 5, distributed.world().size)
    steps: list[dict[str, float]] = []
    for longest in (2, 12):
        with counted_gathers() as gathers:
            rollout = TransformersEngine(backbone, ACTOR).generate(prompts, Sampling(1.0, longest, seed=0), list(rows))
        drawn = distributed.gathered(dict(zip(rows, rollout.answers, strict=True)))
        everyones = {row: answer for of_rank in drawn for row, answer in of_rank.items()}
        ids = {f"{row}/{place}": id_ for row, answer in everyones.items() for place, id_ in enumerate(answer)}
        steps.append({"gathers": len(gathers), **ids})
    return steps, backbone.role_state(ACTOR)


@contextmanager
def counted_gathers() -> Iterator[list[None]]:
    """Within the block, one entry for every collective by which DeepSpeed gathers weights."""
    calls: list[None] = []
    if distributed.world().zero_stage < 3:
        yield calls
        return
    from deepspeed.comm.torch import TorchBackend

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_gather_into_tensor", "all_gather_coalesced"):
            original = getattr(TorchBackend, name)

            def counting(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
                calls.append(None)
                return original(*args, **kwargs)

            patch.setattr(TorchBackend, name, counting)
        yield calls


KINDS: dict[str, Callable[[str], Results]] = {
    "sft": sft,
    "sft_layers_again": partial(sft, layers_again=True),
    "reward_model": partial(preference_model, is_cost=False),
    "cost_model": partial(preference_model, is_cost=True),
    "ppo": ppo,
    "ppo_heads": partial(ppo, heads=True),
    "optimizer_state": optimizer_state,
    "generation": generation,
    "prepared": prepared,
}


def refusal(what: str) -> str:
    """What a rank is told when each was started with another `what`; empty where none of them minded."""
    rank = distributed.world().rank
    given = {"stage": "builtins:str", "inputs": "s3://run", "settings": "seed=0"}
    given |= {what: {"stage": "builtins:repr", "inputs": "s3://other", "settings": "seed=1"}[what]} if rank else {}
    context = SimpleNamespace(settings=resolve_settings("tiny", overrides=[given["settings"]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "open_run", lambda uri: context)
        patch.setattr(distributed, "started", nullcontext)  # these ranks have
        try:
            launch.run_rank(given["stage"], [given["inputs"]])
        except TrainingError as error:
            return str(error)
    return ""


def main(folder: Path, cases: list[list[str | int]]) -> None:
    """Run each case (kind, finetune, ZeRO stage) and let every rank write what it saw, the first one the weights."""
    with distributed.started(zero_stage=0) as world:
        for kind, finetune, stage in cases:
            distributed._world = dataclasses.replace(world, zero_stage=int(stage))
            steps, weights = KINDS[str(kind)](str(finetune))
            name = f"{kind}-{finetune}-{stage}"
            (folder / f"{name}-{world.rank}.json").write_text(json.dumps(steps))
            if world.is_main:
                save_file(weights, folder / f"{name}.safetensors")
        refusals = {what: refusal(what) for what in ("stage", "inputs", "settings")}
        (folder / f"refusals-{world.rank}.json").write_text(json.dumps(refusals))
        distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
