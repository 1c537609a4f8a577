"""The paper's comparison on a problem whose optimum is known: fixed weights of the cost against the multiplier.

Trains the bandit of `bandit.py` once for every fixed weight nu and once with the multiplier, prints a table, and draws
mean reward over mean cost: `make bench-bandit`, or

python -m tests.benchmarks.fixed_nu -o FILE.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.report.svg import number
from tests.benchmarks.bandit import COST, PAPER_NU, REWARD, THRESHOLD, bandit, shaped_policy, train
from tests.benchmarks.pictures import Axis, Dot, tradeoff

_NAME = "Mean reward over mean cost: fixed weights nu against the multiplier"
SCORE_CLIP = 1000.0  # nu 100 takes scores past the default of 50, where all costs below 0 would look alike


@dataclass(frozen=True)
class Point:
    """Mean reward and cost of a trained policy; `nu` is None for the multiplier's."""

    nu: float | None
    reward: float
    cost: float

    @property
    def label(self) -> str:
        return "multiplier" if self.nu is None else f"nu {self.nu:g}"


def compare() -> list[Point]:
    """Train with every fixed weight, then with the multiplier."""

    def point(nu: float | None) -> Point:
        policy = train(bandit(reward_shaping=nu, score_clip=SCORE_CLIP)).policy
        return Point(nu, float(policy @ REWARD), float(policy @ COST))

    return [point(nu) for nu in (*PAPER_NU, None)]


def table(points: Sequence[Point]) -> str:
    """Markdown: one row a policy."""
    rows = ["| policy | mean cost | mean reward | limit |", "|---|---:|---:|---|"]
    for point in points:
        kept = "kept" if point.cost <= THRESHOLD + 0.02 else "broken"
        rows.append(f"| {point.label} | {number(point.cost, 2)} | {number(point.reward, 2)} | {kept} |")
    return "\n".join(rows)


def picture(points: Sequence[Point]) -> str:
    """An SVG file; the dotted line shows the analytic optima of all weights between the first and the last."""
    dots = [Dot(point.label, point.cost, point.reward, point.nu is None) for point in points]
    policies = [shaped_policy(float(nu)) for nu in np.geomspace(PAPER_NU[0], PAPER_NU[-1], 120)]
    curve = [(float(p @ COST), float(p @ REWARD)) for p in policies]
    return tradeoff(_NAME, dots, Axis("mean cost", (-2.2, 3.2)), Axis("mean reward", (-0.1, 2.0)), THRESHOLD, curve)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fixed weights of the cost against the multiplier, on a bandit.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="SVG file to write")
    points = compare()
    output: Path = parser.parse_args().output
    output.write_text(picture(points), encoding="utf-8")
    print(table(points))


if __name__ == "__main__":
    main()
