"""Evaluates a policy on the held-out prompts (paper section 4.2): safe, helpful, and not afraid of harmless prompts.

Run: 1 ask the last policy one question as its users will, 2 answer every held-out prompt, 3 judge, 4 score with the
round's reward and cost model, 5 compare with the SFT model's answers to the same prompts, 6 answer the regression
suite greedily, 7 commit evaluation.json, answers.jsonl and regressions.jsonl.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from components.evaluate.regressions import judge_regressions
from components.evaluate.trial import TRIAL_FILE, try_model
from components.foundation.backbone import Backbone
from components.foundation.batching import ChatEncoder, batches_by_length
from components.foundation.judging import check_usable, judge_name, make_judge
from components.foundation.policy import load_policy
from components.foundation.preference import PromptRecord, RegressionPrompt, read_jsonl
from components.foundation.preference_trainer import pair_batch, scores_of_pairs
from components.foundation.progress import Progress
from components.foundation.results import (
    Arena,
    Evaluation,
    HeldOutAnswer,
    read_record,
    read_records,
    to_json,
    write_records,
)
from components.foundation.rollout import Sampling
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.run_context import Stage, open_run, open_stage
from components.foundation.settings import Settings
from components.foundation.shared_prompt import row_length
from components.foundation.statistics import share, win_rate

STAGE = "evaluate"

_PAIRS_PER_FORWARD = 8
"""Of answers that are scored: on a CPU more are no faster, as what a pass holds of them outgrows its cache."""


@dataclass(frozen=True)
class EvaluationInputs:
    """URIs; for the SFT model itself `policy` equals `sft` and the last three are empty."""

    data: str
    sft: str
    policy: str
    reward_model: str = ""
    cost_model: str = ""
    baseline: str = ""

    def parents(self) -> list[str]:
        uris = (self.data, self.sft, self.policy, self.reward_model, self.cost_model, self.baseline)
        return [uri for uri in dict.fromkeys(uris) if uri]


def run_evaluate(run_uri: str, round_number: int, inputs: EvaluationInputs) -> str:
    """Stage: policy -> URI of evaluation.json, answers.jsonl and regressions.jsonl."""
    with open_stage(run_uri, STAGE, round_number) as stage:
        if (done := stage.finished()) is not None:
            return done
        settings, store = stage.context.settings, stage.context.store
        if round_number == settings.rounds:  # before this process takes memory for the policy itself
            trial = try_model(inputs.policy, store.fetch(inputs.policy) / "model", settings.serving.trial_seconds)
            (stage.folder / TRIAL_FILE).write_text(to_json(trial))
        data = store.fetch(inputs.data)
        prompts = read_jsonl(data / "held_out.jsonl", PromptRecord)
        suite = read_jsonl(data / "regressions.jsonl", RegressionPrompt)
        backbone, role = load_policy(store, inputs.sft, inputs.policy, settings.dtype, stage.seed)
        encoder = ChatEncoder(backbone.tokenizer, settings.ppo.max_prompt_tokens, settings.evaluate.max_new_tokens)
        temperature = settings.evaluate.temperature
        texts = _answer(stage, backbone, role, encoder, [p.prompt for p in prompts], temperature)
        answers = judge_all(prompts, texts, settings)
        greedy = _answer(stage, backbone, role, encoder, [p.prompt for p in suite], temperature=0.0)
        regressions = judge_regressions(suite, greedy, settings.annotate)
        baseline = answers
        if inputs.baseline:
            baseline = read_records(HeldOutAnswer, store.fetch(inputs.baseline) / "answers.jsonl")
            models = (store.fetch(inputs.reward_model), store.fetch(inputs.cost_model))
            answers, baseline = _scored(backbone, settings, answers, baseline, *models)
        evaluation = replace(
            summarize(round_number, answers, baseline, settings.evaluate.confidence),
            judge=judge_name(settings.annotate),
        )
        cut = {"evaluate/truncated_prompts": float(encoder.truncated)}
        stage.mlflow.log_metrics(tracked_metrics(evaluation) | cut, round_number)
        (stage.folder / "evaluation.json").write_text(to_json(evaluation))
        write_records(stage.folder / "answers.jsonl", answers)
        write_records(stage.folder / "baseline_answers.jsonl", baseline)
        write_records(stage.folder / "regressions.jsonl", regressions)
        return stage.commit(stage.folder, step=round_number, parents=inputs.parents())


def stored_evaluation(run_uri: str, evaluation_uri: str) -> Evaluation:
    """The evaluation that `run_evaluate` committed."""
    return read_record(Evaluation, open_run(run_uri).store.fetch(evaluation_uri) / "evaluation.json")


def judge_all(prompts: Sequence[PromptRecord], answers: Sequence[str], settings: Settings) -> list[HeldOutAnswer]:
    """Judge each answer; prompts whose judgement was unusable are left out."""
    judgements = make_judge(settings.annotate).judge_answers(list(zip(prompts, answers, strict=True)))
    check_usable(sum(j is not None for j in judgements), len(judgements), settings.annotate.min_usable_share)
    return [
        HeldOutAnswer(p.prompt, p.kind, p.harm_category, text, j.is_safe, j.is_refusal, j.helpfulness)
        for p, text, j in zip(prompts, answers, judgements, strict=True)
        if j is not None
    ]


def summarize(
    round_number: int, answers: Sequence[HeldOutAnswer], baseline: Sequence[HeldOutAnswer], confidence: float
) -> Evaluation:
    """All rates of one policy; `baseline` holds the SFT model's answers, matched by prompt."""
    theirs = {answer.prompt: answer for answer in baseline}
    red_team = [a for a in answers if a.kind == "red_team"]
    benign = [a for a in answers if a.kind == "benign"]
    matched = [a for a in benign if a.prompt in theirs]
    categories = sorted({a.harm_category for a in red_team})
    scored = [a for a in answers if a.reward is not None and a.prompt in theirs]
    return Evaluation(
        round=round_number,
        unsafe_rate=share([not a.is_safe for a in red_team], confidence),
        unsafe_rate_by_category={
            c: share([not a.is_safe for a in red_team if a.harm_category == c], confidence) for c in categories
        },
        win_rate=win_rate(
            [a.helpfulness for a in matched], [theirs[a.prompt].helpfulness for a in matched], confidence
        ),
        over_refusal=share([a.is_refusal for a in answers if a.kind == "lookalike"], confidence),
        n_red_team=len(red_team),
        n_benign=len(benign),
        held_out_digest=hashlib.sha256("\n".join(a.prompt for a in answers).encode()).hexdigest(),
        mean_reward=_mean([a.reward for a in answers]),
        mean_cost=_mean([a.cost for a in answers]),
        sft_mean_reward=_mean([a.reward for a in baseline]),
        sft_mean_cost=_mean([a.cost for a in baseline]),
        arena=_arena(scored, theirs) if scored else None,
    )


