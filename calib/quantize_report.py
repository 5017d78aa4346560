"""What `flowcut calibrate quantize` measured, as a table for people, 80 columns wide."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from calib.groups import part_of
from calib.quantize import Quantized

_SHOWN = 5
_PARTS = ("vision", "language")


def quantized(console: Console, result: Quantized) -> None:
    """Per part what rounding to int4 costs, without the scales and with them, and how large fp8's inputs are."""
    info, tokens = result.calibration.info, result.calibration.info["tokens"]
    console.print(
        Text(
            f"{info['model']}: {len(info['pictures'])} pictures with at most {tokens['visual']} visual tokens each, "
            f"{tokens['language']} tokens in all",
            "bold",
        ),
        soft_wrap=True,
    )
    console.print(_table(result))
    if skipped := info["skipped"]:
        console.print(f"{len(skipped)} files are skipped:")
        for item in skipped[:_SHOWN]:
            console.print(Text(f"  {item['name']}: {item['reason']}"), soft_wrap=True)
        if len(skipped) > _SHOWN:
            console.print(f"  and {len(skipped) - _SHOWN} more, all in the file")
    console.print(Text.assemble(("wrote ", "bold"), str(result.out)), soft_wrap=True)
    if info["note"]:
        console.print(Text(f"note: {info['note']}"), soft_wrap=True)
    if "random weights" in info["note"]:
        console.print("random weights: this tests the machinery; the figures mean nothing.")


def _table(result: Quantized) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in ("part", "scales", "int4 error", "with scales", "fp8 ranges", "min", "median", "max"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in _PARTS:
        table.add_row(part, *_errors(result, part), *_ranges(result, part))
    return table


def _errors(result: Quantized, part: str) -> list[str]:
    error = result.to_dict()["error"].get(part)
    if error is None:
        return ["0", "-", "-"]
    count = sum(part_of(name) == part for name in result.calibration.scales)
    return [str(count), f"{error['before']:.2%}", f"{error['after']:.2%}"]


def _ranges(result: Quantized, part: str) -> list[str]:
    values = [value for name, value in result.calibration.ranges.items() if part_of(name) == part]
    if not values:
        return ["0", "-", "-", "-"]
    return [str(len(values)), *(f"{figure:.3g}" for figure in (min(values), np.median(values), max(values)))]
