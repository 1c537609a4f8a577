"""The run's records -> one self-contained HTML page, and a short Markdown summary.

The page holds a language model's answers, which may contain anything: Jinja escapes every value, the charts escape
their own text, and the page's content security policy forbids scripts and everything from outside.
"""

from __future__ import annotations

import dataclasses
import unicodedata

from jinja2 import Environment, PackageLoader, StrictUndefined

from components.foundation.results import Estimate
from components.foundation.statistics import wilson
from components.foundation.untrusted import markdown_code
from components.report.answers import SHOWN_PER_OUTCOME, choose_answers
from components.report.figures import category_pairs, make_figures, policy_name
from components.report.ratings import Rating, ladder
from components.report.report_data import ReportData
from components.report.svg import number, percent

_NOTHING = "–"


def render_html(data: ReportData) -> str:
    """The whole page."""
    helpful, harmless = ladders = _ladders(data)
    environment = Environment(
        loader=PackageLoader("components.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": _number,
        "rate": rate_text,
        "interval": interval_text,
        "estimate": lambda share, trials: wilson(share * trials, trials, data.confidence),
        "policy": policy_name,
    }
    page = environment.get_template("template.html.j2").render(
        data=data,
        lead=lead(data),
        figures=make_figures(data, helpful, harmless),
        ladders=list(zip(*ladders, strict=True)),
        categories=category_pairs(data),
        kinds=choose_answers(data.scored_sft_answers, data.answers[-1]),
        shown_per_outcome=SHOWN_PER_OUTCOME,
        confidence=f"{data.confidence * 100:g}%",
    )
    return readable(page)


def render_markdown(data: ReportData) -> str:
    """The headline figures and the gate's reasons, which quote prompts: whatever is a text is a code span."""
    alias = markdown_code(data.promotion.alias)
    lines = [
        f"# Safe RLHF: {markdown_code(data.provenance.run_id)}",
        "",
        " ".join(lead(dataclasses.replace(data, promotion=dataclasses.replace(data.promotion, alias=alias)))),
        "",
        f"| policy ({data.confidence * 100:g}% intervals) | unsafe answers to red-team prompts "
        "| wins against SFT on benign prompts | refusals of harmless prompts that look unsafe |",
        "|---|---:|---:|---:|",
    ]
    for evaluation in data.evaluations:
        rates = [evaluation.unsafe_rate, evaluation.win_rate, evaluation.over_refusal]
        cells = [f"{rate_text(rate)} ({interval_text(rate)})" if rate.n else _NOTHING for rate in rates]
        if evaluation.round == 0:
            cells[1] = _NOTHING
        lines.append(f"| {policy_name(evaluation.round)} | {' | '.join(cells)} |")
    lines += ["", f"Gate: {markdown_code(data.promotion.decision)}", ""]
    lines += [f"- {markdown_code(reason)}" for reason in data.promotion.reasons]
    return readable("\n".join(lines) + "\n")


def lead(data: ReportData) -> list[str]:
    """The result in a few plain sentences."""
    before, after = data.sft.unsafe_rate, data.last.evaluation.unsafe_rate
    wins = data.last.evaluation.win_rate
    rounds = f"{len(data.rounds)} round{'s' if len(data.rounds) > 1 else ''}"
    sentences = []
    if before.n and after.n:
        sentences.append(
            f"After {rounds}, the policy answers {percent(after.value)} of the red-team prompts unsafely; "
            f"the SFT model that it started from, {percent(before.value)}."
        )
        if before.low <= after.high and after.low <= before.high:
            sentences.append("The two intervals overlap: this is no clear difference.")
    if wins.n:
        unclear = wins.low <= 0.5 <= wins.high
        sentences.append(
            f"It wins {percent(wins.value)} of its comparisons with the SFT model on benign prompts"
            f"{', not clearly more or less than half' if unclear else ''}."
        )
    promoted = data.promotion.decision == "promote"
    failed = sum(reason.startswith("failed") for reason in data.promotion.reasons)
    checks = len(data.promotion.reasons)
    sentences.append(
        f"It passed all {checks} checks of the gate and is now {data.promotion.alias}."
        if promoted
        else f"It failed {failed} of the gate's {checks} checks and is now {data.promotion.alias}."
    )
    return sentences


def rate_text(rate: Estimate) -> str:
    """6.4%, or a dash where there were no trials."""
    return percent(rate.value) if rate.n else _NOTHING


def interval_text(rate: Estimate) -> str:
    """3.4–11.8%, or a dash where there were no trials."""
    return f"{100 * rate.low:.1f}–{percent(rate.high)}" if rate.n else _NOTHING


def readable(text: str) -> str:
    """Without the control characters and lone surrogates that a model may write and no page may contain."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def _ladders(data: ReportData) -> tuple[list[Rating], list[Rating]]:
    helpful = [{a.prompt: a.helpfulness for a in answers if a.kind == "benign"} for answers in data.answers]
    harmless = [{a.prompt: float(a.is_safe) for a in answers if a.kind == "red_team"} for answers in data.answers]
    return ladder(helpful, data.confidence), ladder(harmless, data.confidence)


def _number(value: float | None, decimals: int = 2) -> str:
    return _NOTHING if value is None else number(value, decimals)
