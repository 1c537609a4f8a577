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
from markupsafe import Markup

from components.report.svg import (
    WIDTH,
    Box,
    Scale,
    drawing,
    element,
    horizontal_grid,
    number,
    text,
    tick_labels,
    tidy_ticks,
    vertical_grid,
)
from tests.benchmarks.bandit import COST, PAPER_NU, REWARD, THRESHOLD, bandit, shaped_policy, train

_HEIGHT = 320.0
_BOX = Box(left=48.0, right=WIDTH - 18, top=34.0, bottom=_HEIGHT - 52)
_NAME = "Mean reward over mean cost: fixed weights nu against the multiplier"
_SCORE_CLIP = 1000.0  # nu 100 takes scores past the default of 50, where all costs below 0 would look alike
_STYLE = """
  svg { --card: #ffffff; --ink: #1f2429; --soft: #5c646d; --grid: #ebe8e2; --fixed: #868c95; --policy: #0b7a70;
        --limit: #b45f06; font-family: system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --card: #1a1e22; --ink: #e5e8ea; --soft: #9ba5ae; --grid: #272d32; --fixed: #98a1ab; --policy: #45c9b8;
          --limit: #f2a94e; }
  }
  .card { fill: var(--card); }
  text { font-size: 12px; fill: var(--soft); }
  text.value { fill: var(--ink); font-weight: 600; }
  text.limit { fill: var(--limit); }
  .grid, .zero { stroke: var(--grid); }
  .line { fill: none; stroke: var(--fixed); stroke-dasharray: 2 4; }
  line.limit { stroke: var(--limit); stroke-width: 1.8; stroke-dasharray: 5 4; }
  .fixed { fill: var(--fixed); }
  .policy { fill: var(--policy); }
"""


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
        policy = train(bandit(reward_shaping=nu, score_clip=_SCORE_CLIP)).policy
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
    """A standalone SVG, light or dark as its reader's screen is."""
    across_ticks, up_ticks = tidy_ticks(-2.2, 3.2, intervals=7), tidy_ticks(-0.1, 2.0)
    across = Scale(across_ticks[0], across_ticks[-1], _BOX.left, _BOX.right)
    up = Scale(up_ticks[0], up_ticks[-1], _BOX.bottom, _BOX.top)
    limit = across(THRESHOLD)
    parts = [
        element("style", Markup(_STYLE)),
        element("rect", width=WIDTH, height=_HEIGHT, rx=10.0, class_="card"),
        *horizontal_grid(_BOX, up, up_ticks, tick_labels(up_ticks)),
        *vertical_grid(_BOX, across, across_ticks, tick_labels(across_ticks)),
        text("mean reward", _BOX.left - 36, _BOX.top - 16),
        text("mean cost", (_BOX.left + _BOX.right) / 2, _BOX.bottom + 40, anchor="middle"),
        element("line", x1=limit, x2=limit, y1=_BOX.top, y2=_BOX.bottom, class_="limit"),
        text("limit d", limit + 6, _BOX.top + 10, css="limit"),
        element("path", d=_curve(across, up), class_="line"),
    ]
    return str(drawing(_NAME, _HEIGHT, [*parts, *_dots(points, across, up)])).replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )


def _curve(across: Scale, up: Scale) -> str:
    """The analytic optima of all weights between the first and the last."""
    policies = [shaped_policy(float(nu)) for nu in np.geomspace(PAPER_NU[0], PAPER_NU[-1], 120)]
    return "M" + " L".join(f"{across(float(p @ COST)):.1f} {up(float(p @ REWARD)):.1f}" for p in policies)


def _dots(points: Sequence[Point], across: Scale, up: Scale) -> list[Markup]:
    """Labels stand below the curve; points that lie close to one another share one."""
    parts, shown = [], list[tuple[float, float, list[str]]]()
    for point in points:
        x, y = across(point.cost), up(point.reward)
        css, radius = ("policy", 6.0) if point.nu is None else ("fixed", 4.5)
        title = element("title", f"{point.label}: cost {number(point.cost, 2)}, reward {number(point.reward, 2)}")
        parts.append(element("circle", title, cx=x, cy=y, r=radius, class_=css))
        near = next((labels for other_x, other_y, labels in shown if abs(x - other_x) + abs(y - other_y) < 20), None)
        if near is None:
            shown.append((x, y, [point.label]))
        else:
            near.append(point.label.removeprefix("nu "))
    for x, y, labels in shown:
        css = "value" if labels == ["multiplier"] else "tick"
        alone = len(labels) == 1
        place = {"x": x + 10, "y": y + 14} if alone else {"x": x, "y": y + 22}
        parts.append(text(", ".join(labels), **place, anchor="start" if alone else "middle", css=css))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description="Fixed weights of the cost against the multiplier, on a bandit.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="SVG file to write")
    points = compare()
    output: Path = parser.parse_args().output
    output.write_text(picture(points) + "\n", encoding="utf-8")
    print(table(points))


if __name__ == "__main__":
    main()
