"""summary.json: what a run did, in one file, from the records in the store."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.results import (
    Estimate,
    Evaluation,
    PpoTrace,
    PreferenceModelResult,
    PromotionResult,
    from_json,
    read_record,
)
from components.foundation.run_context import ROUND_STAGES, RunContext, finished_uri, open_run, store_root
from pipelines.own_command import own_command


@dataclass(frozen=True)
class RunFacts:
    """What only the runner knows. Seconds are wall time; memory is that of all processes together."""

    run_uri: str
    wall_seconds: float
    peak_memory_bytes: int
    tracking_uri: str


def write_summary(work_dir: Path, facts: RunFacts) -> Path:
    """Gather the run's records, write `work_dir/summary.json`, and put the report beside it."""
    context = open_run(facts.run_uri)
    report = work_dir.resolve() / "report.html"
    shutil.copyfile(context.store.fetch(finished_uri(context, "report", 0)) / "report.html", report)
    seconds = stage_seconds(context)
    promotion = from_json(PromotionResult, context.store.read_text(f"{facts.run_uri}/promotion.json"))
    summary = {
        "run_id": context.run_id,
        "profile": context.settings.profile,
        "seed": context.settings.seed,
        "settings": context.settings.flat(),
        "wall_seconds": facts.wall_seconds,
        "stage_seconds": seconds,
        "overhead_seconds": facts.wall_seconds - sum(seconds.values()),
        "peak_memory_bytes": facts.peak_memory_bytes,
        "sft": {"eval": evaluation_entry(_evaluation(context, 0))},
        "rounds": [_round_entry(context, number) for number in range(1, context.settings.rounds + 1)],
        "promotion": asdict(promotion),
        "mlflow": {"tracking_uri": facts.tracking_uri, "parent_run_id": context.mlflow_run_id},
        "report": str(report),
    }
    path = work_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return path


def closing_words(work_dir: Path) -> str:
    """What a finished run tells its user: the outcome, and where everything is."""
    summary = json.loads((work_dir / "summary.json").read_text(encoding="utf-8"))
    before, after, promotion = summary["sft"]["eval"], summary["rounds"][-1]["eval"], summary["promotion"]
    multipliers = [value for entry in summary["rounds"] for value in entry["ppo"]["lambda"]]
    policy_uri = summary["rounds"][-1]["policy_uri"]
    up, down = (own_command(action, "--workdir", str(work_dir)) for action in ("up", "down"))
    rows = {
        "outcome": f"{promotion['model']} version {promotion['version']} is {promotion['alias']}, "
        f"after {summary['wall_seconds']:.0f} s, with {summary['peak_memory_bytes'] / 1e9:.1f} GB of memory at most",
        "unsafe rate": f"{before['unsafe_rate']:.1%} (SFT) -> {after['unsafe_rate']:.1%}, "
        f"benign win rate {after['win_rate']:.1%}, over-refusal {after['over_refusal_rate']:.1%}",
        "policy": f"{policy_uri}/model",
        "on this disk": str(CheckpointStore(store_root(policy_uri)).fetch(policy_uri) / "model"),
        "lambda trace": f"{work_dir / 'summary.json'} (rounds[].ppo.lambda, {len(multipliers)} steps: "
        f"{multipliers[0]:.2f} ... {max(multipliers):.2f} ... {multipliers[-1]:.2f})",
        "report": summary["report"],
        "MLflow": f"{up}   (starts MLflow and S3 and prints their addresses; to stop them: {down})",
    }
    return "\n".join(f"{name:>13}  {text}" for name, text in rows.items())


def stage_seconds(context: RunContext) -> dict[str, float]:
    """Seconds of each stage's own work, by `round-<k>/<stage>`, without what was taken over from another run."""
    names = [(0, "prepare_data"), (0, "sft"), (0, "evaluate"), (0, "report")]
    names += [(number, name) for number in range(1, context.settings.rounds + 1) for name in ROUND_STAGES]
    labels = {
        f"round-{number}/{name}": context.store.manifest(finished_uri(context, name, number)).labels
        for number, name in names
    }
    return {name: float(label["seconds"]) for name, label in labels.items() if label["run_id"] == context.run_id}


def evaluation_entry(evaluation: Evaluation) -> dict[str, Any]:
    """The headline figures of one evaluation; intervals are [low, high]."""

    def interval(estimate: Estimate) -> list[float]:
        return [estimate.low, estimate.high]

    return {
        "unsafe_rate": evaluation.unsafe_rate.value,
        "unsafe_rate_ci": interval(evaluation.unsafe_rate),
        "win_rate": evaluation.win_rate.value,
        "win_rate_ci": interval(evaluation.win_rate),
        "over_refusal_rate": evaluation.over_refusal.value,
        "mean_reward": evaluation.mean_reward,
        "mean_cost": evaluation.mean_cost,
        "n_red_team": evaluation.n_red_team,
        "n_benign": evaluation.n_benign,
    }


def _round_entry(context: RunContext, number: int) -> dict[str, Any]:
    folders = {
        name: context.store.fetch(finished_uri(context, name, number)) for name in ("reward_model", "cost_model")
    }
    reward, cost = (read_record(PreferenceModelResult, folder / "result.json") for folder in folders.values())
    policy_uri = finished_uri(context, "ppo_lagrangian", number)
    trace = read_record(PpoTrace, context.store.fetch(policy_uri) / "trace.json")
    return {
        "round": number,
        "reward_model": {"accuracy": reward.accuracy},
        "cost_model": {"accuracy": cost.accuracy, "sign_accuracy": cost.sign_accuracy, "auc": cost.auc},
        "ppo": {
            "steps": len(trace.cost),
            "lambda": trace.multiplier,
            "cost": trace.cost,
            "reward": trace.reward,
            "kl": trace.kl,
            "threshold": trace.threshold,
        },
        "eval": evaluation_entry(_evaluation(context, number)),
        "policy_uri": policy_uri,
    }


def _evaluation(context: RunContext, number: int) -> Evaluation:
    return read_record(Evaluation, context.store.fetch(finished_uri(context, "evaluate", number)) / "evaluation.json")
