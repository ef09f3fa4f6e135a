"""Plots as inline SVG: axes, lines, steps and labelled points. Colours are classes, which the page's style defines."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 440.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 14.0, 22.0, 46.0
"""Room around the plotted area for ticks and labels, in the units of the viewBox."""

LETTER = 7.5
"""Width of a letter, generously."""

Point = tuple[float, float]


class Axis(NamedTuple):
    """What is shown, with its unit, and from where to where."""

    label: str
    low: float
    high: float

    def ticks(self) -> list[float]:
        """Round values, about five."""
        rough = (self.high - self.low) / 5
        magnitude = 10 ** math.floor(math.log10(rough))
        step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= rough * (1 - 1e-9))
        return [step * n for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def spanning(label: str, values: Sequence[float], *, least: float, low: float | None = None) -> Axis:
    """An axis that shows these values with some room, at least `least` from end to end."""
    start = min(values) if low is None else low
    room = max(least - (max(values) - start), 0.15 * (max(values) - start)) / 2
    return Axis(label, start - room if low is None else low, max(values) + room * (1 if low is None else 2))


class Chart:
    """One plot. `series` names a colour: `one` or `two`. `description` says in words what the plot shows."""

    def __init__(self, title: str, description: str, x: Axis, y: Axis) -> None:
        self._title, self._description, self._x, self._y = title, description, x, y
        self._marks: list[str] = []
        self._taken: list[tuple[float, float, float, float]] = []

    def line(self, points: Sequence[Point], series: str) -> None:
        """A line through the points; one whose y is NaN ends it."""
        drawn = [(self._across(x), self._up(y)) for x, y in points if not math.isnan(y)]
        if drawn:
            self._marks.append(f'<path class="line {series}" d="{_path(drawn)}"/>')

    def steps(self, edges: Sequence[float], heights: Sequence[float], series: str) -> None:
        """A histogram's outline, filled: a height between every two edges."""
        outline = [(edges[0], 0.0)]
        for (start, end), height in zip(pairwise(edges), heights, strict=True):
            outline += [(start, height), (end, height)]
        path = _path([(self._across(x), self._up(y)) for x, y in [*outline, (edges[-1], 0.0)]])
        self._marks.append(f'<path class="fill {series}" d="{path}"/><path class="line {series}" d="{path}"/>')

    def points(self, points: Sequence[Point], labels: Sequence[str], series: str) -> None:
        """Dots, each with its label where there is room."""
        places = [(self._across(x), self._up(y)) for x, y in points]
        self._taken += [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
        for (x, y), label in zip(places, labels, strict=True):
            self._marks.append(f'<circle class="dot {series}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
            self._label(x, y, label)

    def rule(self, x: float, label: str) -> None:
        """A dashed vertical with a label at its top."""
        across = self._across(x)
        end = across > WIDTH / 2
        self._marks.append(
            f'<line class="rule" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="note" x="{across + (-5 if end else 5):.1f}" y="{TOP - 8}" '
            f'text-anchor="{"end" if end else "start"}">{escape(label)}</text>'
        )

    def svg(self) -> str:
        """The plot; its title and description are read out by screen readers."""
        return (
            f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" '
            f'aria-label="{escape(self._title)}. {escape(self._description)}">'
            + self._axes()
            + "".join(self._marks)
            + "</svg>"
        )

    def _axes(self) -> str:
        floor = HEIGHT - BOTTOM
        parts = []
        for value in self._x.ticks():
            at = self._across(value)
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{floor}"/>')
            parts.append(f'<text x="{at:.1f}" y="{floor + 17}" text-anchor="middle">{_number(value)}</text>')
        for value in self._y.ticks():
            at = self._up(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}"/>')
        middle, centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + floor) / 2
        parts.append(
            f'<text class="name" x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">{escape(self._x.label)}</text>'
        )
        parts.append(
            f'<text class="name" transform="translate(13 {centre}) rotate(-90)" text-anchor="middle">'
            f"{escape(self._y.label)}</text>"
        )
        return "".join(parts)

    def _label(self, x: float, y: float, label: str) -> None:
        wide = len(label) * LETTER
        for dx, dy, anchor in ((0, -9, "middle"), (0, 18, "middle"), (9, 4, "start"), (-9, 4, "end")):
            start = x + dx - {"middle": wide / 2, "start": 0, "end": wide}[anchor]
            box = (start, y + dy - 10, start + wide, y + dy + 2)
            inside = box[0] > LEFT and box[2] < WIDTH and box[1] > 0 and box[3] < HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in self._taken):
                self._taken.append(box)
                self._marks.append(
                    f'<text class="note" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
                )
                return

    def _across(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self._x.low) / (self._x.high - self._x.low)

    def _up(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self._y.low) / (self._y.high - self._y.low)


def span(low: float, value: float, high: float, ends: Point) -> str:
    """A value with its interval as a small bar on a scale between `ends`, with a tick at 0 where that lies inside."""

    def at(figure: float) -> float:
        return 4 + 312 * (min(max(figure, ends[0]), ends[1]) - ends[0]) / (ends[1] - ends[0])

    zero = f'<line class="rule" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="1" y2="17"/>' if ends[0] < 0 < ends[1] else ""
    return (
        '<svg class="span" viewBox="0 0 320 18" aria-hidden="true"><line class="grid" x1="4" x2="316" y1="9" y2="9"/>'
        f'{zero}<line class="reach" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="9" y2="9"/>'
        f'<circle class="dot one" cx="{at(value):.1f}" cy="9" r="4"/></svg>'
    )


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".").replace("-0", "-0" if value < -1e-9 else "0") or "0"


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
