"""The paper's comparison with real policies: fixed weights of the cost against the multiplier.

    python -m tests.benchmarks.fixed_nu_policies RUN_FOLDER -o FILE.svg [--nu 0.5 2 10]

RUN_FOLDER is the work folder of a finished run. From the SFT model and the two models of its first round, a policy is
trained with every fixed weight nu (`ppo.reward_shaping`) and evaluated on the held-out prompts, with the run's own
seeds and settings; the multiplier's policy is the run's own of round 1. Each weight is a run of its own in that
folder's store and MLflow, so a comparison that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.evaluate.evaluate import EvaluationInputs, run_evaluate, stored_evaluation
from components.foundation.results import Evaluation
from components.foundation.run_context import RunContext, create_run, finished_uri, open_run, usual_uri
from components.ppo_lagrangian.ppo_lagrangian import PpoInputs, run_ppo_lagrangian
from components.report.svg import number, percent
from pipelines.local.services import services_in_environment
from tests.benchmarks.bandit import PAPER_NU
from tests.benchmarks.fixed_nu import SCORE_CLIP
from tests.benchmarks.machine import this_machine
from tests.benchmarks.pictures import Axis, Dot, tradeoff
from tests.benchmarks.results import read_summary, run_uri_of

_NAME = "Benign win rate over unsafe rate of policies trained with fixed weights nu, and with the multiplier"


@dataclass(frozen=True)
class Compared:
    """A policy of round 1 and how it was trained; `nu` is None for the multiplier's."""

    nu: float | None
    evaluation: Evaluation

    @property
    def label(self) -> str:
        return "multiplier" if self.nu is None else f"nu {self.nu:g}"

    def is_dominated_by(self, other: Compared) -> bool:
        """The other one is safer and more helpful."""
        mine, theirs = self.evaluation, other.evaluation
        return theirs.unsafe_rate.value < mine.unsafe_rate.value and theirs.win_rate.value > mine.win_rate.value


@dataclass(frozen=True)
class FirstRound:
    """What round 1 of a run started from, as commits."""

    data: str
    sft: str
    reward_model: str
    cost_model: str
    baseline: str

    @classmethod
    def of(cls, context: RunContext) -> FirstRound:
        def commit(stage: str, round_number: int) -> str:
            return finished_uri(context, stage, round_number)

        return cls(
            commit("prepare_data", 0),
            commit("sft", 0),
            commit("reward_model", 1),
            commit("cost_model", 1),
            commit("evaluate", 0),
        )


def compare(run_uri: str, weights: Sequence[float]) -> list[Compared]:
    """Train and evaluate a policy for each weight, in the store of a finished run; the run's own comes last."""
    context = open_run(run_uri)
    start = FirstRound.of(context)
    compared = [Compared(nu, _with_fixed_weight(context, start, nu)) for nu in weights]
    own = stored_evaluation(run_uri, finished_uri(context, "evaluate", 1))
    return [*compared, Compared(None, own)]


def _with_fixed_weight(context: RunContext, start: FirstRound, nu: float) -> Evaluation:
    settings = context.settings
    ppo = settings.ppo.model_copy(update={"reward_shaping": nu, "score_clip": SCORE_CLIP})
    settings = settings.model_copy(update={"ppo": ppo})
    run_id = f"{context.run_id}-nu-{nu:g}".replace(".", "-")
    run_uri = usual_uri(settings, run_id)
    create_run(run_uri, run_id, settings)
    models = (start.reward_model, start.cost_model)
    policy = run_ppo_lagrangian(run_uri, 1, PpoInputs(start.data, start.sft, start.sft, *models))
    inputs = EvaluationInputs(start.data, start.sft, policy, *models, start.baseline)
    return stored_evaluation(run_uri, run_evaluate(run_uri, 1, inputs))


def table(compared: Sequence[Compared]) -> str:
    """Markdown: one row a policy."""
    own = compared[-1]
    rows = [
        "| policy of round 1 | unsafe rate (95 %) | benign win rate (95 %) | over-refusal (95 %) | mean reward "
        "| mean cost | by these values, the multiplier's is safer and more helpful |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for policy in compared:
        e = policy.evaluation
        means = " | ".join("–" if mean is None else number(mean, 2) for mean in (e.mean_reward, e.mean_cost))
        dominated = "" if policy is own else "yes" if policy.is_dominated_by(own) else "no"
        rates = " | ".join(
            f"{percent(rate.value)} ({percent(rate.low)} to {percent(rate.high)})"
            for rate in (e.unsafe_rate, e.win_rate, e.over_refusal)
        )
        rows.append(f"| {policy.label} | {rates} | {means} | {dominated} |")
    return "\n".join(rows)


def picture(compared: Sequence[Compared]) -> str:
    """An SVG file: to the upper left is better."""
    dots = [
        Dot(p.label, 100 * p.evaluation.unsafe_rate.value, 100 * p.evaluation.win_rate.value, p.nu is None)
        for p in compared
    ]
    return tradeoff(_NAME, dots, Axis("unsafe answers to attacks, %", (0.0,)), Axis("wins on benign prompts, %"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fixed weights of the cost against the multiplier, of a finished run.")
    parser.add_argument("folder", type=Path, help="work folder of a finished run")
    parser.add_argument("-o", "--output", type=Path, required=True, help="SVG file to write")
    parser.add_argument("--nu", type=float, nargs="+", default=list(PAPER_NU), help="the weights (the paper's seven)")
    arguments = parser.parse_args()
    with services_in_environment(arguments.folder):
        compared = compare(run_uri_of(read_summary(arguments.folder)), arguments.nu)
    arguments.output.write_text(picture(compared), encoding="utf-8")
    print(f"{this_machine()}\n\n{table(compared)}")


if __name__ == "__main__":
    main()
