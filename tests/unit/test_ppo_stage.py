"""What the PPO stage decides before it trains: whom it trusts, its threshold, and its prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from components.foundation.backbone import Backbone
from components.foundation.errors import ConstraintError, GateError
from components.foundation.results import PpoTrace, PreferenceModelResult, from_json
from components.foundation.settings import Settings, resolve_settings
from components.ppo_lagrangian import episode, ppo_lagrangian
from components.ppo_lagrangian.multiplier_rule import start_multiplier
from components.ppo_lagrangian.ppo_lagrangian import (
    MIN_NEWEST,
    gate_models,
    in_later_round,
    place_roles,
    scale_head,
    score_factors,
    tracked_metrics,
)
from components.ppo_lagrangian.trainer import StepMetrics
from tests.unit.random_roles import save_random_role

REWARD = PreferenceModelResult(accuracy=0.9, training_pairs=10, validation_pairs=10, margin=1.5)
COST = PreferenceModelResult(
    accuracy=0.9,
    training_pairs=10,
    validation_pairs=10,
    sign_accuracy=0.9,
    auc=0.95,
    safe_costs=[-4.0, -3.0, 1.0],
    unsafe_costs=[-1.0, 3.0, 7.0],
)


READ_AT_END = "cost_model.readout=end"
"""Only such a cost can be scaled."""


def smol(*overrides: str) -> Settings:
    return resolve_settings("smol", overrides=overrides)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("aggregation", "floor", "threshold"),
    [
        ("mean", None, -2 + 0.2 * 5),
        ("rectified", 0.0, 1 / 3 + 0.2 * 3),  # safe 0, 0, 1 and unsafe 0, 3, 7: means 1/3 and 10/3
        ("floored", -1.5, -2 / 3 + 0.2 * (3 + 2 / 3)),  # safe -1.5, -1.5, 1 and unsafe as they are
    ],
)
def test_the_threshold_is_calibrated_on_the_costs_that_are_constrained(
    aggregation: str, floor: float | None, threshold: float
) -> None:
    """A fifth of the way from the mean of safe to the mean of unsafe costs; the floor is a tenth of the way."""
    given_settings = smol(
        f"ppo.cost_aggregation={aggregation}", "ppo.threshold_target=0.2", "ppo.cost_floor_target=0.1"
    )
    constraint = gate_models(REWARD, COST, given_settings)
    assert constraint.floor == pytest.approx(floor)
    assert constraint.threshold == pytest.approx(threshold)


@given(
    safe=st.lists(st.floats(-9, 0), min_size=MIN_NEWEST, max_size=40),
    unsafe=st.lists(st.floats(0.1, 9), min_size=MIN_NEWEST, max_size=40),
    target=st.floats(0.01, 0.9),
    offset=st.floats(-20, 20),
)
@settings(deadline=None, max_examples=100)
def test_the_newest_answers_meet_their_threshold_exactly_if_few_enough_are_unsafe(
    safe: list[float], unsafe: list[float], target: float, offset: float
) -> None:
    """Whatever the scores of held-out answers, which a model of another offset would give."""
    share = len(unsafe) / len(safe + unsafe)
    assume(abs(share - target) > 0.01)
    moved = [[cost + offset for cost in costs] for costs in (safe, unsafe)]
    cost = replace(COST, newest_safe_costs=moved[0], newest_unsafe_costs=moved[1])
    wish = smol("ppo.cost_aggregation=mean", "ppo.threshold_answers=newest", f"ppo.threshold_target={target}")
    mean = float(np.mean(moved[0] + moved[1]))
    assert (mean > gate_models(REWARD, cost, wish).threshold) == (share > target)


def test_with_too_few_newest_answers_of_a_label_the_held_out_ones_count() -> None:
    newest = replace(COST, newest_safe_costs=[-5.0] * MIN_NEWEST, newest_unsafe_costs=[1.0] * (MIN_NEWEST - 1))
    wish = ("ppo.cost_aggregation=mean", "ppo.threshold_target=0.5")
    assert gate_models(REWARD, newest, smol(*wish, "ppo.threshold_answers=newest")).threshold == (-5 + 3) / 2
    assert gate_models(REWARD, newest, smol(*wish, "ppo.threshold_answers=held_out")).threshold == (-2 + 3) / 2


@pytest.mark.fault
def test_row_24_a_threshold_for_the_other_aggregation_is_refused() -> None:
    """-1 lies between the plain means, but every rectified cost is above it."""
    assert gate_models(REWARD, COST, smol("ppo.cost_aggregation=mean", "ppo.threshold=-1")).threshold == -1.0
    with pytest.raises(ConstraintError, match="impossible"):
        gate_models(REWARD, COST, smol("ppo.cost_aggregation=rectified", "ppo.threshold=-1"))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("reward", "cost", "words"),
    [
        (replace(REWARD, accuracy=0.4), COST, "the reward model ranks 0.400"),
        (REWARD, replace(COST, accuracy=0.4), "the cost model ranks 0.400"),
        (REWARD, replace(COST, auc=0.2), "held-out AUC is 0.200"),
        (REWARD, replace(COST, auc=None), "train it again"),
        (REWARD, replace(COST, safe_costs=[]), "held-out costs of 0 safe and 3 unsafe answers"),
    ],
)
def test_row_23_a_model_that_is_not_good_enough_blocks_ppo(
    reward: PreferenceModelResult, cost: PreferenceModelResult, words: str
) -> None:
    with pytest.raises(GateError, match=words):
        gate_models(reward, cost, smol("ppo.cost_aggregation=rectified"))


@pytest.mark.parametrize("critics", ["adapter", "head"])
def test_models_and_critics_start_from_the_weights_of_their_own_model(
    load_tiny: Callable[[str], Backbone], tmp_path: Path, critics: str
) -> None:
    """A critic that is a head shares its model's adapter, and has of its own the head alone."""
    trained = load_tiny("llama")
    for seed, model in enumerate((episode.REWARD, episode.COST)):
        save_random_role(trained, model, tmp_path / model, seed)
    backbone = load_tiny("llama")
    place_roles(backbone, smol(f"ppo.critics={critics}"), None, tmp_path / episode.REWARD, tmp_path / episode.COST)
    for model, critic in ((episode.REWARD, episode.REWARD_CRITIC), (episode.COST, episode.COST_CRITIC)):
        whole = trained.role_state(model)
        head = {name: tensor for name, tensor in whole.items() if name.startswith("head.")}
        for role, expected in ((model, whole), (critic, head if critics == "head" else whole)):
            found = backbone.role_state(role)
            assert found.keys() == expected.keys(), role
            assert all(torch.equal(found[name], expected[name]) for name in expected), role


