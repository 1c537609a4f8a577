"""Registers a run's models and decides whether its policy becomes champion.

Run: 1 register policy, reward and cost model by reference, 2 decide (two-sided, on confidence bounds),
3 move the alias `champion`, or `challenger` where the gate says no.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionLog, champion_version
from components.foundation.errors import ModelError, StoreError
from components.foundation.preference import TRAINING_FILE
from components.foundation.results import (
    Evaluation,
    PreferenceModelResult,
    PromotionResult,
    TrialResult,
    from_json,
    read_record,
    to_json,
)
from components.foundation.run_context import RunContext, finished_uri, open_stage
from components.foundation.train_job.kubernetes_api import Backoff, KubernetesApi, in_cluster
from components.promote.deployment import deploy_champion
from components.promote.promotion import (
    CHALLENGER,
    decide_on_version,
    promote,
    stored_regressions,
)

REGISTER, GATE, PROMOTE = "register", "gate", "promote"
REWARD_MODEL, COST_MODEL = "saferlhf-reward", "saferlhf-cost"
log = logging.getLogger("saferlhf")


def run_register(run_uri: str, policy_uri: str) -> str:
    """Stage: register the last round's three models; returns the policy's version."""
    with open_stage(run_uri, REGISTER, 0) as stage:
        context = stage.context
        last = context.settings.rounds
        folder = context.store.fetch(finished_uri(context, "evaluate", last))
        check_trial(folder, policy_uri)
        evaluation = read_record(Evaluation, folder / "evaluation.json")
        regressions = stored_regressions(folder)
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
            "regressions_right": f"{sum(a.right is True for a in regressions)} of {len(regressions)}",
        }
        for model, name in ((REWARD_MODEL, "reward_model"), (COST_MODEL, "cost_model")):
            uri = finished_uri(context, name, last)
            accuracy = read_record(PreferenceModelResult, context.store.fetch(uri) / "result.json").accuracy
            own = {key: tags[key] for key in ("round", "run_id", "git_sha", "settings_digest", "data_digest")}
            context.tracker.register_model(model, uri, stage.mlflow.run_id, own | {"accuracy": f"{accuracy:.4f}"})
        version = context.tracker.register_model(POLICY_MODEL, f"{policy_uri}/model", stage.mlflow.run_id, tags)
        log.info("registered %s version %s", POLICY_MODEL, version)
        return version


def run_gate(run_uri: str, version: str) -> str:
    """Stage: the decision on a registered version, `promote` or `challenger`, as things stand now."""
    with open_stage(run_uri, GATE, 0) as stage:
        context = stage.context
        champion = champion_version(context.tracker, ChampionLog(context.store, POLICY_MODEL).latest())
        decision, reasons = decide_on_version(context, version, champion)
        for reason in reasons:
            log.info("gate: %s", reason)
        result = PromotionResult(decision, reasons, POLICY_MODEL, version, "", against=champion)
        context.store.write_text(f"{run_uri}/gate.json", to_json(result), overwrite=True)
        return decision


def run_set_alias(run_uri: str, version: str, alias: str) -> str:
    """Stage: let `champion` or `challenger` name the version; returns the alias that names it in the end.

    Another run's policy may have become champion since the gate let this one pass: `promote` decides again.

    Raises:
        ClusterError: the new champion could not be given to the cluster (`serving.apply`). It is champion all the
            same, and the stage may be repeated.
    """
    with open_stage(run_uri, PROMOTE, 0) as stage:
        context = stage.context
        gate = from_json(PromotionResult, context.store.read_text(f"{run_uri}/gate.json"))
        if alias == CHAMPION:
            result = promote(context, version, gate.against)
        else:
            context.tracker.set_alias(POLICY_MODEL, CHALLENGER, version)
            result = replace(gate, version=version, alias=CHALLENGER)
        context.store.write_text(f"{run_uri}/promotion.json", to_json(result), overwrite=True)
        log.info("%s version %s is now %s", POLICY_MODEL, version, result.alias)
        if result.alias == CHAMPION and context.settings.serving.apply:
            deploy_champion(context.store, KubernetesApi(in_cluster(), Backoff()))
        return result.alias


def check_trial(evaluation_folder: Path, policy_uri: str) -> None:
    """The last evaluation asked this very policy one question, and it answered.

    Raises:
        ModelError: it did not.
    """
    file = evaluation_folder / "trial.json"
    trial = read_record(TrialResult, file) if file.exists() else None
    if trial is None or trial.policy_uri != policy_uri or not trial.answer.strip():
        asked = "no policy" if trial is None else f"{trial.policy_uri} ({trial.answer[:40]!r})"
        raise ModelError(
            f"{policy_uri} was not seen to answer before it is registered: the last evaluation asked {asked}; "
            "evaluate this policy in the last round"
        )


def _data_digest(context: RunContext, data_uri: str) -> str:
    files = {file.path: file.sha256 for file in context.store.manifest(data_uri).files}
    if TRAINING_FILE not in files:
        raise StoreError(f"{data_uri} holds no {TRAINING_FILE}: prepare the data again")
    return files[TRAINING_FILE]
