"""What the weights in an ONNX file are worth: each, as the graph multiplies by it, against the checkpoint's.

A graph's outputs show what is wrong everywhere. One scale of one layer that is off by a few percent moves them by less
than float16 does, so weights are compared themselves, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engines.comparison import relative_error
from engines.sessions.session import Array
from engines.widen import load_model
from flowcut.errors import EngineError

if TYPE_CHECKING:
    from engines.reference import ExportedWeights

_CHECKPOINT = ("vision_tower.", "multi_modal_projector.", "language_model.", "image_newline")
_POSITIONS = "position_embedding+class"


class Difference(NamedTuple):
    """Of one weight, or of the scale that its input is divided by."""

    name: str
    error: float


def stored_weights(path: Path, weights: ExportedWeights) -> list[Difference]:
    """Every weight of the graph at `path` against `weights`, one in memory at a time.

    Raises:
        EngineError: not a graph, or one with a tensor that the checkpoint has not, or of another shape.
    """
    graph = load_model(path).graph
    try:
        return [Difference(name, relative_error(got, expected)) for name, got, expected in _pairs(graph, weights)]
    except (KeyError, ValueError, OSError) as error:
        raise EngineError(f"{path} must hold the checkpoint's tensors, got: {' '.join(str(error).split())}.") from error


def worst(differences: list[Difference]) -> Difference:
    """The greatest, not finite ones first."""
    return max(differences, key=lambda d: math.inf if math.isnan(d.error) else d.error)


def _pairs(graph: Any, weights: ExportedWeights) -> Iterator[tuple[str, Array, Array]]:
    """Name, value in the file and value expected, of every weight and of every scale of an input."""
    for name, value in graph.initializers.items():
        if not name.startswith(_CHECKPOINT) or name.endswith(".scale"):
            continue
        uses = {node.op_type for node, _ in value.uses()}
        got, linear = value.const_value.numpy().astype(np.float32), "MatMul" in uses
        if "DequantizeLinear" in uses:
            got, linear = _multiplied(got, graph.initializers[f"{name}.scale"].const_value.numpy()), True
        expected = np.concatenate([weights.load(part) for part in parts_of(name)])
        yield name, got.T if linear else got, expected
    for node in graph.all_nodes():
        if node.op_type == "MatMul":
            yield from _input_scale(node, weights)


def _multiplied(values: Array, scales: Array) -> Array:
    """DequantizeLinear along axis 0 (blocks) or 1 (outputs), or with one scale: [in, out]."""
    wide = scales.astype(np.float32)
    return values * (np.repeat(wide, len(values) // len(wide), axis=0) if wide.ndim == 2 else wide)


def _input_scale(product: Any, weights: ExportedWeights) -> Iterator[tuple[str, Array, Array]]:
    """FP8: what the product's input is divided by, and multiplied by again."""
    (layer, *_) = (part.removesuffix(".weight") for part in parts_of(_weight_of(product)))
    expected = weights.input_scale(layer)
    if expected is None:
        return
    value = product.inputs[0]
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        node = value.producer()
        if node is None or node.op_type != kind:
            raise ValueError(f"{layer}'s input is not rounded to FP8")
        value, scale = node.inputs[:2]
        yield (
            f"the scale of {layer}'s input",
            scale.const_value.numpy().astype(np.float32),
            np.array(expected, np.float32),
        )


def _weight_of(product: Any) -> str:
    """Name of the initializer that a MatMul multiplies by."""
    weight = product.inputs[1]
    name: str = (weight.producer().inputs[0] if weight.producer() is not None else weight).name
    return name


def parts_of(name: str) -> list[str]:
    """Tensors of the checkpoint that an initializer holds: a.q_proj+k_proj.weight has a.q_proj.weight and one more."""
    if name.endswith(_POSITIONS):
        return [f"{name.removesuffix('+class')}.weight"]
    if "+" not in name:
        return [name]
    owner, joined, leaf = name.rsplit(".", 2)
    return [f"{owner}.{part}.{leaf}" for part in joined.split("+")]