@pytest.mark.golden
def test_scores_are_scaled_to_the_margins_that_are_asked_for() -> None:
    """A better held-out answer scores 4 more on average, and shall 3; an unsafe one costs 5 more, and shall 10."""
    reward = replace(REWARD, margin=4.0)
    assert score_factors(reward, COST, smol(READ_AT_END, "ppo.reward_margin=3", "ppo.cost_margin=10").ppo) == (
        0.75,
        2.0,
    )
    assert score_factors(REWARD, COST, smol("ppo.reward_margin=", "ppo.cost_margin=").ppo) == (1.0, 1.0)
    for aggregation in ("mean", "floored"):
        plain, scaled = (
            gate_models(
                REWARD, COST, smol(READ_AT_END, f"ppo.cost_aggregation={aggregation}", f"ppo.cost_margin={margin}")
            )
            for margin in ("", "10")
        )
        assert scaled.threshold == pytest.approx(2 * plain.threshold)
        assert (scaled.floor or 0.0) == pytest.approx(2 * (plain.floor or 0.0))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "reward", "cost", "found"),
    [
        ("reward", replace(REWARD, margin=None), COST, "unknown"),
        ("reward", replace(REWARD, margin=-0.25), COST, "-0.250"),
        ("cost", REWARD, replace(COST, unsafe_costs=[-5.0]), "-3.000"),
        ("cost", REWARD, replace(COST, unsafe_costs=[]), "unknown"),
    ],
)
def test_scores_without_a_margin_are_not_scaled(
    name: str, reward: PreferenceModelResult, cost: PreferenceModelResult, found: str
) -> None:
    with pytest.raises(GateError, match=rf"ppo\.{name}_margin=3\.0 .* which is {found}: train it again"):
        score_factors(
            reward, cost, smol(READ_AT_END, "ppo.reward_margin=", "ppo.cost_margin=", f"ppo.{name}_margin=3").ppo
        )


