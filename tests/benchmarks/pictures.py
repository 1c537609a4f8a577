"""Standalone SVG files for READMEs: the report's elements and charts with a style of their own, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from components.report.svg import (
    WIDTH,
    Box,
    Scale,
    element,
    horizontal_grid,
    text,
    tick_labels,
    tidy_ticks,
    vertical_grid,
)

_STYLE = """
  svg { --card: #ffffff; --ink: #1f2429; --soft: #5c646d; --grid: #ebe8e2; --sft: #868c95; --policy: #0b7a70;
        --limit: #b45f06; font-family: system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --card: #1a1e22; --ink: #e5e8ea; --soft: #9ba5ae; --grid: #272d32; --sft: #98a1ab; --policy: #45c9b8;
          --limit: #f2a94e; }
  }
  .card { fill: var(--card); }
  text { font-size: 12px; fill: var(--soft); }
  text.value, text.name { fill: var(--ink); font-weight: 600; }
  text.limit { fill: var(--limit); }
  .grid, .zero, .boundary { stroke: var(--grid); }
  .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
  .line.strong { stroke-width: 2.6; }
  .line.curve { stroke: var(--sft); stroke-dasharray: 2 4; stroke-width: 1; }
  line.limit { stroke: var(--limit); stroke-width: 1.8; stroke-dasharray: 5 4; }
  .whisker { stroke-width: 2; stroke-linecap: round; }
  .line.sft, .whisker.sft { stroke: var(--sft); } .dot.sft { fill: var(--sft); }
  .line.policy, .whisker.policy { stroke: var(--policy); } .dot.policy { fill: var(--policy); }
  .line.limiting { stroke: var(--limit); } .dot.limiting { fill: var(--limit); }
"""
_TRADEOFF_HEIGHT = 320.0
_NEAR = 20.0
"""Dots that lie closer than this, in units of the drawing, share a label."""


@dataclass(frozen=True)
class Dot:
    """A policy in a plot of two of its measures; `is_ours` sets it off from those it is compared with."""

    label: str
    x: float
    y: float
    is_ours: bool


@dataclass(frozen=True)
class Axis:
    """Its name, and values that it must have room for besides the dots'."""

    name: str
    around: Sequence[float] = ()


def standalone(name: str, width: float, height: float, parts: Iterable[Markup]) -> str:
    """A whole SVG file; `name` is its title and what a screen reader says."""
    card = element("rect", width=width, height=height, rx=10.0, class_="card")
    content = [element("title", name), element("style", Markup(_STYLE)), card, *parts]
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria_label": name}
    return f"{element('svg', *content, **attributes, viewBox=f'0 0 {width:.0f} {height:.0f}')}\n"


def placed(chart: Markup, x: float, y: float, width: float, height: float) -> Markup:
    """A chart of the report inside a larger drawing."""
    corner = Markup('<svg x="{}" y="{}" width="{}" height="{}" ').format(*(f"{v:g}" for v in (x, y, width, height)))
    return Markup(str(chart).replace("<svg ", str(corner), 1))


def tradeoff(
    name: str,
    dots: Sequence[Dot],
    across: Axis,
    up: Axis,
    limit: float | None = None,
    curve: Sequence[tuple[float, float]] = (),
) -> str:
    """Policies as dots in a plane of two measures, as a file.

    Args:
        limit: on the horizontal axis, a dashed line.
        curve: points of a dotted line.
    """
    box = Box(left=56.0, right=WIDTH - 18, top=34.0, bottom=_TRADEOFF_HEIGHT - 52)
    x_ticks = _ticks([dot.x for dot in dots], across)
    y_ticks = _ticks([dot.y for dot in dots], up)
    x = Scale(x_ticks[0], x_ticks[-1], box.left, box.right)
    y = Scale(y_ticks[0], y_ticks[-1], box.bottom, box.top)
    parts = [
        *horizontal_grid(box, y, y_ticks, tick_labels(y_ticks)),
        *vertical_grid(box, x, x_ticks, tick_labels(x_ticks)),
        text(up.name, 12.0, box.top - 16),
        text(across.name, (box.left + box.right) / 2, box.bottom + 40, anchor="middle"),
    ]
    if limit is not None:
        parts.append(element("line", x1=x(limit), x2=x(limit), y1=box.top, y2=box.bottom, class_="limit"))
        parts.append(text("limit d", x(limit) + 6, box.top + 10, css="limit"))
    if curve:
        path = "M" + " L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in curve)
        parts.append(element("path", d=path, class_="line curve"))
    for dot in dots:
        css, radius = ("dot policy", 6.0) if dot.is_ours else ("dot sft", 4.5)
        title = element("title", f"{dot.label}: {across.name} {dot.x:.2f}, {up.name} {dot.y:.2f}")
        parts.append(element("circle", title, cx=x(dot.x), cy=y(dot.y), r=radius, class_=css))
    return standalone(name, WIDTH, _TRADEOFF_HEIGHT, [*parts, *_labels(dots, x, y, box.bottom)])


def _ticks(values: Sequence[float], axis: Axis) -> list[float]:
    reach = [*values, *axis.around]
    return tidy_ticks(min(reach), max(reach), intervals=6)


def _labels(dots: Sequence[Dot], x: Scale, y: Scale, bottom: float) -> list[Markup]:
    """Below the dots, to the right; dots that lie close to one another share one, in the middle.

    Above the dots where the axis' own labels are below them.
    """
    groups = list[list[Dot]]()
    for dot in dots:
        group = next((g for g in groups if abs(x(dot.x) - x(g[0].x)) + abs(y(dot.y) - y(g[0].y)) < _NEAR), None)
        if group is None:
            groups.append([dot])
        else:
            group.append(dot)
    parts = []
    for group in groups:
        first, label = group[0], _joined([dot.label for dot in group])
        css = "value" if any(dot.is_ours for dot in group) else "tick"
        right, left = x(first.x) + 10, x(first.x) - 10
        below, above = (22, -14) if len(group) > 1 else (14, -6)
        height = y(first.y) + (below if y(first.y) + below < bottom else above)
        if len(group) > 1 and right < WIDTH * 0.8:
            parts.append(text(label, x(first.x), height, anchor="middle", css=css))
        elif right < WIDTH * 0.8:
            parts.append(text(label, right, height, css=css))
        else:
            parts.append(text(label, left, height, anchor="end", css=css))
    return parts


def _joined(labels: Sequence[str]) -> str:
    """nu 2, nu 5 -> nu 2, 5"""
    words = [label.split(" ", 1) for label in labels]
    shared = {parts[0] for parts in words if len(parts) == 2}
    if len(shared) == 1 and all(len(parts) == 2 for parts in words):
        return f"{shared.pop()} {', '.join(parts[1] for parts in words)}"
    return ", ".join(labels)
