"""Curves over the tokens kept, and measured speed-up against what the counted operations allow."""

from __future__ import annotations

from collections.abc import Sequence

from engines.webpage import axes
from engines.webpage.axes import BOTTOM, LEFT, RIGHT, TOP, Chart, Line, Mark, Scale, Tick
from engines.webpage.groups import Point, Series
from engines.webpage.quality import quality
from engines.webpage.schema import RATED, Ratio, Summary
from engines.webpage.words import STAGES, milliseconds, percent, times

DRAWN = ("total", "prefill", "vision")
"""Stages with a line."""
GOAL = 0.9
"""Share of the FLOP limit that a line is drawn at."""
NOTE = 84
"""Width of a label that says what a budget costs."""
TOKENS = "visual tokens kept of a picture"


def ratios(point: Point, against: str = "baseline") -> dict[str, Ratio]:
    """Speed-ups of the pruned engine at a point, by stage; empty where there is nothing to hold it against."""
    bench, batch = point.run.bench, point.batch.batch
    for one in bench.comparisons:
        if (one.subject, one.against, one.batch) == (bench.pruned.name, against, batch):
            return {stage: found for stage in RATED if (found := one.ratios.get(stage)) is not None}
    return {}


def latency_curve(series: Series, identity: str) -> Chart:
    """Median times of the stages against tokens kept, with the unpruned baseline of each run."""
    points = series.points
    pairs = [(p.baseline_tokens, p.baseline) for p in points]
    unpruned = [(tokens, batch) for tokens, batch in pairs if tokens is not None and batch is not None]
    x, _ = axes.from_zero([p.tokens for p in points] + [tokens for tokens, _ in unpruned], LEFT, RIGHT - 14)
    measured = [p.batch for p in points] + [batch for _, batch in unpruned]
    summaries = [found for batch in measured for stage in DRAWN if (found := batch.stages.get(stage))]
    y, y_ticks = axes.from_zero([found.p90 for found in summaries], BOTTOM, TOP)
    lines, marks = [], []
    for stage in DRAWN:
        own = [(p, found) for p in points if (found := p.batch.stages.get(stage))]
        marks += [_time(stage, x.at(p.tokens), y, found, f"{p.budget} tokens") for p, found in own]
        theirs = [(tokens, found) for tokens, batch in unpruned if (found := batch.stages.get(stage))]
        marks += [_time(stage, x.at(tokens), y, found, f"baseline, {tokens} tokens", True) for tokens, found in theirs]
        line = [(x.at(p.tokens), y.at(s.median)) for p in series.line if (s := p.batch.stages.get(stage))]
        lines.append(Line(stage, axes.through(line)))
        if line and theirs:
            lines.append(
                Line(stage, axes.through([line[-1], (x.at(theirs[-1][0]), y.at(theirs[-1][1].median))]), "guide")
            )
    ticks = {x.at(p.tokens): Tick(x.at(p.tokens), p.budget) for p in points}
    ticks |= {x.at(tokens): Tick(x.at(tokens), str(tokens)) for tokens, _ in unpruned}
    return Chart(
        identity,
        "Latency against tokens kept",
        f"Median milliseconds of first token, prefill and vision at {_budgets(points)}. {series.title}. The table of "
        "measurements has every value.",
        TOKENS,
        "ms",
        axes.staggered(list(ticks.values()), 26),
        y_ticks,
        tuple(lines),
        tuple(marks),
    )


