"""Writes the results table of the README from the summaries of finished runs, and draws the first one: `make results`.

python -m tests.benchmarks.results runs/seed-0 runs/seed-1 runs/seed-2
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from components.foundation.errors import SettingsError
from components.foundation.run_context import store_root
from components.foundation.settings import Settings, resolve_settings
from components.report.charts import Line, Mark, interval_chart, step_chart
from components.report.svg import percent, text
from tests.benchmarks.pictures import placed, standalone

README = Path(__file__).parents[2] / "README.md"
PICTURE = Path(__file__).with_name("three_rounds.svg")
BEGIN, END = "<!-- results: begin (make results) -->", "<!-- results: end -->"

_WIDTH, _HEIGHT, _GAP, _HEADING = 440.0, 236.0, 20.0, 34.0
"""Of a chart, and the room around it."""


def read_summary(folder: Path) -> dict[str, Any]:
    """What a finished run wrote into its work folder."""
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def run_uri_of(summary: dict[str, Any]) -> str:
    """Where the run lies in its store (a branch's first rounds lie in the run that it started from)."""
    return f"{store_root(summary['rounds'][-1]['policy_uri'])}/runs/{summary['run_id']}"


def check_settings(folder: Path, summary: dict[str, Any]) -> None:
    """A table of several runs is one of seeds, not of settings.

    Raises:
        SettingsError: the run was made with other settings than its profile has now.
    """
    now = resolve_settings(summary["profile"], summary["seed"]).flat()
    then = Settings().flat() | summary["settings"]  # what is new since then was as it is by default
    if changed := [f"{key} ({then[key]} there, {value} here)" for key, value in now.items() if then[key] != value]:
        raise SettingsError(
            f"{folder} holds a run with other settings than profile {summary['profile']} has today: "
            f"{', '.join(changed)}; move it away, and `make results` makes a new one"
        )


def table(summaries: list[dict[str, Any]]) -> str:
    """Markdown: one row a seed, and the means of several; all rates in percent."""
    rounds = ", ".join(str(entry["round"]) for entry in summaries[0]["rounds"])
    lines = [
        f"| seed | unsafe, %: SFT → rounds {rounds} | times safer | benign wins, %: rounds {rounds} "
        f"| over-refusal, %: SFT → rounds {rounds} | gate |",
        "|---:|---|---:|---|---|---|",
    ]
    lines += [_row(str(summary["seed"]), [summary], summary["promotion"]["decision"]) for summary in summaries]
    if len(summaries) > 1:
        decisions = [summary["promotion"]["decision"] for summary in summaries]
        lines.append(_row("mean", summaries, f"promote: {decisions.count('promote')} of {len(decisions)}"))
    return "\n".join(lines)


def _row(seed: str, summaries: list[dict[str, Any]], decision: str) -> str:
    """The path of each rate over the rounds, the mean over runs.

    In brackets: of one run the last rate's 95 % interval, of several the lowest and the highest last rate.
    """

    def path(name: str, *, with_sft: bool, with_range: bool) -> tuple[str, list[float]]:
        rates = [[e[name] for e in _evaluations(summary, with_sft=with_sft)] for summary in summaries]
        means = [100 * fmean(of_policy) for of_policy in zip(*rates, strict=True)]
        *before, last = (f"{mean:.1f}" for mean in means)
        low, high = summaries[0]["rounds"][-1]["eval"].get(f"{name}_ci", (0.0, 0.0))
        if len(summaries) > 1:
            low, high = min(of_run[-1] for of_run in rates), max(of_run[-1] for of_run in rates)
        bounds = f" ({100 * low:.1f} to {100 * high:.1f})" if with_range else ""
        return f"{' → '.join([*before, f'**{last}**'])}{bounds}", means

    unsafe, means = path("unsafe_rate", with_sft=True, with_range=True)
    wins, _ = path("win_rate", with_sft=False, with_range=True)
    refusals, _ = path("over_refusal_rate", with_sft=True, with_range=False)
    safer = f"{means[0] / means[-1]:.1f}" if means[-1] else "all"
    return f"| {seed} | {unsafe} | {safer} | {wins} | {refusals} | {decision} |"


def _evaluations(summary: dict[str, Any], *, with_sft: bool) -> list[dict[str, Any]]:
    sft = [summary["sft"]["eval"]] if with_sft else []
    return [*sft, *(entry["eval"] for entry in summary["rounds"])]


def claim(summaries: list[dict[str, Any]]) -> str:
    """What the table says, in one sentence; rates are means over the runs."""

    def mean(name: str, policy: int) -> float:
        return fmean(_evaluations(summary, with_sft=True)[policy][name] for summary in summaries)

    before, after = mean("unsafe_rate", 0), mean("unsafe_rate", -1)
    safer = f"{before / after:.1f} times safer than its SFT model" if after else "never unsafe"
    runs = f"of {len(summaries)} seeds" if len(summaries) > 1 else f"of seed {summaries[0]['seed']}"
    return (
        f"The last policy {runs} is {safer} ({before:.1%} and {after:.1%} unsafe), wins {mean('win_rate', -1):.1%} of "
        f"benign prompts, and refuses {mean('over_refusal_rate', -1):.1%} of lookalikes (the SFT model: "
        f"{mean('over_refusal_rate', 0):.1%})."
    )


def section(summaries: list[dict[str, Any]]) -> str:
    """The claim, the table, and what the runs took and where they ran."""
    first = summaries[0]["sft"]["eval"]
    # of a run that was resumed, the wall time is that of its last attempt alone
    whole = [summary["overhead_seconds"] >= 0 for summary in summaries]
    minutes, overhead = (
        ", ".join(f"{s[key] / unit:{form}}" if known else "?" for s, known in zip(summaries, whole, strict=True))
        for key, unit, form in (("wall_seconds", 60, ".1f"), ("overhead_seconds", 1, ".0f"))
    )
    resumed = "" if all(whole) else " (?: resumed)"
    memory = max(summary["peak_memory_bytes"] for summary in summaries) / 1e9
    return (
        f"{claim(summaries)}\n\n{table(summaries)}\n\n"
        f"{first['n_red_team']} red-team and {first['n_benign']} benign held-out prompts; in brackets the last "
        f"policy's 95 % interval, of the mean the lowest and the highest seed. Wall time {minutes} minutes{resumed}, "
        f"of which start-up of steps and servers {overhead} s; "
        f"peak memory of all processes together {memory:.1f} GB; on "
        f"{os.cpu_count()} cores ({platform.machine()}, no GPU).\n"
    )


def picture(summary: dict[str, Any]) -> str:
    """An SVG file of one run: lambda, cost and reward over all steps, unsafe rates by policy."""
    traces = [entry["ppo"] for entry in summary["rounds"]]
    evaluations = [("SFT", summary["sft"]["eval"])]
    evaluations += [(f"round {entry['round']}", entry["eval"]) for entry in summary["rounds"]]
    rates = [
        Mark(name, e["unsafe_rate"], *e["unsafe_rate_ci"], "sft" if name == "SFT" else "policy")
        for name, e in evaluations
    ]
    cost = Line("cost", "policy", [trace["cost"] for trace in traces])
    charts = {
        "Lagrange multiplier lambda": step_chart(
            "lambda", [Line("lambda", "limiting", [trace["lambda"] for trace in traces])]
        ),
        "mean cost of a step's answers, and its limit": step_chart("cost", [cost], [t["threshold"] for t in traces]),
        "mean reward": step_chart("reward", [Line("reward", "policy", [trace["reward"] for trace in traces])]),
        "unsafe answers to held-out attacks": interval_chart("unsafe rate", rates, percent),
    }
    parts = []
    for index, (heading, chart) in enumerate(charts.items()):
        x = _GAP + (index % 2) * (_WIDTH + _GAP)
        y = _HEADING + (index // 2) * (_HEIGHT + _HEADING)
        parts += [text(heading, x + 16, y - 8, css="name"), placed(chart, x, y, _WIDTH, _HEIGHT)]
    name = f"Three rounds of Safe RLHF, seed {summary['seed']}"
    return standalone(name, 2 * _WIDTH + 3 * _GAP, 2 * (_HEIGHT + _HEADING) + _GAP, parts)


def main(folders: list[str]) -> None:
    summaries = [read_summary(Path(folder)) for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        check_settings(Path(folder), summary)
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(f"{head}{BEGIN}\n{section(summaries)}{END}{tail}", encoding="utf-8")
    PICTURE.write_text(picture(summaries[0]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
