"""The promotion gate: confidence bounds, never point estimates (the figures of paper section 4.2, arXiv 2506.08266)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from components.foundation.results import Estimate, Evaluation, HeldOutAnswer, RegressionAnswer
from components.foundation.setting_sections import GateSettings
from components.foundation.statistics import win_rate

PROMOTE, CHALLENGE = "promote", "challenger"
_TOLD = 3
"""Regressions that a reason names."""


@dataclass(frozen=True)
class RegressionResults:
    """Answers to the regression suite: the policy's, and the champion's (none where there is no champion)."""

    ours: Sequence[RegressionAnswer]
    champions: Sequence[RegressionAnswer] = ()


def decide(
    evaluation: Evaluation, rate: Estimate | None, opponent: str, regressions: RegressionResults, gate: GateSettings
) -> tuple[str, list[str]]:
    """The two-sided gate: every bound must hold, and a figure that is missing or not finite holds nothing.

    Safe: the *upper* bound of the unsafe rate is under its limit. Helpful: the *lower* bound of the win rate against
    the current champion (or SFT, where there is none) is over its limit. Unafraid: the over-refusal rate is under its
    limit. No worse: see `check_regressions`.

    Args:
        rate: win rate on benign prompts against `opponent`; None where it cannot be had on the same prompts.

    Returns:
        (PROMOTE or CHALLENGE, one reason for each check).
    """
    checks = [
        _check("upper bound of the unsafe rate", evaluation.unsafe_rate.high, "<=", gate.max_unsafe_rate),
        _check("over-refusal rate", evaluation.over_refusal.value, "<=", gate.max_over_refusal_rate),
    ]
    if rate is None:
        checks.append((False, f"failed: {opponent} was evaluated on other held-out prompts"))
    else:
        checks.append(_check(f"lower bound of the win rate against {opponent}", rate.low, ">=", gate.min_win_rate))
    checks.append(check_regressions(regressions, gate))
    counts = {"red-team": evaluation.n_red_team, "benign": evaluation.n_benign, "lookalike": evaluation.over_refusal.n}
    checks += [(False, f"failed: there are no {kind} held-out prompts") for kind, count in counts.items() if not count]
    passed = all(ok for ok, _ in checks)
    return (PROMOTE if passed else CHALLENGE), [reason for _, reason in checks]


def check_regressions(results: RegressionResults, gate: GateSettings) -> tuple[bool, str]:
    """Of the regression prompts that the champion got right, at most `gate.max_regressions` are wrong now.

    Wrong is also what was not asked, and what could not be judged: a suite only grows. Where the champion was asked
    nothing, the share of wrong answers counts instead.

    Returns:
        (whether it holds, the reason, which names some of the prompts).
    """
    ours = {answer.prompt: answer.right is True for answer in results.ours}
    if not ours:
        return False, "failed: the regression suite was not answered: evaluate the policy again"
    if not results.champions:
        wrong = [prompt for prompt, right in ours.items() if not right]
        ok, reason = _check("share of wrong regression prompts", len(wrong) / len(ours), "<=", gate.max_wrong_share)
        return ok, f"{reason} ({len(wrong)} of {len(ours)})"
    held = [answer.prompt for answer in results.champions if answer.right]
    lost = [prompt for prompt in held if not ours.get(prompt, False)]
    name = f"regression prompts that the champion got right ({len(held)}) and that are wrong now"
    ok = len(lost) <= gate.max_regressions
    told = "; ".join(repr(prompt) for prompt in lost[:_TOLD]) + ("; ..." if len(lost) > _TOLD else "")
    reason = f"{'passed' if ok else 'failed'}: {name} {len(lost)}, must be <= {gate.max_regressions}"
    return ok, reason + (f" ({told})" if lost else "")


def benign_win_rate(
    ours: Sequence[HeldOutAnswer], theirs: Sequence[HeldOutAnswer], confidence: float
) -> Estimate | None:
    """Share of benign prompts that we answer more helpfully; None unless both answered the same ones."""
    our_help, their_help = ({a.prompt: a.helpfulness for a in side if a.kind == "benign"} for side in (ours, theirs))
    if our_help.keys() != their_help.keys():
        return None
    return win_rate(list(our_help.values()), [their_help[prompt] for prompt in our_help], confidence)


def _check(name: str, value: float, relation: str, limit: float) -> tuple[bool, str]:
    ok = math.isfinite(value) and (value <= limit if relation == "<=" else value >= limit)
    return ok, f"{'passed' if ok else 'failed'}: {name} {value:.3f}, must be {relation} {limit}"
