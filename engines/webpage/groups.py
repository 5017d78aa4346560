"""Which runs may stand on one axis, and which on one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engines.webpage.results import Run
from engines.webpage.schema import Batch
from engines.webpage.words import count, library, setting


@dataclass(frozen=True)
class Point:
    """One run at one batch size: what a point of a curve stands for."""

    run: Run
    batch: Batch

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture that are left in the end."""
        return self.run.bench.pruned.llm_tokens or self.batch.visual_tokens

    @property
    def budget(self) -> str:
        """In the words of a label: 64, or 192→64 where the decoder drops some."""
        inside = self.run.bench.pruned.llm_tokens
        return (
            str(self.tokens) if inside in (None, self.batch.visual_tokens) else f"{self.batch.visual_tokens}→{inside}"
        )

    @property
    def baseline(self) -> Batch | None:
        """The baseline at this batch size."""
        found = self.run.bench.baseline
        return None if found is None else found.at(self.batch.batch)

    @property
    def baseline_tokens(self) -> int | None:
        """As `tokens`, of the baseline."""
        subject, batch = self.run.bench.baseline, self.baseline
        return None if subject is None or batch is None else subject.llm_tokens or batch.visual_tokens


@dataclass(frozen=True)
class Series:
    """Points that differ in their budget alone, the fewest tokens first: one line of a chart."""

    title: str
    points: tuple[Point, ...]

    @property
    def line(self) -> tuple[Point, ...]:
        """One point per budget, the latest run's, as a line needs it."""
        latest = {point.tokens: point for point in sorted(self.points, key=lambda p: p.run.bench.created)}
        return tuple(latest[tokens] for tokens in sorted(latest))


@dataclass(frozen=True)
class Group:
    """Runs of one model, machine, library and precision. facts: what they have in common, by name."""

    title: str
    facts: dict[str, str]
    runs: tuple[Run, ...]
    series: tuple[Series, ...]


def grouped(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Runs that can be compared, together, in the order that they were given in."""
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(_facts(run).items()), []).append(run)
    facts = [dict(key) for key in found]
    titles = _titles(facts)
    return tuple(
        Group(title, each, tuple(members), _series(members))
        for title, each, members in zip(titles, facts, found.values(), strict=True)
    )


def differing(groups: Sequence[Group]) -> list[str]:
    """Names of the facts that set groups apart."""
    names = list(dict.fromkeys(name for group in groups for name in group.facts))
    return [name for name in names if len({group.facts.get(name) for group in groups}) > 1]


def _facts(run: Run) -> dict[str, str]:
    """What has to be equal for times to be compared."""
    bench, machine, pruned = run.bench, run.bench.machine, run.bench.pruned
    facts: dict[str, Any] = {
        "model": bench.model,
        "weights": bench.note or bench.weights,
        "checkpoint": (pruned.source_sha256 or "not told")[:12],
        "decoder layers": pruned.decoder_layers or "not told",
        "library": library(bench.backend),
        "precision": pruned.precision,
        "vision precision": pruned.vision_precision or pruned.precision,
        "CUDA graphs": {True: "yes", False: "no", None: "none"}[pruned.cuda_graphs],
        "device": machine.device,
        "cores": machine.cores or "not told",
        "threads": machine.threads or "not told",
    }
    facts |= {f"version of {name}": value for name, value in sorted(machine.versions.items())}
    return {name: setting(value) for name, value in facts.items()}


def _titles(facts: Sequence[dict[str, str]]) -> list[str]:
    """Short, and longer where two groups would have the same."""
    short = [f"{each['model']}, {each['library']} {each['precision']}, {each['device']}" for each in facts]
    same = {title for title in short if short.count(title) > 1}
    numbers = [short[: i + 1].count(title) for i, title in enumerate(short)]
    return [f"{t} ({n})" if t in same else t for t, n in zip(short, numbers, strict=True)]


def _series(runs: Sequence[Run]) -> tuple[Series, ...]:
    points = [Point(run, batch) for run in runs for batch in run.bench.pruned.batches]
    found: dict[tuple[Any, ...], list[Point]] = {}
    for point in sorted(points, key=lambda p: (p.batch.batch, p.tokens)):
        found.setdefault(_line_key(point), []).append(point)
    return tuple(Series(_line_title(key), tuple(members)) for key, members in found.items())


def _line_key(point: Point) -> tuple[Any, ...]:
    pruned = point.run.bench.pruned
    inside = pruned.llm_tokens is not None
    return (point.batch.batch, point.batch.text_tokens, schedule(pruned.schedule), pruned.selector or "flowcut", inside)


def _line_title(key: tuple[Any, ...]) -> str:
    batch, text, how, selector, inside = key
    parts = [f"batch {batch}", count(text, "text token"), *([how] if how else [])]
    return ", ".join(parts + [selector] * (selector != "flowcut") + ["pruned again in the decoder"] * inside)


def schedule(value: Any) -> str:
    """A schedule's kind, however bench.json tells it."""
    found = value.get("kind", "") if isinstance(value, dict) else value
    return "" if found is None else str(found)