def speedup_curve(series: Series, identity: str) -> Chart | None:
    """Speed-ups over the baseline and their FLOP limits against tokens kept; None for fewer than two budgets."""
    points = [point for point in series.points if ratios(point)]
    if len({point.tokens for point in points}) < 2:
        return None
    x, _ = axes.from_zero([point.tokens for point in points], LEFT, RIGHT - NOTE / 2)
    found = [ratio for point in points for stage, ratio in ratios(point).items() if stage in DRAWN]
    y, y_ticks = axes.from_zero([max(r.ratio, r.high, r.flop_ratio or 0) for r in found], BOTTOM, TOP)
    lines, marks = [], []
    for stage in DRAWN:
        latest = [(p, r) for p in series.line if (r := ratios(p).get(stage))]
        lines.append(Line(stage, axes.through((x.at(p.tokens), y.at(r.ratio)) for p, r in latest)))
        limits = [(x.at(p.tokens), y.at(r.flop_ratio)) for p, r in latest if r.flop_ratio]
        lines.append(Line(stage, axes.through(limits), "limit"))
        marks += [_ratio(stage, x.at(p.tokens), y, r, p) for p in points if (r := ratios(p).get(stage))]
    notes = {p.tokens: Tick(x.at(p.tokens), p.budget, quality(p.run.bench).short) for p in points}
    return Chart(
        identity,
        "Speed-up against tokens kept",
        f"Speed-up over the baseline of first token, prefill and vision at {_budgets(points)}, and what their counted "
        f"operations allow. {series.title}. The table of comparisons has every value.",
        "visual tokens kept, and what that costs",
        "times faster",
        axes.staggered(list(notes.values()), NOTE),
        y_ticks,
        tuple(lines),
        tuple(marks),
        (Line("one", axes.through([(LEFT, y.at(1)), (RIGHT, y.at(1))])),),
    )


def limit_chart(points: Sequence[Point], identity: str) -> Chart | None:
    """Measured speed-ups against FLOP ratios; None where no operations were counted."""
    found = [
        (point, stage, ratio)
        for point in points
        for stage, ratio in ratios(point).items()
        if stage in DRAWN and ratio.flop_ratio is not None
    ]
    if not found:
        return None
    values = [v for _, _, r in found for v in (r.ratio, r.high, r.flop_ratio or 0, 1.0)]
    x, x_ticks = axes.from_zero(values, LEFT, RIGHT - 14)
    y, y_ticks = axes.from_zero(values, BOTTOM, TOP)
    marks = tuple(_ratio(stage, x.at(r.flop_ratio or 0), y, r, p) for p, stage, r in found)
    top = x.high
    return Chart(
        identity,
        "Measured speed-up against the FLOP limit",
        "Each point is one stage of one run: right by how many times fewer operations it has, up by how many times "
        f"faster it is. On the line both are equal; the dashed line is at {GOAL}. The table of comparisons has every "
        "value, with its accuracy or agreement.",
        "FLOP limit: times fewer operations, as counted",
        "times faster, measured",
        x_ticks,
        y_ticks,
        (),
        marks,
        (
            Line("equal", axes.through([(x.at(0), y.at(0)), (x.at(top), y.at(top))])),
            Line("goal", axes.through([(x.at(0), y.at(0)), (x.at(top), y.at(GOAL * top))])),
        ),
    )


def _time(stage: str, x: float, y: Scale, found: Summary, what: str, hollow: bool = False) -> Mark:
    title = (
        f"{what}, {STAGES[stage]}: {milliseconds(found.median)} ms (median of {found.n}; "
        f"least {milliseconds(found.min)}, p90 {milliseconds(found.p90)})"
    )
    middle = y.at(found.median)
    return Mark(stage, axes.shape(stage, x, middle), x, y.at(found.min), y.at(found.p90), title, hollow)


def _ratio(stage: str, x: float, y: Scale, found: Ratio, point: Point) -> Mark:
    of_limit = ""
    if found.flop_ratio is not None:
        of_limit = f", {percent(found.share_of_flop_ratio)} of the FLOP limit {times(found.flop_ratio)}"
    title = (
        f"{point.budget} tokens, {STAGES[stage]}: {times(found.ratio)} (95% {times(found.low)} to {times(found.high)})"
        f"{of_limit}; {quality(point.run.bench).text}"
    )
    middle = y.at(found.ratio)
    return Mark(stage, axes.shape(stage, x, middle), x, y.at(found.low), y.at(found.high), title)


def _budgets(points: Sequence[Point]) -> str:
    return ", ".join(dict.fromkeys(point.budget for point in points)) + " tokens"
