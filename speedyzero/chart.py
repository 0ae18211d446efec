"""Line charts as inline SVG: small, sharp at any width, coloured by the page's CSS, so that they follow its light or dark theme.

The classes are `s0`, `s1`, ... for the colour of a series, with `faint` for one of several seeds. What a pointer shows is in `data-chart`,
read by the page's script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

MOST_POINTS = 240
"""Points of a line: as many as can be told apart; more are averaged in bins."""
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 48
"""Margins of the plot, in units of the SVG."""


@dataclass(frozen=True)
class Line:
    """A curve: x ascending and y, of one length. style: CSS classes. name: in the tooltip; none without one."""

    x: Sequence[float]
    y: Sequence[float]
    style: str
    name: str = ""


@dataclass(frozen=True)
class Area:
    """The place between two curves."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    style: str


@dataclass(frozen=True)
class Mark:
    """A point, with a text for whoever points at it."""

    x: float
    y: float
    style: str
    name: str


@dataclass(frozen=True)
class Level:
    """A horizontal line with a name, as for human play. It is drawn where the scale shows it, and only widens the scale if it is near."""

    y: float
    name: str


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) within low..high."""
    if not low < high:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most about `most` points of a curve: means over bins of the same number of points; the last point stays."""
    if len(x) <= most:
        return list(x), list(y)
    size = -(-len(x) // most)
    bins = range(0, len(x), size)
    xs, ys = ([sum(values[i : i + size]) / len(values[i : i + size]) for i in bins] for values in (x, y))
    return [*xs[:-1], x[-1]], ys


@dataclass(frozen=True)
class Scale:
    """From a number to a coordinate: low to `begin`, high to `end`; on a log scale low > 0."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(number, 1e-300)) if self.log else number for number in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return round(self.begin + share * (self.end - self.begin), 2)

    def ticks(self, count: int) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, count)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [factor * 10.0**power for power in powers for factor in factors if self.low <= factor * 10.0**power <= self.high]
            if len(found) >= 3:
                break
        return found


def _span(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The least and the greatest value with some room."""
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def chart(
    lines: Sequence[Line], *, label: str, x_name: str, x_format: Callable[[float], str], y_format: Callable[[float], str],
    areas: Sequence[Area] = (), marks: Sequence[Mark] = (), levels: Sequence[Level] = (), width: int = 360, height: int = 210,
    x_end: float | None = None, log: bool = False,
) -> str:
    """An SVG of curves over a common x that begins at 0 or below.

    label: for screen readers. x_end: where the axis ends at least. log: the y axis, if all of it is positive.
    """  # fmt: skip
    lines = [Line(*thinned(line.x, line.y), line.style, line.name) for line in lines if len(line.x)]
    if not lines and not marks:
        return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}: no data yet">' \
               f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">nothing yet</text></svg>'  # fmt: skip
    ys = [y for line in lines for y in line.y] + [mark.y for mark in marks] + [y for area in areas for y in (*area.low, *area.high)]
    xs = [x for line in lines for x in line.x] + [mark.x for mark in marks]
    log = log and min(ys) > 0
    low, high = _span(ys, log)
    near = 0.6 * (high - low)
    shown = [level for level in levels if low - near <= level.y <= high + near]
    if shown:
        low, high = _span([low, high, *(level.y for level in shown)], log)
    across = Scale(min(0.0, *xs), max(*xs, x_end or 0.0, 1e-9), LEFT, width - RIGHT)
    up = Scale(low, high, height - BOTTOM, TOP, log)
    parts = []
    for tick in up.ticks(4):
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick)}H{width - RIGHT}"/>'
                     f'<text class="y" x="{LEFT - 8}" y="{up(tick)}" dy=".33em">{escape(y_format(tick))}</text>')  # fmt: skip
    for tick in across.ticks(5 if width > 400 else 4):
        parts.append(f'<text class="x" x="{across(tick)}" y="{height - BOTTOM + 18}">{escape(x_format(tick))}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {height - BOTTOM}H{width - RIGHT}"/>')
    parts.append(f'<text class="name" x="{(LEFT + width - RIGHT) / 2}" y="{height - 4}">{escape(x_name)}</text>')
    for area in areas:
        there = [f"{across(x)} {up(y)}" for x, y in zip(area.x, area.high, strict=True)]
        back = [f"{across(x)} {up(y)}" for x, y in zip(reversed(area.x), reversed(area.low), strict=True)]
        parts.append(f'<path class="area {area.style}" d="M{"L".join(there + back)}Z"/>')
    for line in lines:
        path = "L".join(f"{across(x)} {up(y)}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(f'<path class="line {line.style}" d="M{path}{"h.01" if len(line.x) == 1 else ""}"/>')
    for mark in marks:
        corners = f"M{across(mark.x)} {up(mark.y) - 6}l6 6l-6 6l-6 -6Z"
        parts.append(f'<path class="mark {mark.style}" d="{corners}"><title>{escape(mark.name)}</title></path>')
    placed = [(across(x), up(y)) for line in lines for x, y in zip(line.x, line.y, strict=True)] + [(across(m.x), up(m.y)) for m in marks]
    for level in shown:
        x, y, side = _free_place(level.name, up(level.y), placed, width)
        parts.append(f'<path class="level" d="M{LEFT} {up(level.y)}H{width - RIGHT}"/>'
                     f'<text class="level {side}" x="{x}" y="{y}">{escape(level.name)}</text>')  # fmt: skip
    parts.append(f'<path class="cursor" d="M0 {TOP}V{height - BOTTOM}"/>')
    data = {
        "x": [across.low, across.high, across.begin, across.end],
        "series": [
            {"name": line.name, "style": line.style, "x": _short(line.x), "y": _short(line.y)} for line in lines if line.name
        ],
    }  # fmt: skip
    return (
        f'<svg class="chart{" wide" if width > 400 else ""}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f"data-chart='{escape(json.dumps(data, separators=(',', ':')))}'>{''.join(parts)}</svg>"
    )


def _free_place(name: str, y: float, placed: Sequence[tuple[float, float]], width: int) -> tuple[float, float, str]:
    """Where the name of a level goes: x, y of its baseline, and its class: at an end of its line where no point is, or most few."""
    reach = 12 * len(name)
    ends = ((width - RIGHT, width - RIGHT - reach, width - RIGHT, "end"), (LEFT + 4, LEFT, LEFT + reach, "start"))
    places = [(x, base, side, low, high, base - 16) for base in (y - 6, y + 16) for x, low, high, side in ends]
    crowd = [sum(low <= a <= high and top <= b <= base + 4 for a, b in placed) for _, base, _, low, high, top in places]
    return places[crowd.index(min(crowd))][:3]


def _short(values: Sequence[float]) -> list[float]:
    """With four digits, which is what a tooltip shows."""
    return [float(f"{value:.4g}") if abs(value) < 1e4 else round(value) for value in values]