def tracked_metrics(evaluation: Evaluation) -> dict[str, float]:
    """MLflow's names for the headline figures."""
    return {
        "evaluate/unsafe_rate": evaluation.unsafe_rate.value,
        "evaluate/unsafe_rate_upper": evaluation.unsafe_rate.high,
        "evaluate/win_rate": evaluation.win_rate.value,
        "evaluate/win_rate_lower": evaluation.win_rate.low,
        "evaluate/over_refusal_rate": evaluation.over_refusal.value,
    }


def markdown_table(evaluation: Evaluation) -> str:
    """The headline figures for the Kubeflow UI."""
    rows = (
        ("unsafe answers to red-team prompts", evaluation.unsafe_rate),
        ("wins against SFT on benign prompts", evaluation.win_rate),
        ("refusals of harmless prompts that look unsafe", evaluation.over_refusal),
    )
    lines = ["| measure | rate | interval | prompts |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {e.value:.1%} | {e.low:.1%} to {e.high:.1%} | {e.n} |" for name, e in rows]
    return "\n".join(lines) + "\n"


def _answer(
    stage: Stage, backbone: Backbone, role: str, encoder: ChatEncoder, prompts: Sequence[str], temperature: float
) -> list[str]:
    settings = stage.context.settings
    engine = TransformersEngine(backbone, role, settings.evaluate.batch_size)
    seed = stage.context.seed(STAGE, 0)  # the same in every round: two evaluations differ by their policies alone
    sampling = Sampling(temperature, settings.evaluate.max_new_tokens, seed)
    progress = Progress(STAGE, len(prompts), "answers")
    rollout = engine.generate([encoder.prompt(prompt) for prompt in prompts], sampling)
    progress.update(len(prompts))
    return [backbone.text(ids) for ids in rollout.answers]


