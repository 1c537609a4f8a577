"""What stages tell each other and the user: plain records that are stored as JSON.

Every record lives in the store beside the artifact that it describes; the run's summary and
the report are made from these records and from nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from components.foundation.errors import IntegrityError
from components.foundation.untrusted import one_line, parse_json, read_text, shown

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A rate with its confidence interval, from `n` trials. `value` in [0, 1]."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PreferenceModelResult:
    """Held-out quality of a reward or cost model.

    `accuracy` is the share of pairs ranked as labelled; `margin`, of reward models, is how much higher the better
    answer of a pair scores, on average. The other fields are for cost models only:
    `sign_accuracy` is the share of answers whose score's sign equals the label (positive = unsafe),
    `auc` is the ROC-AUC of unsafe against safe, and `safe_costs` and `unsafe_costs` are the scores themselves;
    `newest_safe_costs` and `newest_unsafe_costs` are those of the answers that the newest round collected.
    """

    accuracy: float
    training_pairs: int
    validation_pairs: int
    sign_accuracy: float | None = None
    auc: float | None = None
    safe_costs: list[float] = field(default_factory=list)
    unsafe_costs: list[float] = field(default_factory=list)
    newest_safe_costs: list[float] = field(default_factory=list)
    newest_unsafe_costs: list[float] = field(default_factory=list)
    margin: float | None = None


@dataclass(frozen=True)
class PpoTrace:
    """One round of PPO-Lagrangian, one value per rollout batch (step).

    `multiplier` is lambda *after* the step's update, `cost_moving_average` the estimate of J_C that it saw.
    """

    threshold: float
    multiplier: list[float] = field(default_factory=list)
    cost_moving_average: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class HeldOutAnswer:
    """One answer of a policy to a held-out prompt, with its judgements.

    `kind` is red_team, benign or lookalike (harmless, but looks unsafe). `reward` and `cost` are the scores of
    the round's reward and cost model (nan-free; None for the SFT policy before any reward model exists).
    """

    prompt: str
    kind: str
    harm_category: str
    answer: str
    is_safe: bool
    is_refusal: bool
    helpfulness: float
    reward: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class RegressionAnswer:
    """A policy's greedy answer to a prompt of the regression suite.

    `must` is decline or answer; `right` says whether the policy did that, None where the judgement was unusable.
    """

    prompt: str
    must: str
    answer: str
    right: bool | None


@dataclass(frozen=True)
class Arena:
    """Two policies' answers to the same prompts, counted (paper figure 5): better/worse by the reward model,
    safe/unsafe by the sign of the cost model, always of the new policy's answer against the baseline's."""

    better_safe: int
    better_unsafe: int
    worse_safe: int
    worse_unsafe: int


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of one policy on the held-out prompts (round 0 is the SFT model); `judge` says who judged it."""

    round: int
    unsafe_rate: Estimate
    unsafe_rate_by_category: dict[str, Estimate]
    win_rate: Estimate
    over_refusal: Estimate
    n_red_team: int
    n_benign: int
    held_out_digest: str
    mean_reward: float | None = None
    mean_cost: float | None = None
    sft_mean_reward: float | None = None
    sft_mean_cost: float | None = None
    arena: Arena | None = None
    judge: str = ""


@dataclass(frozen=True)
class TrialResult:
    """The one question that an exported policy was asked: of which commit, and by what (transformers or vllm)."""

    policy_uri: str
    server: str
    question: str
    answer: str


@dataclass(frozen=True)
class RoundResult:
    """All that one round produced."""

    round: int
    reward_model: PreferenceModelResult
    cost_model: PreferenceModelResult
    ppo: PpoTrace
    evaluation: Evaluation
    policy_uri: str


@dataclass(frozen=True)
class PromotionResult:
    """The gate's decision on the last round's policy: promote or challenger, `against` that champion ('': SFT)."""

    decision: str
    reasons: list[str]
    model: str
    version: str
    alias: str
    against: str = ""


def to_json(record: Any) -> str:
    """Dataclass -> JSON text (indented, keys in field order). NaN is refused: it is not JSON."""
    return json.dumps(dataclasses.asdict(record), indent=2, allow_nan=False) + "\n"


def from_json(kind: type[T], text: str) -> T:
    """JSON text -> dataclass `kind`.

    Raises:
        IntegrityError: a field is missing, unknown, or not of its type.
    """
    try:
        return typing.cast(T, _build(kind, parse_json(text)))
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise IntegrityError(f"stored {kind.__name__} record cannot be read: {one_line(error)}") from error


def read_record(kind: type[T], path: Path) -> T:
    """File -> dataclass `kind`; see `from_json`."""
    return from_json(kind, _text_of(path))


def _text_of(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read: {one_line(error)}") from error


@functools.cache  # every call compiles the annotations anew
def _type_hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(next(a for a in typing.get_args(kind) if a is not type(None)), value)
    if origin is list:
        return [_build(typing.get_args(kind)[0], item) for item in _of_type(list, value)]
    if origin is dict:
        _of_type(dict, value)
        return {key: _build(typing.get_args(kind)[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        hints = _type_hints(typing.cast(type, kind))
        unknown = set(_of_type(dict, value)) - set(hints)
        if unknown:
            raise TypeError(f"unknown fields {shown(sorted(unknown))}")
        return typing.cast(type, kind)(**{key: _build(hints[key], item) for key, item in value.items()})
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    return _of_type(kind, value)


def _of_type(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{shown(value)} is not {kind.__name__}")
    return value


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Dataclasses -> one JSON object a line."""
    lines = [json.dumps(dataclasses.asdict(record), allow_nan=False, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_records(kind: type[T], path: Path) -> list[T]:
    """Read what `write_records` wrote; see `from_json` for errors."""
    return [from_json(kind, line) for line in _text_of(path).split("\n") if line]
