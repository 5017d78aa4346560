"""A benchmark for people: on a terminal, as a page of Markdown, and as a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.bench.records import RATIOS, TITLES, Benchmark
from engines.bench.tables import Grid, agreement_lines, alarms, grids
from flowcut.deps import require
from flowcut.printable import printable

STACKED = ("preprocess", "vision", "prefill")
COLOURS = {"preprocess": "#9aa5b1", "vision": "#3a7ca5", "prefill": "#e07a3f"}
LONGEST = 44
"""Letters of a subject's title in the picture."""


def measured(console: Console, found: Benchmark, written: Sequence[str]) -> None:
    """Tables, with what may not be missed before and behind them."""
    machine = found.machine
    where = f"{machine['device']}, {machine['threads']} threads" if machine["kind"] == "cpu" else machine["device"]
    _line(console, f"{found.head['model']} on {where}, load {machine['load_before']:.2f}", "bold")
    for line in alarms(found):
        _line(console, line, "bold red")
    for grid in grids(found, full=False):
        console.print()
        _line(console, grid.title, "bold")
        if grid.rows:
            console.print(_table(grid))
        for note in grid.notes:
            _line(console, note)
    console.print()
    for line in found.warnings:
        _line(console, f"warning: {line}", "yellow")
    for path in written:
        _line(console, f"wrote {path}")


def markdown(found: Benchmark) -> str:
    """The same as a page."""
    return "\n".join(_page(found)) + "\n"


def _page(found: Benchmark) -> Iterator[str]:
    machine, head = found.machine, found.head
    yield f"# {head['model']}: {found.pruned.title}"
    for line in alarms(found):
        yield from ("", f"**{_escaped(line)}**")
    yield from ("", f"Measured {head['created']} by", "", f"    {head['command']}", "")
    versions = machine["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    clocks = f", {machine['clocks_mhz']} MHz" if machine["clocks_mhz"] else ""
    yield (
        f"{machine['device']} ({machine['kind']}), {machine['threads']} threads of {machine['cores']} cores{clocks}; "
        f"load {machine['load_before']} before, {machine['load_after']} after; {named}."
    )
    if (roof := machine["roof"]) is not None:
        speeds = f"{roof['flops_per_s'] / 1e9:,.0f} GFLOP/s and {roof['bytes_per_s'] / 1e9:,.1f} GB/s"
        yield f"Roof: {speeds}, {roof['source']}."
    yield from ("", "![Stages and speed-up](bench.svg)")
    for grid in grids(found):
        yield from ("", f"## {_escaped(grid.title)}", "")
        if grid.rows:
            yield _row(grid.header)
            yield "|---|" + "---:|" * (len(grid.header) - 1)
            yield from map(_row, grid.rows)
        for note in grid.notes:
            yield from ("", _escaped(note))
    if found.warnings:
        yield from ("", "## Warnings", "")
        yield from (f"- {_escaped(line)}" for line in found.warnings)


def picture(found: Benchmark, kind: str) -> bytes:
    """Stages of every subject, stacked, and the speed-up against its FLOP limit, at the first batch size.

    kind: "svg" or "png".
    """
    require("matplotlib", extra="plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.0 + 0.55 * max(4, len(found.subjects))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _stages(left, found)
    _speedups(right, found)
    random = f" ({found.head['note']})" if found.head["note"] else ""
    mismatch = " - MISMATCHED BASELINE" if found.mismatch else ""
    batch = found.pruned.batches[0]
    figure.suptitle(f"{found.head['model']}{random}, batch {batch.batch}, {found.machine['device']}{mismatch}")
    figure.supxlabel("\n".join(agreement_lines(found)), fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _stages(axes: Any, found: Benchmark) -> None:
    for row, subject in enumerate(found.subjects):
        stages, start = subject.batches[0].stages, 0.0
        for stage in STACKED:
            ms = stages[stage].median
            axes.barh(row, ms, left=start, color=COLOURS[stage], label=TITLES[stage] if row == 0 else None)
            start += ms
        total = stages["total"]
        axes.plot([total.median, total.p90], [row, row], color="black", linewidth=1.2)
        axes.plot([total.median], [row], color="black", marker="|")
        _label(axes, f"{total.median:,.1f} ms", max(start, total.p90), row)
    names = [f"{subject.name}\n{subject.title[:LONGEST]}" for subject in found.subjects]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel("ms, medians of stages; line: from the median of the whole to its 90th percentile", fontsize=8)
    axes.legend(loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _speedups(axes: Any, found: Benchmark) -> None:
    ratios = next((each.ratios for each in found.comparisons if each.against == "baseline"), {})
    shown = [(stage, ratios[stage]) for stage in RATIOS if stage in ratios]
    if not shown:
        axes.text(0.5, 0.5, "no baseline", ha="center", va="center")
        axes.set_axis_off()
        return
    for row, (_, ratio) in enumerate(shown):
        error = [[max(0.0, ratio.ratio - ratio.low)], [max(0.0, ratio.high - ratio.ratio)]]
        axes.barh(row, ratio.ratio, xerr=error, color="#3a7ca5", ecolor="black")
        if ratio.flop_ratio is not None:
            label = "FLOP limit" if row == 0 else None
            axes.plot([ratio.flop_ratio] * 2, [row - 0.4, row + 0.4], color="#c0392b", linewidth=2, label=label)
        _label(axes, f"{ratio.ratio:.2f}", max(ratio.high, ratio.flop_ratio or 0.0), row)
    axes.axvline(1, color="#9aa5b1", linewidth=1, linestyle="--")
    axes.set_yticks(np.arange(len(shown)), [TITLES[stage] for stage, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("times faster than the baseline, with 95% intervals", fontsize=8)
    if any(ratio.flop_ratio is not None for _, ratio in shown):
        axes.legend(loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Any, text: str, x: float, y: float, **how: Any) -> None:
    """Right of a point."""
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", **how)


def _table(grid: Grid) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for i, name in enumerate(grid.header):
        table.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    for row in grid.rows:
        table.add_row(*map(printable, row))
    return table


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(printable(text), style), soft_wrap=True)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Within Markdown, as it is."""
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