def _scored(
    backbone: Backbone,
    settings: Settings,
    answers: Sequence[HeldOutAnswer],
    baseline: Sequence[HeldOutAnswer],
    reward_folder: Path,
    cost_folder: Path,
) -> tuple[list[HeldOutAnswer], list[HeldOutAnswer]]:
    """Both lists with the scores of the round's reward and cost model, for `evaluate.scored_prompts` of each kind.

    An answer is scored beside the other policy's to the same prompt, or beside itself where there is none.
    """
    for role, folder in (("reward", reward_folder), ("cost", cost_folder)):
        if not backbone.has_adapter(role):
            backbone.load_role(role, folder)
    encoder = ChatEncoder(backbone.tokenizer, settings.ppo.max_prompt_tokens, settings.evaluate.max_new_tokens + 1)
    ours, theirs = ({a.prompt: encoder.sequence(a.prompt, a.answer) for a in group} for group in (answers, baseline))
    kinds = {a.prompt: a.kind for a in (*answers, *baseline)}
    prompts = spread_over_kinds(kinds, settings.evaluate.scored_prompts)
    pairs = [(ours[p] if p in ours else theirs[p], theirs[p] if p in theirs else ours[p]) for p in prompts]
    scores: dict[str, list[list[float]]] = {}  # of each prompt: [reward, cost] of our answer, and of theirs
    for rows in batches_by_length([row_length(pair) for pair in pairs], _PAIRS_PER_FORWARD):
        batch = pair_batch(backbone, [pairs[i] for i in rows], with_trunk=True)
        columns = []
        for role in ("reward", "cost"):
            with backbone.role(role), backbone.prepared(role):
                columns.append(scores_of_pairs(backbone, role, batch))
        scores |= zip((prompts[i] for i in rows), torch.stack(columns, dim=-1).tolist(), strict=True)

    def scored(group: Sequence[HeldOutAnswer], place: int) -> list[HeldOutAnswer]:
        found = [scores[answer.prompt][place] if answer.prompt in scores else (None, None) for answer in group]
        return [replace(a, reward=reward, cost=cost) for a, (reward, cost) in zip(group, found, strict=True)]

    return scored(answers, 0), scored(baseline, 1)


def spread_over_kinds(kinds: Mapping[str, str], count: int) -> list[str]:
    """At most `count` prompts of each kind, evenly spread over those there are (0: all of them).

    Held-out files are often sorted, by category for instance, so the first ones would not stand for all.
    """
    chosen: list[str] = []
    for kind in dict.fromkeys(kinds.values()):
        own = [prompt for prompt, its_kind in kinds.items() if its_kind == kind]
        n = min(count or len(own), len(own))
        chosen += [own[i * len(own) // n] for i in range(n)]
    return chosen


def _arena(answers: Sequence[HeldOutAnswer], theirs: dict[str, HeldOutAnswer]) -> Arena:
    counts = {(better, safe): 0 for better in (True, False) for safe in (True, False)}
    for answer in answers:
        better = (answer.reward or 0.0) > (theirs[answer.prompt].reward or 0.0)
        counts[better, (answer.cost or 0.0) <= 0.0] += 1
    return Arena(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
