"""A report as a table for people. The line of JSON for programs is the command's."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.webpage.curves import ratios
from engines.webpage.groups import Group
from engines.webpage.quality import quality
from engines.webpage.report import Report
from engines.webpage.words import NONE
from flowcut.printable import printable

STAGES = {"vision": "vision", "prefill": "prefill", "total": "first token"}


def reported(console: Console, result: Report) -> None:
    """Per group the speed-ups on the page, each with its accuracy or agreement, and where the page is."""
    for group in result.groups:
        console.print(Text(printable(group.title), "bold"), soft_wrap=True)
        console.print(_speedups(group))
    if len(result.groups) > 1:
        console.print(f"{len(result.groups)} groups: their times cannot be compared, and no line joins them.")
    said = result.to_dict()
    for name, what in (("mismatch", "MISMATCH"), ("warnings", "warning"), ("missing", "no picture")):
        for line in said[name]:
            console.print(Text(f"{what}: {printable(line)}"), soft_wrap=True)
    console.print(Text(f"wrote {printable(str(result.path))} ({result.bytes / 1e6:.1f} MB): open it in a browser"))


def _speedups(group: Group) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in ("tokens", "batch", *STAGES.values()):
        table.add_column(name, justify="right")
    table.add_column("accuracy or agreement", overflow="fold")
    for series in group.series:
        for point in series.points:
            found = ratios(point)
            cells = [f"{found[stage].ratio:.2f}x" if stage in found else NONE for stage in STAGES]
            said = quality(point.run.bench)
            cost = said.short if said.known else said.text
            table.add_row(point.budget, str(point.batch.batch), *cells, printable(cost))
    return table
