"""Bars: speed-ups beside their limits, and where the time of a subject goes. Places are percent of the width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engines.webpage.curves import ratios
from engines.webpage.groups import Point
from engines.webpage.results import Run
from engines.webpage.schema import STAGES, Batch, Ratio, Stages, Subject
from engines.webpage.words import STAGES as TITLES
from engines.webpage.words import milliseconds, percent, times


@dataclass(frozen=True)
class Bullet:
    """One speed-up: a bar, its interval, a stroke at its limit and one at 1."""

    stage: str
    ratio: Ratio
    value: float
    low: float
    high: float
    one: float
    limit: float | None
    title: str


@dataclass(frozen=True)
class Segment:
    """A stage's part of a bar."""

    stage: str
    start: float
    width: float
    title: str


@dataclass(frozen=True)
class Bar:
    """A subject at one batch size: the stages up to the first token, one behind the other."""

    run: Run
    subject: Subject
    batch: Batch
    segments: tuple[Segment, ...]
    decode: Segment | None
    total: float


def bullets(point: Point, longest: float) -> tuple[Bullet, ...]:
    """Of every stage that has a speed-up; `longest` is the value at the end of the bar."""
    return tuple(_bullet(stage, ratio, longest) for stage, ratio in ratios(point).items())


def longest_ratio(points: Iterable[Point]) -> float:
    """The largest value in the bars of all these points, so that they have one scale."""
    found = [ratio for point in points for ratio in ratios(point).values()]
    return max([1.0, *(v for r in found for v in (r.ratio, r.high, r.flop_ratio or 0.0))]) * 1.02


def stage_bars(runs: Sequence[Run], batch: int) -> tuple[Bar, ...]:
    """A bar for everything that was measured at that batch size, on one scale."""
    found = [(run, subject, at) for run in runs for subject in run.bench.subjects if (at := subject.at(batch))]
    longest = max((max(at.stages.total.median, _sum(at.stages)) for _, _, at in found), default=0.0) or 1.0
    steps = [at.stages.decode_per_token for _, _, at in found]
    slowest = max((step.median for step in steps if step), default=0.0) or 1.0
    return tuple(_bar(run, subject, at, longest, slowest) for run, subject, at in found)


def _bar(run: Run, subject: Subject, batch: Batch, longest: float, slowest: float) -> Bar:
    stages, segments, at = batch.stages, [], 0.0
    parts = [(name, found.median) for name in STAGES if (found := stages.get(name))]
    parts.append(("rest", max(0.0, stages.total.median - _sum(stages))))
    for name, value in parts:
        width = 100 * value / longest
        segments.append(Segment(name, round(at, 2), round(width, 2), f"{TITLES[name]}: {milliseconds(value)} ms"))
        at += width
    step = stages.decode_per_token
    title = "" if step is None else f"{TITLES['decode_per_token']}: {milliseconds(step.median)} ms"
    decode = None if step is None else Segment("decode", 0.0, round(100 * step.median / slowest, 2), title)
    return Bar(run, subject, batch, tuple(segments), decode, round(100 * stages.total.median / longest, 2))


def _sum(stages: Stages) -> float:
    """Of the medians, which need not be the median of the sum."""
    return sum(found.median for name in STAGES if (found := stages.get(name)))


def _bullet(stage: str, ratio: Ratio, longest: float) -> Bullet:
    low, high, one, value = (round(100 * v / longest, 2) for v in (ratio.low, ratio.high, 1.0, ratio.ratio))
    limit = None if ratio.flop_ratio is None else round(100 * ratio.flop_ratio / longest, 2)
    title = f"{TITLES[stage]}: {times(ratio.ratio)}, 95% {times(ratio.low)} to {times(ratio.high)}"
    if ratio.flop_ratio is not None:
        title += f"; limit {times(ratio.flop_ratio)}, {percent(ratio.share_of_flop_ratio)} of it reached"
    return Bullet(stage, ratio, value, low, high, one, limit, title)
