"""What every chart is drawn from: elements, scales, ticks.

Coordinates are units of a 440 wide drawing. The page scales it, and sets text at 12 units on wide pages and 14 on
narrow ones; room is made for the larger. Colours are classes, so the page's style sheet decides them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 440.0
FONT_SIZE = 14.0
_FURTHEST, _NARROWEST = 1e12, 1e-12
"""Ends of an axis, and its least length."""

_CHARACTER_WIDTH = 0.56 * FONT_SIZE


@dataclass(frozen=True)
class Scale:
    """Linear map of values from `low` to `high` onto coordinates from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Box:
    """The rectangle of a plot within a drawing."""

    left: float
    right: float
    top: float
    bottom: float


def element(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element; text among its children and in its attributes is escaped. `text_anchor` becomes text-anchor."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value)) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))


def drawing(name: str, height: float, parts: Iterable[Markup]) -> Markup:
    """A whole chart; `name` is its title and what a screen reader says."""
    return element(
        "svg",
        element("title", name),
        *parts,
        class_="chart",
        role="img",
        aria_label=name,
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
    )


def nothing_to_show(name: str) -> Markup:
    """A chart without data."""
    return drawing(name, 60.0, [text("no data", WIDTH / 2, 36.0, anchor="middle")])


def text(content: str, x: float, y: float, *, anchor: str = "start", css: str = "tick") -> Markup:
    """`x`, `y` is the baseline's start, middle or end."""
    return element("text", content, x=x, y=y, text_anchor=anchor, class_=css)


def text_width(content: str) -> float:
    """A generous guess: the reader's font is not known."""
    return len(content) * _CHARACTER_WIDTH


def shortened(content: str, longest: int) -> str:
    """At most so many characters."""
    return content if len(content) <= longest else content[: longest - 1].rstrip() + "…"


def tidy_ticks(low: float, high: float, intervals: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose the range, about so many intervals of them.

    A range beyond what a chart can show is cut, and one that is too narrow is widened.
    """
    low, high = (min(max(end, -_FURTHEST), _FURTHEST) for end in (low, high))
    if high - low < max(_NARROWEST, abs(high) * 1e-9):
        room = max(0.5, abs(high) * 1e-6)
        low, high = low - room, high + room
    least = (high - low) / intervals
    magnitude = 10.0 ** math.floor(math.log10(least))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= least * (1 - 1e-9))
    first, last = math.floor(round(low / step, 6)), math.ceil(round(high / step, 6))
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """All with the decimals that their distance needs, and a real minus sign."""
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [f"{abs(tick):.{decimals}f}" if tick == 0 else number(tick, decimals) for tick in ticks]


def share_labels(ticks: Sequence[float]) -> list[str]:
    """The same for shares, in percent."""
    return [f"{label}%" for label in tick_labels([100 * tick for tick in ticks])]


def number(value: float, decimals: int) -> str:
    """A number as it is printed, with a real minus sign and none on zero."""
    written = f"{value:.{decimals}f}"
    return written.removeprefix("-") if float(written) == 0 else written.replace("-", "−")


def percent(value: float) -> str:
    """0.064 -> 6.4%."""
    return f"{value:.1%}"


def horizontal_grid(box: Box, scale: Scale, ticks: Sequence[float], labels: Sequence[str]) -> list[Markup]:
    """Grid lines across the plot with the labels of a vertical axis."""
    parts = []
    for tick, label in zip(ticks, labels, strict=True):
        y = scale(tick)
        css = "zero" if tick == 0 else "grid"
        parts.append(element("line", x1=box.left, x2=box.right, y1=y, y2=y, class_=css))
        parts.append(text(label, box.left - 8, y + 4.5, anchor="end"))
    return parts


def vertical_grid(box: Box, scale: Scale, ticks: Sequence[float], labels: Sequence[str]) -> list[Markup]:
    """Grid lines up the plot with the labels of a horizontal axis."""
    parts = []
    for tick, label in zip(ticks, labels, strict=True):
        x = scale(tick)
        parts.append(element("line", x1=x, x2=x, y1=box.top, y2=box.bottom, class_="grid"))
        parts.append(text(label, x, box.bottom + 18, anchor="middle"))
    return parts


def every(labels: Sequence[str], room: float) -> int:
    """Show each n-th label so that none touches the next; `room` is the distance of neighbours."""
    widest = max(text_width(label) for label in labels) + 8
    return max(1, math.ceil(widest / room))


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{round(float(value), 2):g}"
