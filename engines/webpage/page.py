"""The page: what is on it, in which order, and the template that says it in HTML."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bench.timing import WIDEST
from engines.webpage import words
from engines.webpage.axes import Chart
from engines.webpage.bars import Bar, Bullet, bullets, longest_ratio, stage_bars
from engines.webpage.curves import GOAL, latency_curve, limit_chart, speedup_curve
from engines.webpage.groups import Group, Point, Series, differing, schedule
from engines.webpage.quality import Quality, quality
from engines.webpage.results import Picture, Run
from engines.webpage.schema import ALL, GRAPHS, RATED, STAGES

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Card:
    """One budget at a glance."""

    point: Point
    title: str
    subtitle: str
    bullets: tuple[Bullet, ...]
    quality: Quality


@dataclass(frozen=True)
class Curves:
    """Charts of one line. speedup: None for a single budget."""

    series: Series
    latency: Chart
    speedup: Chart | None


@dataclass(frozen=True)
class Shown:
    """A picture, and the runs that it is of."""

    run: Run
    picture: Picture
    where: str


@dataclass(frozen=True)
class Section:
    """A group's part of the page. settings: name to value, or to one value for each run where they differ."""

    identity: str
    group: Group
    cards: tuple[Card, ...]
    curves: tuple[Curves, ...]
    limits: Chart | None
    bars: dict[int, tuple[Bar, ...]]
    pictures: tuple[Shown, ...]
    settings: dict[str, list[str]]

    @property
    def apart(self) -> bool:
        """Whether any setting differs between runs."""
        return any(len(values) > 1 for values in self.settings.values())


def render(groups: Sequence[Group], version: str, created: str) -> str:
    """The HTML of all groups."""
    sections = [_section(group, f"group-{i}") for i, group in enumerate(groups, 1)]
    template = _environment().get_template("page.html.j2")
    return template.render(
        sections=sections,
        apart=differing(groups),
        version=version,
        created=created,
        runs=[run for group in groups for run in group.runs],
        names={"measured": ALL, "stages": STAGES, "rated": RATED, "graphs": GRAPHS, "titles": words.STAGES},
        goal=GOAL,
        wide=WIDEST,
    )


def _section(group: Group, identity: str) -> Section:
    points = [point for series in group.series for point in series.points]
    longest, several = longest_ratio(points), len(group.series) > 1
    curves = [
        Curves(
            series, latency_curve(series, f"{identity}-latency-{i}"), speedup_curve(series, f"{identity}-speedup-{i}")
        )
        for i, series in enumerate(group.series)
    ]
    return Section(
        identity,
        group,
        tuple(_card(point, series, longest, several) for series in group.series for point in series.points),
        tuple(curves),
        limit_chart(points, f"{identity}-limit"),
        {batch: stage_bars(group.runs, batch) for batch in sorted({point.batch.batch for point in points})},
        _pictures(group.runs),
        _settings(group.runs),
    )


def _card(point: Point, series: Series, longest: float, several: bool) -> Card:
    bench = point.run.bench
    title = f"{point.budget} of {bench.pruned.patches} tokens"
    return Card(point, title, series.title if several else "", bullets(point, longest), quality(bench))


def _pictures(runs: Sequence[Run]) -> tuple[Shown, ...]:
    """Each once: an unpruned baseline keeps the same in every run."""
    found: dict[object, list[tuple[Run, Picture]]] = {}
    for run in runs:
        for picture in run.pictures:
            same = picture.png if picture.subject == "baseline" and picture.png else run.directory
            found.setdefault((picture.subject, same), []).append((run, picture))
    return tuple(
        Shown(*alike[0], ", ".join(run.directory.name or str(run.directory) for run, _ in alike))
        for alike in found.values()
    )


def _settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Each setting once where all runs agree, else per run."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run.bench.settings):
        values = [words.setting(run.bench.settings.get(name)) for run in runs]
        found[name] = values[:1] if len(set(values)) == 1 else values
    return found


def _environment() -> jinja2.Environment:
    """What a file's name, a note or a title holds is text on the page, never HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "times": words.times,
        "ms": words.milliseconds,
        "percent": words.percent,
        "amount": words.amount,
        "bytes": partial(words.amount, unit="B", step=1024),
        "setting": words.setting,
        "library": words.library,
        "schedule": schedule,
        "data_uri": _data_uri,
    }
    environment.globals |= {"quality": quality, "count": words.count}
    return environment


def _data_uri(picture: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode('ascii')}"
