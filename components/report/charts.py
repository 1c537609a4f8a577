"""The report's charts as inline SVG: pure functions from values to markup, no scripts.

Every mark has a <title>, so its exact value shows when the pointer rests on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from components.foundation.results import Estimate
from components.report.svg import (
    WIDTH,
    Box,
    Scale,
    drawing,
    element,
    every,
    horizontal_grid,
    nothing_to_show,
    number,
    percent,
    share_labels,
    shortened,
    text,
    text_width,
    tick_labels,
    tidy_ticks,
    vertical_grid,
)

_HEIGHT = 236.0
_SCATTER_HEIGHT = 300.0
_ROW_HEIGHT = 28.0
_MOST_DOTS = 240
_LONGEST_CATEGORY = 22


@dataclass(frozen=True)
class Line:
    """One measure over PPO steps: `rounds[k]` has a value for each step of round k + 1."""

    label: str
    css: str
    rounds: Sequence[Sequence[float]]
    dots: bool = True


@dataclass(frozen=True)
class Mark:
    """A value with its interval, in a column of its own."""

    label: str
    value: float
    low: float
    high: float
    css: str


@dataclass(frozen=True)
class Pair:
    """A category's rate before and after."""

    label: str
    before: Estimate
    after: Estimate


@dataclass(frozen=True)
class Cloud:
    """Answers as (reward, cost) points."""

    label: str
    css: str
    points: Sequence[tuple[float, float]]


def step_chart(name: str, lines: Sequence[Line], levels: Sequence[float] = ()) -> Markup:
    """Lines over the PPO steps of all rounds; a line breaks where a round ends, because the next one has new models.

    Args:
        levels: one dashed level for each round (the cost threshold), or none.
    """
    lengths = [len(values) for values in lines[0].rounds] if lines else []
    values = [value for line in lines for part in line.rounds for value in part]
    if not values:
        return nothing_to_show(name)
    ticks = tidy_ticks(min([*values, *levels]), max([*values, *levels]))
    labels = tick_labels(ticks)
    box = _box(_HEIGHT, labels)
    y = Scale(ticks[0], ticks[-1], box.bottom, box.top)
    x = Scale(0.5, sum(lengths) + 0.5, box.left, box.right)
    steps = [step for step in tidy_ticks(0, sum(lengths)) if step == int(step) and 1 <= step <= sum(lengths)] or [1.0]
    parts = horizontal_grid(box, y, ticks, labels)
    parts += [text(f"{step:.0f}", x(step), box.bottom + 18, anchor="middle") for step in steps]
    parts += _round_bands(box, x, lengths)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    for number_of_round, (level, start, length) in enumerate(zip(levels, starts, lengths, strict=False), start=1):
        title = element("title", f"round {number_of_round}: threshold {number(level, 3)}")
        ends = {"x1": x(start + 0.5), "x2": x(start + length + 0.5), "y1": y(level), "y2": y(level)}
        parts.append(element("line", title, class_="limit", **ends))
    for line in lines:
        for index, (series, start) in enumerate(zip(line.rounds, starts, strict=True)):
            points = [(x(start + step), y(value)) for step, value in enumerate(series, start=1)]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(element("polyline", points=path, class_=f"line {line.css}"))
            if len(series) == 1 or (line.dots and len(values) <= _MOST_DOTS):
                titles = (
                    f"round {index + 1}, step {step}: {line.label} {number(value, 3)}"
                    for step, value in enumerate(series, start=1)
                )
                parts += [_dot(a, b, 2.2, line.css, title) for (a, b), title in zip(points, titles, strict=True)]
    return drawing(name, _HEIGHT, parts)


def interval_chart(
    name: str,
    marks: Sequence[Mark],
    show: Callable[[float], str],
    *,
    level: float | None = None,
    share: bool = True,
    around: Sequence[float] = (),
) -> Markup:
    """Dots with whiskers, one column each, in the order given.

    Args:
        show: a value as text.
        level: a dashed line across all columns, or none.
        share: the values are shares, so the axis starts at 0 and counts in percent.
        around: further values that the axis must have room for.
    """
    if not marks:
        return nothing_to_show(name)
    shown = [*around, *(end for mark in marks for end in (mark.low, mark.high))]
    shown += [level] if level is not None else []
    ticks = tidy_ticks(0.0 if share else min(shown), max(shown))
    labels = share_labels(ticks) if share else tick_labels(ticks)
    box = _box(_HEIGHT, labels)
    y = Scale(ticks[0], ticks[-1], box.bottom, box.top)
    band = (box.right - box.left) / len(marks)
    parts = horizontal_grid(box, y, ticks, labels)
    if level is not None:
        ends = {"x1": box.left, "x2": box.right, "y1": y(level), "y2": y(level)}
        parts.append(element("line", element("title", show(level)), class_="limit", **ends))
    stride = every([mark.label for mark in marks], band)
    for column, mark in enumerate(marks):
        x = box.left + (column + 0.5) * band
        title = f"{mark.label}: {show(mark.value)}, interval {show(mark.low)} to {show(mark.high)}"
        parts.append(_whisker(x, x, y(mark.low), y(mark.high), mark.css))
        parts.append(_dot(x, y(mark.value), 5.0, mark.css, title))
        if text_width(show(mark.value)) < band:
            parts.append(text(show(mark.value), x, y(mark.high) - 6, anchor="middle", css="value"))
        if column % stride == 0:
            parts.append(text(mark.label, x, box.bottom + 18, anchor="middle"))
    return drawing(name, _HEIGHT, parts)


