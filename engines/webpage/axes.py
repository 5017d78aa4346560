"""Geometry of a chart: data to places on a drawing, in units of its viewBox, y downwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 408, 28, 232
LABEL = 40
"""Width that a label below the axis takes."""
ROW = 32
"""From one row of labels to the next."""
RADIUS = 4.5


@dataclass(frozen=True)
class Scale:
    """Values low..high to places start..end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """A tenth of a unit is finer than any screen."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True)
class Tick:
    """A label at a place of an axis. note: a second line below it. level: rows it is moved down to not touch others."""

    at: float
    text: str
    note: str = ""
    level: int = 0


@dataclass(frozen=True)
class Mark:
    """A measured point. low, high: ends of its interval; title: what it says when pointed at."""

    kind: str
    path: str
    x: float
    low: float
    high: float
    title: str
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """A line through points. style: "" solid, "limit" dashed, "guide" dotted."""

    kind: str
    points: str
    style: str = ""


@dataclass(frozen=True)
class Chart:
    """All that a template needs to draw one. kinds: stages in the key; guides: lines that no data made."""

    identity: str
    title: str
    description: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]
    guides: tuple[Line, ...] = ()

    @property
    def height(self) -> int:
        """Taller where labels below the axis have a note, or stand in several rows."""
        rows = max((tick.level for tick in self.x_ticks), default=0)
        return HEIGHT + ROW * rows + 14 * any(tick.note for tick in self.x_ticks)


def from_zero(values: Iterable[float], start: float, end: float) -> tuple[Scale, tuple[Tick, ...]]:
    """A scale from 0 to a round number at or above all values, with its ticks."""
    top = max([0.0, *values]) or 1.0
    step = _step(top / 5)
    steps = math.ceil(top / step - 1e-9)
    scale = Scale(0.0, steps * step, start, end)
    return scale, tuple(Tick(scale.at(i * step), f"{i * step:.10g}") for i in range(steps + 1))


def staggered(ticks: Sequence[Tick], width: float = LABEL) -> tuple[Tick, ...]:
    """Each in the highest row where it touches no other."""
    ends: list[float] = []
    found = []
    for tick in sorted(ticks, key=lambda each: each.at):
        level = next((i for i, end in enumerate(ends) if tick.at - width / 2 >= end), len(ends))
        ends[level : level + 1] = [tick.at + width / 2]
        found.append(Tick(tick.at, tick.text, tick.note, level))
    return tuple(found)


def through(points: Iterable[tuple[float, float]]) -> str:
    """The points of a polyline."""
    return " ".join(f"{x},{y}" for x, y in points)


def shape(kind: str, x: float, y: float) -> str:
    """The path of a stage's marker: another shape for each, so that none is told by its colour alone."""
    corners = {"vision": 4, "prefill": 3, "decode_per_token": 5}.get(kind)
    if corners is None:
        r = RADIUS
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    turn = -math.pi / 2 + (math.pi / 4 if corners == 4 else 0)
    around = [turn + 2 * math.pi * i / corners for i in range(corners)]
    radius = RADIUS * 1.25
    return "M" + "L".join(f"{x + radius * math.cos(a):.1f} {y + radius * math.sin(a):.1f}" for a in around) + "z"


def _step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
