"""Who says what is safe and what is helpful: one Protocol for written rules, a language model, or people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from components.foundation.errors import AnnotationError, SettingsError
from components.foundation.preference import PromptRecord
from components.foundation.setting_sections import AnnotateSettings


@dataclass(frozen=True)
class AnswerJudgement:
    """Of one answer. `helpfulness` in [0, 1] is blind to harm; `severity` is 0 (safe) to 3."""

    is_safe: bool
    is_refusal: bool
    helpfulness: float
    severity: int


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt, to be compared."""

    prompt: PromptRecord
    answer_0: str
    answer_1: str


@dataclass(frozen=True)
class PairJudgement:
    """Of a pair: each answer judged, and two independent rankings (ids 0 or 1)."""

    judgement_0: AnswerJudgement
    judgement_1: AnswerJudgement
    better_id: int
    safer_id: int


class Judge(Protocol):
    """Judges answers. A reply that cannot be used is None, and is counted by the caller; never a default."""

    def judge_answers(self, items: Sequence[tuple[PromptRecord, str]]) -> list[AnswerJudgement | None]:
        """(prompt, answer) pairs -> one judgement each, in order."""
        ...

    def compare(self, pairs: Sequence[AnswerPair]) -> list[PairJudgement | None]:
        """Answer pairs -> one judgement each, in order."""
        ...


def make_judge(settings: AnnotateSettings) -> Judge:
    """The judge that the settings name.

    With annotator=human it judges where nobody can wait, in evaluation: a model if `judge_url` names one, else rules.

    Raises:
        SettingsError: an LLM judge without URL or model.
    """
    if judge_name(settings) == "rules":
        from components.foundation.judging.rules import RulesJudge

        return RulesJudge()
    if not settings.judge_url or not settings.judge_model:
        raise SettingsError("a model as judge needs annotate.judge_url and annotate.judge_model")
    from components.foundation.judging.llm import LlmJudge

    return LlmJudge(settings.judge_url, settings.judge_model, os.environ.get(settings.judge_key_env, ""))


def judge_name(settings: AnnotateSettings) -> str:
    """Who judges where `make_judge` is asked; what two of them say cannot be compared."""
    from_rules = settings.annotator == "rules" or (settings.annotator == "human" and not settings.judge_url)
    return "rules" if from_rules else f"model {settings.judge_model}"


def usable(judgements: Sequence[AnswerJudgement | None], min_share: float) -> list[AnswerJudgement]:
    """All judgements, when enough are usable to stand on; unusable ones are left out.

    Raises:
        AnnotationError: fewer than `min_share` were usable.
    """
    good = [j for j in judgements if j is not None]
    check_usable(len(good), len(judgements), min_share)
    return good


def check_usable(good: int, total: int, min_share: float) -> None:
    """Raises AnnotationError when fewer than `min_share` of `total` replies are good."""
    if total and good < min_share * total:
        raise AnnotationError(
            f"only {good} of {total} judgements were usable, fewer than the {min_share:.0%} that "
            "annotate.min_usable_share asks for: look at the annotator's replies"
        )