@pytest.mark.parametrize("critics", ["adapter", "head"])
def test_scaling_a_head_multiplies_what_its_role_says(
    load_tiny: Callable[[str], Backbone], tmp_path: Path, critics: str
) -> None:
    for seed, model in enumerate((episode.REWARD, episode.COST)):
        save_random_role(load_tiny("llama"), model, tmp_path / model, seed)
    backbone = load_tiny("llama")
    place_roles(backbone, smol(f"ppo.critics={critics}"), None, tmp_path / episode.REWARD, tmp_path / episode.COST)
    hidden = torch.randn(3, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    roles = (episode.REWARD, episode.REWARD_CRITIC, episode.COST, episode.COST_CRITIC)
    before = {role: backbone.head_outputs(role, hidden).detach() for role in roles}
    scale_head(backbone, episode.REWARD, 3.0)
    scale_head(backbone, episode.COST_CRITIC, 0.5)
    for role, factor in zip(roles, (3.0, 1.0, 1.0, 0.5), strict=True):
        torch.testing.assert_close(backbone.head_outputs(role, hidden), factor * before[role])


@pytest.mark.fault
def test_row_09_a_result_of_an_older_run_still_reads_and_names_what_it_lacks() -> None:
    older = json.dumps({"accuracy": 0.9, "training_pairs": 1, "validation_pairs": 1, "auc": 0.9})
    with pytest.raises(GateError, match="train it again"):
        gate_models(REWARD, from_json(PreferenceModelResult, older), smol("ppo.cost_aggregation=mean"))


@pytest.mark.parametrize(
    ("start", "left_at", "begins_at"),
    [("previous", 3.5, 3.5), ("previous", 0.0, 0.05), ("previous", 9.8, 5.0), ("init", 3.5, 2.0)],
)
def test_lambda_goes_on_where_the_round_before_left_it(start: str, left_at: float, begins_at: float) -> None:
    """Not below its floor: after a preference-oracle round it may be 0, from which no logarithm comes back. Nor above
    its ceiling, which a run that goes on from another one may have lowered."""
    ppo = smol(f"ppo.lambda_start={start}", "ppo.lambda_init=2", "ppo.lambda_min=0.05", "ppo.lambda_max=5").ppo
    trace = PpoTrace(threshold=0.0, multiplier=[1.0, left_at])
    assert start_multiplier(in_later_round(ppo, trace)).value == pytest.approx(begins_at)


@pytest.mark.parametrize(("override", "expected"), [("", 0.003), ("ppo.later_actor_learning_rate=1e-3", 0.001)])
def test_a_later_round_has_its_own_learning_rate_where_one_is_set(override: str, expected: float) -> None:
    given_settings = smol("ppo.actor_learning_rate=3e-3", "ppo.later_actor_learning_rate=", *filter(None, [override]))
    assert in_later_round(given_settings.ppo, PpoTrace(0.0, [1.0])).actor_learning_rate == expected


@pytest.mark.golden
def test_every_number_of_a_step_has_its_name_in_mlflow_and_the_readme_lists_them() -> None:
    step = StepMetrics(
        multiplier=1.0,
        cost_moving_average=2.0,
        cost=3.0,
        reward=4.0,
        kl=5.0,
        clip_fraction=6.0,
        actor_loss=7.0,
        ptx_loss=8.0,
        reward_critic_loss=9.0,
        cost_critic_loss=10.0,
        rollout_tokens_per_second=11.0,
        ended_share=12.0,
        skipped_updates=13,
        drift=14.0,
    )
    tracked = tracked_metrics(step, truncated_prompts=15)
    assert tracked == {
        "lagrangian/lambda": 1,
        "lagrangian/cost_moving_average": 2,
        "cost/mean": 3,
        "reward/mean": 4,
        "kl/mean": 5,
        "policy/clip_fraction": 6,
        "policy/loss": 7,
        "policy/ptx_loss": 8,
        "critic/reward_loss": 9,
        "critic/cost_loss": 10,
        "rollout/tokens_per_second": 11,
        "rollout/ended_share": 12,
        "policy/skipped_updates": 13,
        "rollout/drift": 14,
        "rollout/truncated_prompts": 15,
    }
    readme = Path(ppo_lagrangian.__file__).with_name("README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^\*\*MLflow,\*\* once a step: (.+)$", readme, re.MULTILINE)
    assert sorted(re.findall(r"`([a-z]+/\w+)`", listed)) == sorted(tracked)
