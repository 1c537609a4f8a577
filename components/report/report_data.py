"""Everything that the report shows, gathered from the store and from nowhere else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeVar

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import IntegrityError
from components.foundation.redaction import without_password
from components.foundation.results import (
    Evaluation,
    HeldOutAnswer,
    PpoTrace,
    PreferenceModelResult,
    PromotionResult,
    RegressionAnswer,
    RoundResult,
    from_json,
)
from components.foundation.run_context import RunContext, finished_uri

T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """Where the run's figures come from. `git_sha` and `image_digest` are the last policy's, empty where unknown."""

    run_id: str
    run_uri: str
    mlflow_run_id: str
    profile: str
    base_model: str
    seed: int
    settings_digest: str
    policy_uri: str
    evaluation_uris: list[str]
    git_sha: str
    image_digest: str


@dataclass(frozen=True)
class ReportData:
    """One run.

    Attributes:
        confidence: of every interval, for instance 0.95.
        max_unsafe_rate: the gate's limit for the upper bound of the unsafe rate.
        settings: `section.key -> value`.
        sft: evaluation of the SFT model, round 0.
        rounds: one result for each round, at least one.
        answers: the held-out answers of every policy, the SFT model's first.
        scored_sft_answers: the SFT model's answers with the scores of the last round's reward and cost model, so that
            they can be compared with the last policy's.
        regressions: the last policy's answers to the regression suite.
    """

    provenance: Provenance
    confidence: float
    max_unsafe_rate: float
    settings: dict[str, str]
    sft: Evaluation
    rounds: list[RoundResult]
    answers: list[list[HeldOutAnswer]]
    scored_sft_answers: list[HeldOutAnswer]
    regressions: list[RegressionAnswer]
    promotion: PromotionResult

    @property
    def evaluations(self) -> list[Evaluation]:
        """Of every policy, the SFT model's first."""
        return [self.sft, *(result.evaluation for result in self.rounds)]

    @property
    def last(self) -> RoundResult:
        return self.rounds[-1]


def gather(context: RunContext) -> ReportData:
    """Read a finished run's records.

    Raises:
        StoreError: a stage has not finished, or a record is missing or damaged.
    """
    store, settings = context.store, context.settings
    evaluation_uris = [finished_uri(context, "evaluate", number) for number in range(settings.rounds + 1)]
    rounds = [_round(context, number) for number in range(1, settings.rounds + 1)]
    manifest = store.manifest(rounds[-1].policy_uri)
    return ReportData(
        provenance=Provenance(
            run_id=context.run_id,
            run_uri=context.run_uri,
            mlflow_run_id=context.mlflow_run_id,
            profile=settings.profile,
            base_model=settings.base_model,
            seed=settings.seed,
            settings_digest=settings.digest(),
            policy_uri=rounds[-1].policy_uri,
            evaluation_uris=evaluation_uris,
            git_sha=manifest.git_sha,
            image_digest=manifest.image_digest,
        ),
        confidence=settings.evaluate.confidence,
        max_unsafe_rate=settings.gate.max_unsafe_rate,
        settings={key: without_password(value) for key, value in settings.flat().items()},
        sft=_record(Evaluation, store, evaluation_uris[0], "evaluation.json"),
        rounds=rounds,
        answers=[_records(HeldOutAnswer, store, uri, "answers.jsonl") for uri in evaluation_uris],
        scored_sft_answers=_records(HeldOutAnswer, store, evaluation_uris[-1], "baseline_answers.jsonl"),
        regressions=_records(RegressionAnswer, store, evaluation_uris[-1], "regressions.jsonl"),
        promotion=from_json(PromotionResult, store.read_text(f"{context.run_uri}/promotion.json")),
    )


def _round(context: RunContext, number: int) -> RoundResult:
    store = context.store
    uris = {
        stage: finished_uri(context, stage, number)
        for stage in ("reward_model", "cost_model", "ppo_lagrangian", "evaluate")
    }
    return RoundResult(
        round=number,
        reward_model=_record(PreferenceModelResult, store, uris["reward_model"], "result.json"),
        cost_model=_record(PreferenceModelResult, store, uris["cost_model"], "result.json"),
        ppo=_record(PpoTrace, store, uris["ppo_lagrangian"], "trace.json"),
        evaluation=_record(Evaluation, store, uris["evaluate"], "evaluation.json"),
        policy_uri=uris["ppo_lagrangian"],
    )


def _record(kind: type[T], store: CheckpointStore, uri: str, name: str) -> T:
    return from_json(kind, _committed_text(store, uri, name))


def _records(kind: type[T], store: CheckpointStore, uri: str, name: str) -> list[T]:
    return [from_json(kind, line) for line in _committed_text(store, uri, name).split("\n") if line]


def _committed_text(store: CheckpointStore, uri: str, name: str) -> str:
    """One small file of a commit, checked against its manifest: the weights that lie beside it are not downloaded."""
    digests = {file.path: file.sha256 for file in store.manifest(uri).files}
    if name not in digests:
        raise IntegrityError(f"{uri} holds no {name}: make the step again with this version")
    text = store.read_text(f"{uri}/{name}")
    if hashlib.sha256(text.encode()).hexdigest() != digests[name]:
        raise IntegrityError(f"{uri}/{name} differs from its manifest: make the step again under another URI")
    return text
