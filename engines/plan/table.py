"""A plan on a terminal. The line of JSON for programs is the command's."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.plan.grids import Grid, grids, heading
from engines.plan.run import Plan
from flowcut.printable import printable


def planned(console: Console, result: Plan) -> None:
    """What was counted, what is predicted of it, and what stands beside it."""
    data = result.to_dict()
    console.print(Text(printable(heading(data)), "bold"), soft_wrap=True)
    for grid in grids(data):
        console.print()
        console.print(Text(grid.title, "bold"), soft_wrap=True)
        console.print(_table(grid))
        for note in grid.notes:
            console.print(note)
    for note in result.notes:
        console.print(note)


def _table(grid: Grid) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for i, name in enumerate(grid.columns):
        table.add_column(name, justify="right" if i else "left")
    for row in grid.rows:
        table.add_row(*row)
    return table
