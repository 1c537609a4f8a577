"""Writes the results table of the README from the summaries of finished runs: `make results`.

python -m tests.benchmarks.results runs/seed-0 runs/seed-1 runs/seed-2
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- results: begin (make results) -->", "<!-- results: end -->"


def table(summaries: list[dict[str, Any]]) -> str:
    """Markdown: one row a policy of each seed."""
    lines = [
        "| seed | policy | unsafe rate (95 %) | benign win rate (95 %) | over-refusal | cost AUC | last lambda |",
        "|---:|---|---|---|---:|---:|---:|",
    ]
    for summary in summaries:
        lines.append(_row(summary["seed"], "SFT", summary["sft"]["eval"], "", ""))
        for entry in summary["rounds"]:
            auc, multiplier = f"{entry['cost_model']['auc']:.3f}", f"{entry['ppo']['lambda'][-1]:.2f}"
            lines.append(_row(summary["seed"], f"round {entry['round']}", entry["eval"], auc, multiplier))
    return "\n".join(lines)


def _row(seed: int, policy: str, evaluation: dict[str, Any], auc: str, multiplier: str) -> str:
    def rate(name: str) -> str:
        low, high = evaluation[f"{name}_ci"]
        return f"{evaluation[name]:.1%} ({low:.1%} to {high:.1%})"

    win_rate = rate("win_rate") if policy != "SFT" else "(baseline)"
    refusal = f"{evaluation['over_refusal_rate']:.1%}"
    return f"| {seed} | {policy} | {rate('unsafe_rate')} | {win_rate} | {refusal} | {auc} | {multiplier} |"


def section(summaries: list[dict[str, Any]]) -> str:
    """The table, with what the runs took and where they ran."""
    first = summaries[0]["sft"]["eval"]
    minutes = ", ".join(f"{summary['wall_seconds'] / 60:.1f}" for summary in summaries)
    decisions = ", ".join(summary["promotion"]["decision"] for summary in summaries)
    overhead = ", ".join(f"{summary['overhead_seconds']:.0f}" for summary in summaries)
    memory = max(summary["peak_memory_bytes"] for summary in summaries) / 1e9
    return (
        f"{table(summaries)}\n\n"
        f"{first['n_red_team']} red-team and {first['n_benign']} benign held-out prompts; the gate's decisions: "
        f"{decisions}. Wall time {minutes} minutes, of which start-up of steps and servers {overhead} s; "
        f"peak memory of all processes together {memory:.1f} GB; on "
        f"{os.cpu_count()} cores ({platform.machine()}, no GPU).\n"
    )


def main(folders: list[str]) -> None:
    summaries = [json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(f"{head}{BEGIN}\n{section(summaries)}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
