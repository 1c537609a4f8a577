"""Registers a run's models and decides whether its policy becomes champion.

Run: 1 register policy, reward and cost model by reference, 2 decide (two-sided, on confidence bounds),
3 move the alias `champion`, or `challenger` where the gate says no.
"""

from __future__ import annotations

import logging
import math

from components.foundation.errors import StoreError
from components.foundation.results import (
    Estimate,
    Evaluation,
    HeldOutAnswer,
    PreferenceModelResult,
    PromotionResult,
    from_json,
    read_record,
    read_records,
    to_json,
)
from components.foundation.run_context import RunContext, finished_uri, open_stage
from components.foundation.settings import GateSettings
from components.foundation.statistics import win_rate

REGISTER, GATE, PROMOTE = "register", "gate", "promote"
POLICY_MODEL, REWARD_MODEL, COST_MODEL = "saferlhf-policy", "saferlhf-reward", "saferlhf-cost"
CHAMPION, CHALLENGER = "champion", "challenger"
log = logging.getLogger("saferlhf")


def run_register(run_uri: str, policy_uri: str) -> str:
    """Stage: register the last round's three models; returns the policy's version."""
    with open_stage(run_uri, REGISTER, 0) as stage:
        context = stage.context
        last = context.settings.rounds
        evaluation = _evaluation(context, last)
        data = finished_uri(context, "prepare_data", 0)
        tags = {
            "round": str(last),
            "run_id": context.run_id,
            "git_sha": context.store.manifest(policy_uri).git_sha,
            "settings_digest": context.settings.digest(),
            "data_digest": _data_digest(context, data),
            "evaluation_uri": finished_uri(context, "evaluate", last),
            "held_out_digest": evaluation.held_out_digest,
            "unsafe_rate": f"{evaluation.unsafe_rate.value:.4f}",
            "win_rate": f"{evaluation.win_rate.value:.4f}",
            "over_refusal_rate": f"{evaluation.over_refusal.value:.4f}",
        }
        for model, name in ((REWARD_MODEL, "reward_model"), (COST_MODEL, "cost_model")):
            uri = finished_uri(context, name, last)
            accuracy = read_record(PreferenceModelResult, context.store.fetch(uri) / "result.json").accuracy
            own = {key: tags[key] for key in ("round", "run_id", "git_sha", "settings_digest", "data_digest")}
            context.tracker.register_model(model, uri, stage.mlflow.run_id, own | {"accuracy": f"{accuracy:.4f}"})
        version = context.tracker.register_model(POLICY_MODEL, f"{policy_uri}/model", stage.mlflow.run_id, tags)
        log.info("registered %s version %s", POLICY_MODEL, version)
        return version


def run_gate(run_uri: str) -> str:
    """Stage: the decision, `promote` or `challenger`; its reasons are stored beside the run."""
    with open_stage(run_uri, GATE, 0) as stage:
        context = stage.context
        champion = context.tracker.version_of_alias(POLICY_MODEL, CHAMPION)
        evaluation = _evaluation(context, context.settings.rounds)
        rate: Estimate | None = evaluation.win_rate
        opponent = "SFT"
        if champion is not None:
            opponent = f"the champion, version {champion[0]}"
            rate = _win_rate_against(context, evaluation, champion[1])
        decision, reasons = decide(evaluation, rate, opponent, context.settings.gate)
        for reason in reasons:
            log.info("gate: %s", reason)
        context.store.write_text(
            f"{run_uri}/gate.json",
            to_json(PromotionResult(decision, reasons, POLICY_MODEL, "", "")),
            overwrite=True,
        )
        return decision


def run_set_alias(run_uri: str, version: str, alias: str) -> str:
    """Stage: let `champion` or `challenger` name the version; returns the alias."""
    with open_stage(run_uri, PROMOTE, 0) as stage:
        context = stage.context
        gate = from_json(PromotionResult, context.store.read_text(f"{run_uri}/gate.json"))
        context.tracker.set_alias(POLICY_MODEL, alias, version)
        result = PromotionResult(gate.decision, gate.reasons, POLICY_MODEL, version, alias)
        context.store.write_text(f"{run_uri}/promotion.json", to_json(result), overwrite=True)
        log.info("%s version %s is now %s", POLICY_MODEL, version, alias)
        return alias


def decide(evaluation: Evaluation, rate: Estimate | None, opponent: str, gate: GateSettings) -> tuple[str, list[str]]:
    """The two-sided gate: every bound must hold, and a figure that is missing or not finite holds nothing.

    Safe: the *upper* bound of the unsafe rate is under its limit. Helpful: the *lower* bound of the win rate against
    the current champion (or SFT, where there is none) is over its limit. Unafraid: the over-refusal rate is under its
    limit.

    Args:
        rate: win rate on benign prompts against `opponent`; None where it cannot be had on the same prompts.

    Returns:
        ("promote" or "challenger", one reason for each check).
    """
    checks = [
        _check("upper bound of the unsafe rate", evaluation.unsafe_rate.high, "<=", gate.max_unsafe_rate),
        _check("over-refusal rate", evaluation.over_refusal.value, "<=", gate.max_over_refusal_rate),
    ]
    if rate is None:
        checks.append((False, f"failed: {opponent} was evaluated on other held-out prompts"))
    else:
        checks.append(_check(f"lower bound of the win rate against {opponent}", rate.low, ">=", gate.min_win_rate))
    counts = {"red-team": evaluation.n_red_team, "benign": evaluation.n_benign, "lookalike": evaluation.over_refusal.n}
    checks += [(False, f"failed: there are no {kind} held-out prompts") for kind, count in counts.items() if not count]
    passed = all(ok for ok, _ in checks)
    return ("promote" if passed else "challenger"), [reason for _, reason in checks]


def _check(name: str, value: float, relation: str, limit: float) -> tuple[bool, str]:
    ok = math.isfinite(value) and (value <= limit if relation == "<=" else value >= limit)
    return ok, f"{'passed' if ok else 'failed'}: {name} {value:.3f}, must be {relation} {limit}"


def _evaluation(context: RunContext, round_number: int) -> Evaluation:
    folder = context.store.fetch(finished_uri(context, "evaluate", round_number))
    return read_record(Evaluation, folder / "evaluation.json")


def _win_rate_against(context: RunContext, evaluation: Evaluation, tags: dict[str, str]) -> Estimate | None:
    """Benign win rate over the champion's stored answers; None unless both answered the same prompts."""
    if tags.get("held_out_digest") != evaluation.held_out_digest or "evaluation_uri" not in tags:
        return None
    ours, theirs = (
        {a.prompt: a.helpfulness for a in read_records(HeldOutAnswer, folder / "answers.jsonl") if a.kind == "benign"}
        for folder in (
            context.store.fetch(finished_uri(context, "evaluate", context.settings.rounds)),
            context.store.fetch(tags["evaluation_uri"]),
        )
    )
    confidence = context.settings.evaluate.confidence
    return win_rate(list(ours.values()), [theirs[prompt] for prompt in ours], confidence)


def _data_digest(context: RunContext, data_uri: str) -> str:
    files = {file.path: file.sha256 for file in context.store.manifest(data_uri).files}
    if "preferences_train.jsonl" not in files:
        raise StoreError(f"{data_uri} holds no preferences_train.jsonl: prepare the data again")
    return files["preferences_train.jsonl"]
