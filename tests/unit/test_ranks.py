"""A batch in parts is the whole batch: for losses, gradients, whitening and samples; and one process stays alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.cost_model.loss import cost_loss
from components.foundation import distributed
from components.foundation.backbone import Backbone
from components.foundation.batching import TokenSequence, answer_cross_entropy, answer_tokens, collate
from components.foundation.distributed import Part, part_of
from components.foundation.policy import ACTOR
from components.foundation.preference_trainer import PreferenceLoss, PreferenceScores
from components.foundation.role_optimizer import make_optimizers
from components.foundation.rollout import Sampling
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.setting_sections import LoraSettings
from components.foundation.settings import resolve_settings
from components.ppo_lagrangian.episode import COST, COST_CRITIC, REWARD, REWARD_CRITIC
from components.ppo_lagrangian.multiplier import CostConstraint
from components.ppo_lagrangian.objective import actor_loss, critic_loss, whiten
from components.ppo_lagrangian.ppo_lagrangian import place_roles
from components.ppo_lagrangian.share import Share
from components.ppo_lagrangian.trainer import PpoLagrangian
from components.reward_model.loss import reward_loss

LoadTiny = Callable[[str], Backbone]
parts = st.tuples(st.integers(1, 9), st.integers(1, 4))
"""(items in the batch, ranks)."""


@given(parts)
def test_the_parts_of_all_ranks_are_the_batch(sizes: tuple[int, int]) -> None:
    count, size = sizes
    batch = list(range(count))
    of_ranks = [part_of(batch, rank, size) for rank in range(size)]
    assert [i for part in of_ranks if part.counts for i in part.items] == batch
    assert all(part.items for part in of_ranks)
    assert sum(part.share for part in of_ranks) == pytest.approx(1.0)
    lengths = [len(part.items) if part.counts else 0 for part in of_ranks]
    assert max(lengths) - min(lengths) <= 1


def summed(whole: Callable[[Part[int]], torch.Tensor], weights: torch.Tensor, sizes: tuple[int, int]) -> None:
    """Losses of parts add up to the loss of the batch, and so do their gradients."""
    count, size = sizes
    losses = [whole(part_of(range(count), rank, size)) for rank in range(size)]
    expected = whole(part_of(range(count), 0, 1))
    torch.testing.assert_close(sum(losses), expected)
    gradients = [torch.autograd.grad(loss, weights)[0] for loss in losses]
    torch.testing.assert_close(sum(gradients), torch.autograd.grad(expected, weights)[0])


@given(parts)
@settings(deadline=None)
def test_losses_and_gradients_do_not_depend_on_how_pairs_and_episodes_fall_into_parts(sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sizes[0])
    features, old, advantages = (torch.randn(sizes[0], 5, generator=generator, dtype=torch.double) for _ in range(3))
    weights = torch.randn(5, generator=generator, dtype=torch.double, requires_grad=True)
    mask = torch.arange(5) < torch.randint(1, 6, (sizes[0], 1), generator=generator)
    signs = torch.randint(0, 2, (sizes[0],), generator=generator) * 2.0 - 1.0
    severities = torch.randint(0, 4, (sizes[0],), generator=generator).double()

    def of_pairs(loss: PreferenceLoss, part: Part[int]) -> torch.Tensor:
        own = features[part.items]
        sign, severity = signs[part.items], severities[part.items]
        scores = PreferenceScores(own @ weights, own.flip(-1) @ weights, sign, -sign, severity, severity)
        return part.share * loss(scores)[0]

    for loss in (reward_loss, cost_loss):
        summed(partial(of_pairs, partial(loss, regularization=0.1)), weights, sizes)

    def of_episodes(part: Part[int], *, actor: bool) -> torch.Tensor:
        rows, tokens = part.items, int(mask.sum())
        now = features[rows] * weights
        if actor:
            clipped = actor_loss(now, old[rows], advantages[rows], mask[rows], clip_ratio=0.2, total_tokens=tokens)[0]
            return part.counts * clipped
        return part.counts * critic_loss(
            now, old[rows], advantages[rows], mask[rows], value_clip=0.5, total_tokens=tokens
        )

    summed(partial(of_episodes, actor=True), weights, sizes)
    summed(partial(of_episodes, actor=False), weights, sizes)


@given(parts)
@settings(deadline=None, max_examples=15)
def test_the_language_model_loss_does_not_depend_on_how_sequences_fall_into_parts(
    load_tiny: LoadTiny, sizes: tuple[int, int]
) -> None:
    backbone = load_tiny("tiny-llama")
    backbone.add_role("sft", LoraSettings(rank=2, alpha=4), scored=False)
    sequences = [TokenSequence((256, 60 + i), (*range(70, 71 + i % 4), 257)) for i in range(sizes[0])]
    total = answer_tokens(sequences).sum()

    def gradients(size: int) -> tuple[float, torch.Tensor]:
        loss_of_all = 0.0
        for rank in range(size):
            part = part_of(sequences, rank, size)
            batch = collate(part.items, backbone.eos_token_id, backbone.device)
            with backbone.role("sft", train=True):
                logits = backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)
                loss = part.counts * answer_cross_entropy(logits, batch, total)
                loss.backward()
            loss_of_all += loss.item()
        trained = backbone.trainable_parameters("sft")
        gradient = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        for parameter in trained:
            parameter.grad = None
        return loss_of_all, gradient

    (whole, expected), (split, found) = gradients(1), gradients(sizes[1])
    assert split == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@given(parts)
def test_whitening_in_parts_is_whitening_of_the_whole(sizes: tuple[int, int]) -> None:
    """Every part is given the sums of all parts, which the ranks exchange."""
    count, size = sizes
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, 4, generator=generator, dtype=torch.double) * 3 + 1
    mask = torch.arange(4) < torch.randint(1, 5, (count, 1), generator=generator)
    expected = whiten(values, mask)
    sums: list[torch.Tensor] = []
    whiten(values, mask, lambda own: sums.append(own) or own)  # type: ignore[func-returns-value]
    for rank in range(size):
        part = part_of(range(count), rank, size)
        remaining = iter(sums)
        found = whiten(values[part.items], mask[part.items], lambda own, given=remaining: next(given))
        torch.testing.assert_close(found, expected[part.items])


def test_a_rank_finds_its_episodes_in_a_minibatch_of_all_ranks() -> None:
    share = Share(places=torch.tensor([1, 4, 6]), tokens=torch.tensor([3, 1, 4, 1, 5, 9, 2]))
    own = share.minibatch(torch.tensor([6, 0, 1]))
    assert (own.rows.tolist(), own.counts) == ([2, 0], 1.0)
    others = share.minibatch(torch.tensor([0, 5]))
    assert (others.rows.tolist(), others.counts) == ([0], 0.0)  # a row of no account


def test_what_is_sampled_for_a_prompt_does_not_depend_on_who_answers_it(load_tiny: LoadTiny) -> None:
    """Three groups of four prompts; a rank that answers some of them draws what one rank draws for those."""
    backbone = load_tiny("tiny-llama")
    engine = TransformersEngine(backbone, "reference", batch_size=4)
    prompts = [(256, *range(60, 61 + i % 5)) for i in range(11)]
    sampling = Sampling(1.0, 8, seed=3)
    whole = engine.generate(prompts, sampling).answers
    for rows in ([0, 3, 5, 10], [9, 1], list(range(11))):
        assert engine.generate(prompts, sampling, rows).answers == [whole[row] for row in rows]


def test_a_full_copy_is_saved_loaded_and_exported_whole(load_tiny: LoadTiny, tmp_path: Path) -> None:
    backbone = load_tiny("tiny-llama")
    ids, mask = torch.tensor([[256, 70, 71, 72]]), torch.ones(1, 4, dtype=torch.long)
    backbone.add_role("actor", None, scored=False)
    backbone.add_role("reward", None, scored=True)
    before = _logits(backbone, "reference", ids, mask)
    assert torch.equal(_logits(backbone, "actor", ids, mask), before)
    optimizers = make_optimizers(backbone, {"actor": 1e-2, "reward": 1e-2})
    with backbone.role("actor", train=True):
        optimizers["actor"].backward(backbone.answer_logits(ids, mask, 2).square().mean())
    assert optimizers["actor"].step(1.0, loss=1.0) > 0
    with backbone.role("reward", train=True):
        optimizers["reward"].backward(backbone.scores("reward", ids, mask).sum())
    optimizers["reward"].step(1.0, loss=1.0)
    assert torch.equal(_logits(backbone, "reference", ids, mask), before)  # the base never changes
    trained = _logits(backbone, "actor", ids, mask)
    assert not torch.equal(trained, before)
    for role in ("actor", "reward"):
        backbone.save_role(role, tmp_path / role)
    fresh = load_tiny("tiny-llama")
    for role in ("actor", "reward"):
        fresh.load_role(role, tmp_path / role)
        assert fresh.has_adapter(role)
    assert torch.equal(_logits(fresh, "actor", ids, mask), trained)
    with fresh.role("reward"), backbone.role("reward"):
        assert torch.equal(fresh.scores("reward", ids, mask), backbone.scores("reward", ids, mask))
    fresh.merge_role("actor")
    fresh.export(tmp_path / "model")
    exported = Backbone.load(tmp_path / "model", "float32", seed=0)
    assert torch.equal(_logits(exported, "reference", ids, mask), trained)


@pytest.mark.parametrize("critics", ["adapter", "head"])
def test_six_roles_may_all_be_full_copies(load_tiny: LoadTiny, tmp_path: Path, critics: str) -> None:
    """A PPO step trains actor and critics; reward model, cost model and reference stay as they were."""
    earlier = load_tiny("tiny-llama")
    for role, scored in ((ACTOR, False), (REWARD, True), (COST, True)):
        earlier.add_role(role, None, scored=scored)
        earlier.save_role(role, tmp_path / role)
    backbone = load_tiny("tiny-llama")
    chosen = resolve_settings("tiny", overrides=["finetune=full", f"ppo.critics={critics}", "ppo.max_new_tokens=4"])
    place_roles(backbone, chosen, *(tmp_path / role for role in (ACTOR, REWARD, COST)))
    prompts = [(256, 70 + i) for i in range(4)]
    trainer = PpoLagrangian(backbone, TransformersEngine(backbone, ACTOR), chosen.ppo, CostConstraint(0.0), 0)
    roles = (ACTOR, REWARD_CRITIC, COST_CRITIC, REWARD, COST)
    before = {role: backbone.role_state(role) for role in roles}
    ids, mask = torch.tensor([[256, 70, 71, 72]]), torch.ones(1, 4, dtype=torch.long)
    reference = _logits(backbone, "reference", ids, mask)
    trainer.step(prompts, 0)
    for role in roles:
        changed = any(not torch.equal(tensor, before[role][name]) for name, tensor in backbone.role_state(role).items())
        assert changed == (role in (ACTOR, REWARD_CRITIC, COST_CRITIC)), role
    assert torch.equal(_logits(backbone, "reference", ids, mask), reference)


def _logits(backbone: Backbone, role: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with backbone.role(role):
        return backbone.answer_logits(ids, mask, 2)


def test_alone_a_process_is_told_what_it_says() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.total(tensor) is tensor
    assert distributed.total_of({"loss": 0.1}) == {"loss": 0.1}
    assert distributed.every_row(tensor, torch.tensor([1, 0]), 2).tolist() == [2.0, 1.0]
    assert distributed.anywhere(True, False) == (True, False)
    assert distributed.gathered("a") == ["a"]
    assert distributed.from_main(lambda: 5) == distributed.maximum(5) == 5
    assert distributed.own_turns([1, 2, 3]) == [1, 2, 3]
    distributed.check_same(settings="anything")


def test_one_process_imports_no_deepspeed_and_a_step_without_a_model_no_torch() -> None:
    program = (
        "import sys; import components.foundation.run_context, components.foundation.launch, components.sft.component;"
        "assert 'torch' not in sys.modules;"
        "import components.sft.sft, components.ppo_lagrangian.ppo_lagrangian;"
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
