"""The run's records as charts: which values go into which chart, in which colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from components.foundation.results import Estimate, HeldOutAnswer
from components.report.charts import (
    Cloud,
    Line,
    Mark,
    Pair,
    dumbbell_chart,
    interval_chart,
    scatter_chart,
    step_chart,
)
from components.report.ratings import ANCHOR, Rating
from components.report.report_data import ReportData
from components.report.svg import number, percent

_HARMLESS_KINDS = ("benign", "lookalike")
_LEAST_ELO_RANGE = (ANCHOR - 50.0, ANCHOR + 50.0)


@dataclass(frozen=True)
class Figures:
    """Every chart of the page."""

    unsafe_by_round: Markup
    unsafe_by_category: Markup
    win_rate: Markup
    over_refusal: Markup
    helpful_ladder: Markup
    harmless_ladder: Markup
    multiplier: Markup
    cost: Markup
    reward: Markup
    kl: Markup
    red_team_scores: Markup
    harmless_scores: Markup


def make_figures(data: ReportData, helpful: Sequence[Rating], harmless: Sequence[Rating]) -> Figures:
    """All charts of a run; the ladders are `ratings.ladder`'s."""
    traces = [result.ppo for result in data.rounds]
    everything = [*_scores(data.answers[-1], ()), *_scores(data.scored_sft_answers, ())]
    return Figures(
        unsafe_by_round=interval_chart(
            "Share of unsafe answers to red-team prompts, for every policy",
            _rate_marks([evaluation.unsafe_rate for evaluation in data.evaluations]),
            percent,
            level=data.max_unsafe_rate,
        ),
        unsafe_by_category=dumbbell_chart(
            "Share of unsafe answers for every harm category, SFT against the last round", category_pairs(data)
        ),
        win_rate=interval_chart(
            "Share of benign prompts on which a policy's answer is more helpful than the SFT model's",
            _rate_marks([evaluation.win_rate for evaluation in data.evaluations], first=1),
            percent,
            level=0.5,
        ),
        over_refusal=interval_chart(
            "Share of harmless prompts that look unsafe and are refused, for every policy",
            _rate_marks([evaluation.over_refusal for evaluation in data.evaluations]),
            percent,
        ),
        helpful_ladder=_ladder_chart("Elo ratings for helpfulness", helpful),
        harmless_ladder=_ladder_chart("Elo ratings for harmlessness", harmless),
        multiplier=step_chart(
            "Lagrange multiplier lambda over PPO steps", [Line("lambda", "limiting", [t.multiplier for t in traces])]
        ),
        cost=step_chart(
            "Mean cost of each rollout batch over PPO steps, its moving average, and the threshold",
            [
                Line("cost of the batch", "sft", [t.cost for t in traces]),
                Line("moving average", "policy strong", [t.cost_moving_average for t in traces], dots=False),
            ],
            levels=[t.threshold for t in traces],
        ),
        reward=step_chart(
            "Mean reward of each rollout batch over PPO steps", [Line("reward", "policy", [t.reward for t in traces])]
        ),
        kl=step_chart(
            "KL divergence from the reference over PPO steps", [Line("KL", "policy", [t.kl for t in traces])]
        ),
        red_team_scores=_score_chart("red-team prompts", data, ("red_team",), everything),
        harmless_scores=_score_chart("harmless prompts", data, _HARMLESS_KINDS, everything),
    )


def policy_name(round_number: int) -> str:
    """Round 0 is the SFT model."""
    return f"round {round_number}" if round_number else "SFT"


def category_pairs(data: ReportData) -> list[Pair]:
    """Harm categories of the red-team prompts, those with the most unsafe answers now first."""
    before, after = (e.unsafe_rate_by_category for e in (data.sft, data.last.evaluation))
    pairs = [Pair(name.replace("_", " "), before[name], after[name]) for name in before.keys() & after.keys()]
    return sorted(pairs, key=lambda pair: (-pair.after.value, -pair.before.value, pair.label))


def _rate_marks(rates: Sequence[Estimate], first: int = 0) -> list[Mark]:
    """Of every policy from `first` on; one that was asked nothing has no rate."""
    return [
        Mark(policy_name(index), rate.value, rate.low, rate.high, "policy" if index else "sft")
        for index, rate in enumerate(rates)
        if rate.n and index >= first
    ]


def _ladder_chart(name: str, ratings: Sequence[Rating]) -> Markup:
    marks = [
        Mark(policy_name(index), rating.value, rating.low, rating.high, "policy" if index else "sft")
        for index, rating in enumerate(ratings)
    ]
    return interval_chart(
        name, marks, lambda value: number(value, 0), level=ANCHOR, share=False, around=_LEAST_ELO_RANGE
    )


def _score_chart(which: str, data: ReportData, kinds: Sequence[str], around: Sequence[tuple[float, float]]) -> Markup:
    clouds = [
        Cloud("SFT", "sft", _scores(data.scored_sft_answers, kinds)),
        Cloud(policy_name(data.last.round), "policy", _scores(data.answers[-1], kinds)),
    ]
    return scatter_chart(f"Reward and cost of the answers to {which}, SFT and last round", clouds, around)


def _scores(answers: Sequence[HeldOutAnswer], kinds: Sequence[str]) -> list[tuple[float, float]]:
    """(reward, cost) of the answers of some kinds, or of all."""
    return [
        (answer.reward, answer.cost)
        for answer in answers
        if answer.reward is not None and answer.cost is not None and (not kinds or answer.kind in kinds)
    ]
