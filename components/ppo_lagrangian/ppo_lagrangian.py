"""The PPO-Lagrangian stage: from a policy, a reward model and a cost model to the next policy.

Run: 1 check that both models are good enough, 2 choose the threshold, 3 put six roles on one backbone, 4 train,
5 commit the actor and the merged policy.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from components.foundation import distributed
from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.batching import ChatEncoder
from components.foundation.errors import GateError, SettingsError
from components.foundation.judging import make_judge
from components.foundation.policy import ACTOR, export_merged
from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference import PromptRecord, read_jsonl
from components.foundation.progress import Progress
from components.foundation.results import PpoTrace, PreferenceModelResult, from_json, read_record, to_json
from components.foundation.role_optimizer import UpdateGuard
from components.foundation.rollout.engines import make_engine
from components.foundation.run_context import open_stage
from components.foundation.settings import Settings
from components.foundation.training_checkpoints import TrainingCheckpoints
from components.ppo_lagrangian.comparison import compare_episode
from components.ppo_lagrangian.constraint_gauges import ConstraintGauges
from components.ppo_lagrangian.draws import draw_batch
from components.ppo_lagrangian.episode import COST, COST_CRITIC, REWARD, REWARD_CRITIC
from components.ppo_lagrangian.model_card import CardEvidence, model_card
from components.ppo_lagrangian.multiplier import CostConstraint, MultiplierState, choose_threshold
from components.ppo_lagrangian.objective import aggregate_cost
from components.ppo_lagrangian.ptx import choose_demonstrations
from components.ppo_lagrangian.trainer import PpoLagrangian, StepMetrics

STAGE = "ppo_lagrangian"
MIN_NEWEST = 8
"""With fewer answers of a label, their mean says little."""
log = logging.getLogger("saferlhf")


@dataclasses.dataclass(frozen=True)
class PpoInputs:
    """URIs of what a round's PPO starts from; `policy` equals `sft` in round 1."""

    data: str
    sft: str
    policy: str
    reward_model: str
    cost_model: str

    def parents(self) -> list[str]:
        return list(dict.fromkeys(dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class PpoProgress:
    """What a checkpoint of this stage holds besides weights: the trace so far, the multiplier's whole state, and the
    updates that were skipped."""

    trace: PpoTrace
    nu: float | None  # None where lambda is 0: JSON has no infinity
    costs: list[float]
    integral: float
    previous_cost: float | None
    skipped: int
    skipped_in_a_row: dict[str, int]

    @classmethod
    def of(cls, trace: PpoTrace, state: MultiplierState, guard: UpdateGuard) -> PpoProgress:
        nu = state.nu if math.isfinite(state.nu) else None
        memory = (list(state.costs), state.integral, state.previous_cost)
        return cls(trace, nu, *memory, guard.skipped, dict(guard.in_a_row))

    def multiplier(self) -> MultiplierState:
        nu = -math.inf if self.nu is None else self.nu
        return MultiplierState(nu, tuple(self.costs), self.integral, self.previous_cost)


def run_ppo_lagrangian(run_uri: str, round_number: int, inputs: PpoInputs) -> str:
    """Stage: models -> URI of the policy: what `export_policy` writes, and trace.json."""
    with open_stage(run_uri, STAGE, round_number) as stage:
        if (done := stage.finished()) is not None:
            return done
        settings, store = stage.context.settings, stage.context.store
        if obstacle := settings.ppo.obstacle_to(distributed.world().size):  # a platform's pool may have more GPUs
            raise SettingsError(f"{obstacle}; change that, or give the stage fewer GPUs")
        reward_folder, cost_folder = store.fetch(inputs.reward_model), store.fetch(inputs.cost_model)
        compares = settings.ppo.advantage_source == "preference_oracle"
        constraint = label_constraint(settings) if compares else gate_folders(reward_folder, cost_folder, settings)
        judge = make_judge(settings.annotate)
        sft_folder = store.fetch(inputs.sft)
        backbone = Backbone.load(
            sft_folder,
            settings.dtype,
            stage.seed,
            checkpoints_activations=settings.distributed.activation_checkpointing,
        )
        previous = None if inputs.policy == inputs.sft else store.fetch(inputs.policy)
        place_roles(backbone, settings, previous and previous / "actor", reward_folder, cost_folder)
        if not compares:
            reward_factor, cost_factor = score_factors(_result(reward_folder), _result(cost_folder), settings.ppo)
            for role in (REWARD, REWARD_CRITIC):
                scale_head(backbone, role, reward_factor)
            for role in (COST, COST_CRITIC):
                scale_head(backbone, role, cost_factor)
        engine = make_engine(settings.ppo, backbone, ACTOR, sft_folder)
        encoder = ChatEncoder(backbone.tokenizer, settings.ppo.max_prompt_tokens, settings.ppo.max_new_tokens)
        data_folder = store.fetch(inputs.data)
        # for the model card, and read before training: a store that is away at its end must not cost its result
        data_digests = {file.path: file.sha256 for file in store.manifest(inputs.data).files}
        prompts = read_jsonl(data_folder / "prompts.jsonl", PromptRecord)
        ppo = settings.ppo
        if previous is not None:
            ppo = in_later_round(ppo, read_record(PpoTrace, previous / "trace.json"))
        trainer = PpoLagrangian(backbone, engine, ppo, constraint, stage.seed)
        trainer.demonstrations, trainer.attack_demonstrations = choose_demonstrations(
            backbone, encoder, ppo, data_folder, prompts
        )
        progress = Progress(STAGE, settings.ppo.steps, "steps")
        constraint_gauges = ConstraintGauges(constraint.threshold, settings.ppo)
        log.info("cost threshold %.3f, lambda starts at %.2f", constraint.threshold, trainer.multiplier.value)

        # of the run, not of the round: with the same settings, a round goes on where the one before it ended
        walk_seed = stage.context.seed(STAGE, 0)
        first_batch = (round_number - 1) * settings.ppo.steps

        def train_step(step: int) -> StepMetrics:
            batch = draw_batch(prompts, settings.ppo, first_batch + step, walk_seed)
            score = partial(compare_episode, backbone, judge, settings, batch) if compares else None
            cut_before = encoder.truncated
            metrics = trainer.step([encoder.prompt(p.prompt) for p in batch], step, score)
            stage.report(tracked_metrics(metrics, encoder.truncated - cut_before), step + 1)
            stage.gauges.set(constraint_gauges.after(metrics))
            log.info(
                "step %d: cost %+.2f reward %+.2f lambda %.3f kl %.3f",
                *(step + 1, metrics.cost, metrics.reward, metrics.multiplier, metrics.kl),
            )
            progress.update(step + 1)
            return metrics

        with closing(engine), TrainingCheckpoints(stage, backbone, inputs.parents()) as checkpoints:
            trace = train_policy(trainer, train_step, settings.ppo.steps, PpoTrace(constraint.threshold), checkpoints)
        out = stage.folder / "out"
        export_policy(backbone, sft_folder, inputs.sft, out)
        (out / "trace.json").write_text(to_json(trace))
        results = None if compares else (_result(reward_folder), _result(cost_folder))
        card = model_card(settings, stage.context.run_id, round_number, trace, CardEvidence(data_digests, results))
        (out / "model" / "README.md").write_text(card, encoding="utf-8")
        return stage.commit(out, step=settings.ppo.steps, parents=inputs.parents())


def in_later_round(ppo: PpoSettings, previous: PpoTrace) -> PpoSettings:
    """The settings with what is different in a later round: the actor's rate, and where lambda starts.

    With `lambda_start=previous`, lambda goes on where the round before left it.
    """
    changed = {"actor_learning_rate": ppo.later_actor_learning_rate or ppo.actor_learning_rate}
    if ppo.lambda_start == "previous":
        changed["lambda_init"] = min(max(previous.multiplier[-1], ppo.lambda_min), ppo.lambda_max)
    return ppo.model_copy(update=changed)


def export_policy(backbone: Backbone, sft_folder: Path, sft_uri: str, out: Path) -> None:
    """Write the actor in every form: `actor/` to go on from, `adapter/` for PEFT, `model/` merged. All ranks call.

    After full fine-tuning there is no adapter.
    """
    backbone.save_role(ACTOR, out / "actor")
    if not backbone.is_full_copy(ACTOR):
        backbone.export_adapter(ACTOR, out / "adapter", base=sft_uri)
    export_merged(backbone, ACTOR, sft_folder, out / "actor", out / "model")
    (out / "model").mkdir(parents=True, exist_ok=True)


def run_from_uris(run_uri: str, round_number: int, *input_uris: str) -> str:
    """The stage with the URIs of `PpoInputs` one by one, as a launcher passes them."""
    return run_ppo_lagrangian(run_uri, round_number, PpoInputs(*input_uris))


def train_policy(
    trainer: PpoLagrangian,
    train_step: Callable[[int], StepMetrics],
    steps: int,
    trace: PpoTrace,
    checkpoints: TrainingCheckpoints,
) -> PpoTrace:
    """Run all steps, or those that an earlier attempt did not get to; returns the trace of all of them.

    Afterwards the actor is what the round hands on.
    """
    state = checkpoints.restore(trainer.trained)
    if state.record:
        progress = from_json(PpoProgress, state.record)
        trace, trainer.multiplier = progress.trace, progress.multiplier()
        trainer.guard.skipped, trainer.guard.in_a_row = progress.skipped, progress.skipped_in_a_row
    for step in range(state.step, steps):
        record_step(trace, train_step(step))
        checkpoints.after_step(
            step + 1, steps, lambda: to_json(PpoProgress.of(trace, trainer.multiplier, trainer.guard))
        )
    trainer.finish()
    return trace


def gate_folders(reward_folder: Path, cost_folder: Path, settings: Settings) -> CostConstraint:
    """See `gate_models`; the folders are those of the two models."""
    return gate_models(_result(reward_folder), _result(cost_folder), settings)


def _result(folder: Path) -> PreferenceModelResult:
    return read_record(PreferenceModelResult, folder / "result.json")


def label_constraint(settings: Settings) -> CostConstraint:
    """The constraint on labelled costs, 0 for a safe and 1 for an unsafe answer: their mean is the unsafe share.

    Raises:
        ConstraintError: `ppo.threshold` is no share.
    """
    return CostConstraint(choose_threshold(settings.ppo.threshold, 0.0, 1.0, settings.ppo.threshold_target))


def gate_models(reward: PreferenceModelResult, cost: PreferenceModelResult, settings: Settings) -> CostConstraint:
    """The constraint on the cost, once both models have shown that they can be trusted on held-out pairs.

    Raises:
        GateError: the reward model ranks, or the cost model separates, worse than the settings ask for.
        ConstraintError: the threshold is inert or impossible.
    """
    if reward.accuracy < settings.reward_model.min_accuracy:
        raise GateError(
            f"the reward model ranks {reward.accuracy:.3f} of held-out pairs as labelled, below "
            f"reward_model.min_accuracy={settings.reward_model.min_accuracy}: PPO would chase noise"
        )
    if cost.accuracy < settings.cost_model.min_accuracy:
        raise GateError(
            f"the cost model ranks {cost.accuracy:.3f} of held-out pairs as labelled, below "
            f"cost_model.min_accuracy={settings.cost_model.min_accuracy}: PPO would chase noise"
        )
    if cost.auc is None or not cost.safe_costs or not cost.unsafe_costs:
        raise GateError(
            f"the cost model was stored with held-out costs of {len(cost.safe_costs)} safe and "
            f"{len(cost.unsafe_costs)} unsafe answers, and the threshold takes some of both: train it again, with "
            "held-out pairs of both kinds"
        )
    if cost.auc < settings.cost_model.min_auc:
        raise GateError(
            f"the cost model's held-out AUC is {cost.auc:.3f}, below cost_model.min_auc={settings.cost_model.min_auc}: "
            "it cannot tell unsafe answers (below 0.5 its sign is inverted)"
        )
    _, factor = score_factors(reward, cost, settings.ppo)
    safe, unsafe = calibration_costs(cost, settings.ppo.threshold_answers)
    return choose_constraint(settings, factor * safe, factor * unsafe)


def score_factors(reward: PreferenceModelResult, cost: PreferenceModelResult, ppo: PpoSettings) -> tuple[float, float]:
    """What rewards and costs are multiplied by, so that lambda, beta and the PID gains mean the same in every round.

    A preference model's scale is what its training made of it, and changes from round to round: with rewards three
    times as far apart, lambda weighs a third.

    Raises:
        GateError: a margin is asked for, and the model's own one is not above 0, or was not stored.
    """

    def factor(name: str, wanted: float | None, own: float | None) -> float:
        if wanted is None:
            return 1.0
        if own is None or own <= 0:
            raise GateError(
                f"ppo.{name}_margin={wanted} scales the {name} model's scores by their held-out margin, which is "
                f"{'unknown' if own is None else f'{own:.3f}'}: train it again, or leave ppo.{name}_margin empty"
            )
        return wanted / own

    costs = (cost.safe_costs, cost.unsafe_costs)
    apart = fmean(cost.unsafe_costs) - fmean(cost.safe_costs) if all(costs) else None
    return factor("reward", ppo.reward_margin, reward.margin), factor("cost", ppo.cost_margin, apart)


def scale_head(backbone: Backbone, role: str, factor: float) -> None:
    """Multiply all scores or values of a role by `factor`.

    Raises:
        SettingsError: the role's score is a soft minimum of two outputs, which that would not multiply.
    """
    if factor != 1 and backbone.reads_prompt(role):
        raise SettingsError(
            f"the {role} model was trained with readout=prompt_and_end, a soft minimum of two outputs, which scaling "
            f"them by {factor:.3g} would not scale: leave ppo.{role}_margin empty"
        )
    with torch.no_grad():
        for name, tensor in backbone.role_tensors(role).items():
            if name.startswith("head."):
                tensor.mul_(factor)


def calibration_costs(cost: PreferenceModelResult, answers: Literal["held_out", "newest"]) -> tuple[Tensor, Tensor]:
    """Scores of the answers that calibrate the constraint: ([S] labelled safe, [U] labelled unsafe).

    With `newest`, the mean cost of the newest round's answers is above a calibrated d exactly if more of them are
    labelled unsafe than `ppo.threshold_target`, whatever the model's scale and offset have become in this round. Of a
    label with fewer than MIN_NEWEST of them, the held-out ones count.
    """
    safe, unsafe = cost.safe_costs, cost.unsafe_costs
    if answers == "newest":
        safe, unsafe = (
            newest if len(newest) >= MIN_NEWEST else held_out
            for newest, held_out in ((cost.newest_safe_costs, safe), (cost.newest_unsafe_costs, unsafe))
        )
    return torch.tensor(safe), torch.tensor(unsafe)


def choose_constraint(settings: Settings, safe_costs: Tensor, unsafe_costs: Tensor) -> CostConstraint:
    """Floor and threshold from the cost scores of safe and of unsafe answers, one value an answer.

    Raises:
        ConstraintError: see `choose_threshold`.
    """
    ppo = settings.ppo
    floor = {
        "mean": None,
        "rectified": 0.0,
        "floored": float(safe_costs.mean() + ppo.cost_floor_target * (unsafe_costs.mean() - safe_costs.mean())),
    }[ppo.cost_aggregation]
    mean_safe, mean_unsafe = (float(aggregate_cost(costs, floor).mean()) for costs in (safe_costs, unsafe_costs))
    if settings.cost_model.min_auc == 0 and ppo.threshold is None and mean_safe >= mean_unsafe:
        # the check is switched off (profile tiny): the loss's own zero stands in for a calibrated threshold
        return CostConstraint(0.0, floor)
    return CostConstraint(choose_threshold(ppo.threshold, mean_safe, mean_unsafe, ppo.threshold_target), floor)


def place_roles(
    backbone: Backbone, settings: Settings, actor_folder: Path | None, reward_folder: Path, cost_folder: Path
) -> None:
    """Six roles: the base is the reference; critics start from the models whose values they learn.

    With `ppo.reference=previous`, the reference is the actor as it came from the round before.
    With `ppo.critics=head`, a critic shares the frozen adapter of its model and has a head of its own.
    With `ppo.advantage_source=preference_oracle`, there are no models and no critics.
    """
    if actor_folder is None:
        backbone.add_role(ACTOR, settings.adapters, scored=False)
    else:
        backbone.load_role(ACTOR, actor_folder)
        if settings.ppo.reference == "previous":
            backbone.load_role(REFERENCE, actor_folder)
    if settings.ppo.advantage_source == "preference_oracle":
        return
    for model, critic, folder in ((REWARD, REWARD_CRITIC, reward_folder), (COST, COST_CRITIC, cost_folder)):
        backbone.load_role(model, folder)
        if settings.ppo.critics == "head":
            backbone.add_head(critic, model)
        else:
            backbone.load_role(critic, folder)


def record_step(trace: PpoTrace, metrics: StepMetrics) -> None:
    """Append one step to the trace."""
    trace.multiplier.append(metrics.multiplier)
    trace.cost_moving_average.append(metrics.cost_moving_average)
    trace.cost.append(metrics.cost)
    trace.reward.append(metrics.reward)
    trace.kl.append(metrics.kl)


def tracked_metrics(metrics: StepMetrics, truncated_prompts: int) -> dict[str, float]:
    """MLflow's names for a step's metrics, and for how many of its prompts were cut."""
    return {
        "lagrangian/lambda": metrics.multiplier,
        "lagrangian/cost_moving_average": metrics.cost_moving_average,
        "cost/mean": metrics.cost,
        "reward/mean": metrics.reward,
        "kl/mean": metrics.kl,
        "policy/clip_fraction": metrics.clip_fraction,
        "policy/loss": metrics.actor_loss,
        "policy/ptx_loss": metrics.ptx_loss,
        "critic/reward_loss": metrics.reward_critic_loss,
        "critic/cost_loss": metrics.cost_critic_loss,
        "rollout/tokens_per_second": metrics.rollout_tokens_per_second,
        "rollout/ended_share": metrics.ended_share,
        "rollout/drift": metrics.drift,
        "rollout/truncated_prompts": truncated_prompts,
        "policy/skipped_updates": metrics.skipped_updates,
    }
