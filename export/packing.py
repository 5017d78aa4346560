"""LLaVA-NeXT's packing as graph nodes: what the tower kept of each tile becomes each picture's visual tokens.

Every kept patch and every newline has a place in its picture's reading order (flowcut/anyres.py). Sorting a picture's
candidates by place puts its visual tokens first and padding last, in constant shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.builder import GraphBuilder
from flowcut.anyres import NO_TOKEN
from flowcut.contract import GraphContract
from flowcut.errors import ConfigError

MOST_SLOTS = 3840
"""The greatest k of TensorRT's TopK."""


@dataclass(frozen=True)
class Tiles:
    """What the tower returns of T tiles, and which of I pictures they are of.

    Attributes:
        embeds: [T, K, D].
        order: [T, K], the place of each.
        of_image: [I, most], numbers of each picture's tiles counted from 1; 0 for none.
        newlines: [I, N], places.
        newline: [1, D], what stands there.
    """

    embeds: ir.Value
    order: ir.Value
    of_image: ir.Value
    newlines: ir.Value
    newline: ir.Value


def check_slots(contract: GraphContract) -> None:
    """Raise ConfigError where a picture has more candidates than can be sorted."""
    slots = int(contract.outputs[0].dims[1])
    if slots > MOST_SLOTS:
        raise ConfigError(
            f"visual tokens of one picture must be at most {MOST_SLOTS} (TensorRT sorts no more), got {slots}. "
            "Keep fewer tokens, or take smaller image_grid_pinpoints."
        )


def packed(b: GraphBuilder, tiles: Tiles, contract: GraphContract) -> tuple[ir.Value, ir.Value, ir.Value]:
    """image_embeds [I, slots, D], kept [I, slots] and image_lengths [I] of the contract, visual tokens first.

    Rows that are no visual token hold any other: they are finite, and sort behind, where their order means nothing.
    """
    sizes = {spec.name: spec.dims for spec in contract.inputs}
    slots, width = (int(dim) for dim in contract.outputs[0].dims[1:])
    most, newlines = int(sizes["image_tiles"][1]), int(sizes["newline_places"][1])
    keep = (slots - newlines) // most
    none = b.const(np.full((1, keep), NO_TOKEN), "int64")
    places = b.op("Gather", b.op("Concat", none, tiles.order, axis=0), tiles.of_image, axis=0)  # [I, most, K]
    places = b.op("Concat", b.op("Reshape", places, b.const([-1, most * keep], "int64")), tiles.newlines, axis=1)
    k = b.const([slots], "int64")
    kept, slot = b.ops("TopK", places, k, outputs=2, axis=1, largest=0, sorted=1)
    embeds = b.op("Reshape", tiles.embeds, b.const([-1, width], "int64"))
    table = b.op("Concat", tiles.newline, embeds, axis=0)  # row 0, then those of tile 1, 2, ..
    row = b.op("GatherElements", _rows(b, tiles.of_image, most, keep, newlines), slot, axis=1)
    exists = b.op("Less", kept, b.const(NO_TOKEN, "int64"))
    count = b.op("ReduceSum", b.op("Cast", exists, to=ir.DataType.INT64), b.const([1], "int64"), keepdims=0)
    return b.op("Gather", table, row, axis=0), kept, count


def _rows(b: GraphBuilder, of_image: ir.Value, most: int, keep: int, newlines: int) -> ir.Value:
    """[I, slots]: the table's row of every candidate; of a tile that is not there, the newline's."""
    first = b.op("Mul", b.op("Unsqueeze", of_image, b.const([2], "int64")), b.const(keep, "int64"))
    rows = b.op("Add", first, b.const(np.arange(keep) + 1 - keep, "int64"))  # [I, most, K]
    rows = b.op("Reshape", b.op("Max", rows, b.const(0, "int64")), b.const([-1, most * keep], "int64"))
    return b.op("Pad", rows, b.const([0, 0, 0, newlines], "int64"))