def dumbbell_chart(name: str, pairs: Sequence[Pair]) -> Markup:
    """Rates before and after, a row for each category; faint lines above and below the row are the intervals."""
    if not pairs:
        return nothing_to_show(name)
    labels = [shortened(pair.label, _LONGEST_CATEGORY) for pair in pairs]
    left = 20.0 + max(text_width(label) for label in labels)
    box = Box(left, WIDTH - 24.0, 8.0, 8.0 + _ROW_HEIGHT * len(pairs))
    ticks = tidy_ticks(0.0, max(max(pair.before.high, pair.after.high) for pair in pairs))
    x = Scale(ticks[0], ticks[-1], box.left, box.right)
    parts = vertical_grid(box, x, ticks, share_labels(ticks))
    for row, (pair, label) in enumerate(zip(pairs, labels, strict=True)):
        y = box.top + (row + 0.5) * _ROW_HEIGHT
        before, after = x(pair.before.value), x(pair.after.value)
        title = element("title", pair.label)
        parts.append(element("text", label, title, x=box.left - 14, y=y + 4.5, text_anchor="end", class_="tick"))
        for css, rate, lane in (("sft", pair.before, -6.0), ("policy", pair.after, 6.0)):
            parts.append(_whisker(x(rate.low), x(rate.high), y + lane, y + lane, f"{css} faint"))
        parts.append(element("line", x1=before, x2=after, y1=y, y2=y, class_="bar"))
        for css, rate, where in (("sft", pair.before, "SFT"), ("policy", pair.after, "last round")):
            interval = f"{percent(rate.value)} of {rate.n}, interval {percent(rate.low)} to {percent(rate.high)}"
            parts.append(_dot(x(rate.value), y, 5.0, css, f"{pair.label}, {where}: {interval}"))
    return drawing(name, box.bottom + 28.0, parts)


def scatter_chart(name: str, clouds: Sequence[Cloud], around: Sequence[tuple[float, float]] = ()) -> Markup:
    """Reward to the right, cost upwards; a large dot is a cloud's mean, and a line leads from one mean to the next.

    Args:
        around: further points that the axes must have room for, so that two charts can share them.
    """
    points = [point for cloud in clouds for point in cloud.points]
    if not points:
        return nothing_to_show(name)
    reach = [*points, *around]
    x_ticks = tidy_ticks(min(p[0] for p in reach), max(p[0] for p in reach))
    y_ticks = tidy_ticks(min(0.0, *(p[1] for p in reach)), max(0.0, *(p[1] for p in reach)))
    labels = tick_labels(y_ticks)
    margins = _box(_SCATTER_HEIGHT, labels)
    box = Box(margins.left, margins.right, margins.top, margins.bottom - 20)
    x = Scale(x_ticks[0], x_ticks[-1], box.left, box.right)
    y = Scale(y_ticks[0], y_ticks[-1], box.bottom, box.top)
    parts = horizontal_grid(box, y, y_ticks, labels) + vertical_grid(box, x, x_ticks, tick_labels(x_ticks))
    parts.append(text("cost ↑ (above 0: unsafe)", box.left, 16.0))
    parts.append(text("reward →", box.right, box.bottom + 38, anchor="end"))
    for cloud in clouds:
        for reward, cost in cloud.points:
            title = f"{cloud.label}: reward {number(reward, 2)}, cost {number(cost, 2)}"
            parts.append(_dot(x(reward), y(cost), 2.8, f"{cloud.css} point", title))
    means = [(cloud, *_mean(cloud.points)) for cloud in clouds if cloud.points]
    path = " ".join(f"{x(reward):.1f},{y(cost):.1f}" for _, reward, cost in means)
    parts.append(element("polyline", points=path, class_="shift"))
    for cloud, reward, cost in means:
        title = f"mean of {cloud.label}: reward {number(reward, 2)}, cost {number(cost, 2)}"
        parts.append(_dot(x(reward), y(cost), 7.0, f"{cloud.css} mean", title))
    return drawing(name, _SCATTER_HEIGHT, parts)


def _box(height: float, labels: Sequence[str]) -> Box:
    return Box(16.0 + max(text_width(label) for label in labels), WIDTH - 12.0, 26.0, height - 28.0)


def _round_bands(box: Box, x: Scale, lengths: Sequence[int]) -> list[Markup]:
    """A line between every two rounds, and a name above each round where there is room."""
    parts = []
    names = [f"round {index}" for index in range(1, len(lengths) + 1)]
    room = (box.right - box.left) / len(lengths)
    names = names if every(names, room) == 1 else [name.removeprefix("round ") for name in names]
    stride = every(names, room)
    for index, (name, length) in enumerate(zip(names, lengths, strict=True)):
        start = sum(lengths[:index])
        if index:
            edge = x(start + 0.5)
            parts.append(element("line", x1=edge, x2=edge, y1=box.top - 14, y2=box.bottom, class_="boundary"))
        if index % stride == 0:
            parts.append(text(name, x(start + 0.5 + length / 2), box.top - 10, anchor="middle"))
    return parts


def _whisker(x1: float, x2: float, y1: float, y2: float, css: str) -> Markup:
    return element("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=f"whisker {css}")


def _dot(x: float, y: float, radius: float, css: str, title: str) -> Markup:
    return element("circle", element("title", title), cx=x, cy=y, r=radius, class_=f"dot {css}")


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)
