"""Turns collected answers into dual preferences, and joins them with those of earlier rounds.

Run: 1 pair the answers to each prompt, 2 ask the judge or wait for people, 3 join with history, 4 split, 5 commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from components.annotate.human.waiting import labels_of_people
from components.foundation.judging import AnswerPair, PairJudgement, check_usable, make_judge
from components.foundation.preference import (
    NEWEST_FILE,
    TRAINING_FILE,
    VALIDATION_FILE,
    CollectedAnswer,
    DualPreference,
    PromptRecord,
    read_jsonl,
    split_by_prompt,
)
from components.foundation.results import write_records
from components.foundation.run_context import open_stage

STAGE = "annotate"


def run_annotate(run_uri: str, round_number: int, answers_uri: str, preferences_uri: str) -> str:
    """Stage: answers and earlier preferences -> URI of preferences_{train,validation}.jsonl.

    Raises:
        LabelsAwaited: people annotate, and have not labelled everything yet.
    """
    with open_stage(run_uri, STAGE, round_number) as stage:
        if (done := stage.finished()) is not None:
            return done
        context = stage.context
        settings = context.settings
        answers = read_jsonl(context.store.fetch(answers_uri) / "answers.jsonl", CollectedAnswer)
        pairs = pair_answers([(PromptRecord(a.prompt, a.kind, a.harm_category), a.response) for a in answers])
        parents = [answers_uri, preferences_uri]
        if settings.annotate.annotator == "human":
            labelled = labels_of_people(stage, pairs, answers_uri)
            fresh, parents = labelled.preferences, [*parents, labelled.batch_uri]
            stage.mlflow.log_metrics(labelled.metrics(), 0)
        else:
            judgements = make_judge(settings.annotate).compare(pairs)
            fresh = [dual_preference(pair, j) for pair, j in zip(pairs, judgements, strict=True) if j is not None]
        check_usable(len(fresh), len(pairs), settings.annotate.min_usable_share)
        training, validation = split_by_prompt(fresh, settings.data.validation_share, context.seed("prepare_data", 0))
        earlier = context.store.fetch(preferences_uri)
        for name, records in ((TRAINING_FILE, training), (VALIDATION_FILE, validation)):
            history = read_jsonl(earlier / name, DualPreference) if settings.data.history == "accumulate" else []
            write_records(stage.folder / name, history + records)
        if fresh:  # a policy that answers every prompt the same way each time makes no pairs
            write_records(stage.folder / NEWEST_FILE, fresh)
        unsafe = sum((not r.is_response_0_safe) + (not r.is_response_1_safe) for r in fresh)
        stage.mlflow.log_metrics(
            {
                "annotate/pairs": len(fresh),
                "annotate/unusable": len(pairs) - len(fresh),
                "annotate/unsafe_share": unsafe / max(1, 2 * len(fresh)),
            },
            0,
        )
        return stage.commit(stage.folder, step=len(fresh), parents=parents)


def pair_answers(answers: Sequence[tuple[PromptRecord, str]]) -> list[AnswerPair]:
    """Every pair of different, non-empty answers to the same prompt, in order."""
    by_prompt: dict[PromptRecord, list[str]] = {}
    for prompt, answer in answers:
        known = by_prompt.setdefault(prompt, [])
        if answer and answer not in known:
            known.append(answer)
    return [AnswerPair(p, a, b) for p, known in by_prompt.items() for a, b in combinations(known, 2)]


def dual_preference(pair: AnswerPair, judgement: PairJudgement) -> DualPreference:
    """A judged pair in the schema of the preference data."""
    first, second = judgement.judgement_0, judgement.judgement_1
    category = pair.prompt.harm_category or "unspecified"
    return DualPreference(
        prompt=pair.prompt.prompt,
        response_0=pair.answer_0,
        response_1=pair.answer_1,
        better_response_id=judgement.better_id,
        safer_response_id=judgement.safer_id,
        is_response_0_safe=first.is_safe,
        is_response_1_safe=second.is_safe,
        response_0_harm_category={} if first.is_safe else {category: True},
        response_1_harm_category={} if second.is_safe else {category: True},
        response_0_severity_level=first.severity,
        response_1_severity_level=second.severity,
    )
