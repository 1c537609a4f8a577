"""Which answers the report shows: chosen by a rule that anybody can check, not by hand.

Every prompt falls under one outcome of its kind: what became of the SFT model's answer. Of every outcome the first
few prompts are shown, in the order of the SHA-256 of the prompt, bad outcomes first; the counts say how common each is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from components.foundation.results import HeldOutAnswer

SHOWN_PER_OUTCOME = 2


@dataclass(frozen=True)
class AnswerPair:
    """The SFT model's and the last policy's answer to the same prompt."""

    before: HeldOutAnswer
    after: HeldOutAnswer


@dataclass(frozen=True)
class Outcome:
    """Prompts of one kind that fared alike; `tone` is bad, good or even, `pairs` the few of `total` that are shown."""

    name: str
    tone: str
    total: int
    pairs: list[AnswerPair]


@dataclass(frozen=True)
class KindOfPrompt:
    """All outcomes of one kind, bad ones first, those without a prompt left out."""

    kind: str
    name: str
    total: int
    outcomes: list[Outcome]


@dataclass(frozen=True)
class _Rule:
    name: str
    tone: str
    holds: Callable[[HeldOutAnswer, HeldOutAnswer], bool]


_RULES: dict[str, tuple[str, tuple[_Rule, ...]]] = {
    "red_team": (
        "Red-team prompts",
        (
            _Rule("safe before, unsafe now", "bad", lambda old, new: old.is_safe and not new.is_safe),
            _Rule("unsafe before and now", "bad", lambda old, new: not old.is_safe and not new.is_safe),
            _Rule("unsafe before, safe now", "good", lambda old, new: not old.is_safe and new.is_safe),
            _Rule("safe before and now", "even", lambda old, new: old.is_safe and new.is_safe),
        ),
    ),
    "benign": (
        "Benign prompts",
        (
            _Rule("less helpful than before", "bad", lambda old, new: new.helpfulness < old.helpfulness),
            _Rule("more helpful than before", "good", lambda old, new: new.helpfulness > old.helpfulness),
            _Rule("as helpful as before", "even", lambda old, new: new.helpfulness == old.helpfulness),
        ),
    ),
    "lookalike": (
        "Harmless prompts that look unsafe",
        (
            _Rule("answered before, refused now", "bad", lambda old, new: not old.is_refusal and new.is_refusal),
            _Rule("refused before and now", "bad", lambda old, new: old.is_refusal and new.is_refusal),
            _Rule("refused before, answered now", "good", lambda old, new: old.is_refusal and not new.is_refusal),
            _Rule("answered before and now", "even", lambda old, new: not old.is_refusal and not new.is_refusal),
        ),
    ),
}


def choose_answers(
    before: Sequence[HeldOutAnswer], after: Sequence[HeldOutAnswer], shown: int = SHOWN_PER_OUTCOME
) -> list[KindOfPrompt]:
    """Both policies' answers, matched by prompt -> the pairs to show, by kind and outcome."""
    old = {answer.prompt: answer for answer in before}
    pairs = [AnswerPair(old[answer.prompt], answer) for answer in after if answer.prompt in old]
    pairs.sort(key=lambda pair: hashlib.sha256(pair.after.prompt.encode("utf-8", "surrogatepass")).digest())
    kinds = []
    for kind, (name, rules) in _RULES.items():
        of_kind = [pair for pair in pairs if pair.after.kind == kind]
        outcomes = []
        for rule in rules:
            matching = [pair for pair in of_kind if rule.holds(pair.before, pair.after)]
            if matching:
                outcomes.append(Outcome(rule.name, rule.tone, len(matching), matching[:shown]))
        if of_kind:
            kinds.append(KindOfPrompt(kind, name, len(of_kind), outcomes))
    return kinds
