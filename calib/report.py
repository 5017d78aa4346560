"""What a calibration found, as tables for people, 80 columns wide."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calib.schedule import Calibrated
from flowcut.schedule import CALIBRATION

_SHOWN = 5
_SIDES = {"static": "static", "masked": "masked", "closed_form": "closed form"}


def calibrated(console: Console, result: Calibrated) -> None:
    """Counts per pruning point, then how each schedule agrees with adaptive on the held-out half."""
    told, static = result.to_dict(), result.static[CALIBRATION]
    halves = told["pictures"]
    console.print(
        Text(
            f"{told['model']}: {told['tokens_per_tile']} of {result.static['patches']} patches{_each_tile(static)}, "
            f"{told['choose']} of {halves['calibration']} pictures; {halves['held_out']} held out",
            "bold",
        ),
        soft_wrap=True,
    )
    console.print(_counts(result, static))
    console.print(_agreement(result, told))
    _say_skipped(console, static["skipped"])
    for path in (result.out, result.masked_out):
        console.print(Text.assemble(("wrote ", "bold"), str(path)), soft_wrap=True)
    if "random weights" in result.note:
        console.print("random weights: this tests the machinery; the figures mean nothing.")


def _each_tile(static: dict[str, Any]) -> str:
    return f" of each of {sum(static['tiles'].values())} tiles" if "tiles" in static else ""


def _counts(result: Calibrated, static: dict[str, Any]) -> Table:
    table = _table("after layer", "adaptive mean", "min", "max", "static", "capacity", "clamped")
    clamped = result.masked[CALIBRATION]["clamp_rate"]["points"]
    rows = zip(
        static["adaptive"]["calibration"], result.static["counts"], result.masked["counts"], clamped, strict=True
    )
    for seen, count, capacity, over in rows:
        numbers = (seen["min"], seen["max"], count, capacity)
        table.add_row(str(seen["layer"]), f"{seen['mean']:.1f}", *map(str, numbers), f"{over['share']:.1%}")
    return table


def _agreement(result: Calibrated, told: dict[str, Any]) -> Table:
    table = _table("with adaptive, held out", "kept mean", "min", "cosine mean", "min", "FLOPs")
    for name, label in _SIDES.items():
        figures = told["agreement"][name]
        values = [figures[kind][part] for kind in ("final_jaccard", "feature_cosine") for part in ("mean", "min")]
        shown = ["-" if value is None else f"{value:.4f}" for value in values]
        table.add_row(label, *shown, f"{told['flops_share'][name]:.1%}")
    share = result.static[CALIBRATION]["adaptive"]["flops_share"]
    table.add_row("adaptive itself", "", "", "", "", f"{share:.1%}")
    return table


def _say_skipped(console: Console, skipped: list[dict[str, str]]) -> None:
    if skipped:
        console.print(f"{len(skipped)} files are skipped:")
        for item in skipped[:_SHOWN]:
            console.print(Text(f"  {item['name']}: {item['reason']}"), soft_wrap=True)
        if len(skipped) > _SHOWN:
            console.print(f"  and {len(skipped) - _SHOWN} more, all in the file")


def _table(first: str, *numbers: str) -> Table:
    """A column of names and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
