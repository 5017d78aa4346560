"""Linear layers as nodes, their weights in the graph's precision.

    fp32 fp16 bf16   MatMul
    int8             DequantizeLinear of int8 weights, a scale for every output, then MatMul
    int4             DequantizeLinear of int4 weights, a scale for every output and block of inputs, then MatMul
    fp8              DequantizeLinear of E4M3 weights with one scale; QuantizeLinear and DequantizeLinear of the input

Layers that read the same input can be one product. TensorRT joins them anyway, and until the build ends it keeps the
weights as they were before: two thirds of a decoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from calib.rounding import Rounded, block_size, fp8_scale, round_weight
from export.builder import GraphBuilder, ir_dtype
from flowcut.config import NUMPY_DTYPE, QUANTIZED
from flowcut.errors import ConfigError
from flowcut.tensors import Array, expected_tensors, narrowed, transposed

if TYPE_CHECKING:
    from flowcut.checkpoint import Weights

Ranges = Mapping[str, float]
"""The largest absolute input of every linear layer, by the layer's name in the checkpoint; fp8 only."""
_STORED = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}


class Linear:
    """Emits the linear layers of one graph."""

    def __init__(self, b: GraphBuilder, weights: Weights, precision: str, ranges: Ranges | None = None) -> None:
        self._b, self._weights, self._precision = b, weights, precision
        self._ranges = ranges or {}
        self._shapes = expected_tensors(weights.config)

    def __call__(self, x: ir.Value, *names: str, bias: bool = True) -> ir.Value:
        """x @ W^T + b for the checkpoint's `name`.weight [out, in] and `name`.bias; of several, side by side.

        Raises:
            ConfigError: a layer whose shape the precision does not allow, or whose range fp8 lacks.
        """
        b = self._b
        if self._precision == "fp8":
            x = self._rounded_input(x, names)
        y = b.op("MatMul", x, self._weight(names))
        if not bias:
            return y
        joined = [f"{name}.bias" for name in names]
        shape = (sum(self._shapes[name][0] for name in joined),)
        return b.op("Add", y, b.computed_weight(_joined(joined), shape, self._precision, partial(self._load, joined)))

    def _weight(self, names: Sequence[str]) -> ir.Value:
        """[in, out]."""
        parts = [f"{name}.weight" for name in names]
        name, inputs = _joined(parts), self._shapes[parts[0]][1]
        shape = (inputs, sum(self._shapes[part][0] for part in parts))
        if self._precision not in QUANTIZED:
            load = partial(self._narrowed, name, parts)
            return self._b.computed_weight(name, shape, self._precision, lambda: transposed(load()))
        return self._dequantized(name, shape, partial(self._load, parts))

    def _dequantized(self, name: str, shape: tuple[int, int], load: Callable[[], Array]) -> ir.Value:
        inputs, outputs = shape
        scales: tuple[int, ...] = ()
        attributes: dict[str, Any] = {}
        if self._precision == "int8":
            scales, attributes = (outputs,), {"axis": 1}
        elif self._precision == "int4":
            block = block_size(inputs)
            scales, attributes = (inputs // block, outputs), {"axis": 0, "block_size": block}
        once = _Once(name, self._precision, load)
        values = self._b.lazy(name, _STORED[self._precision], shape, once.values)
        scale = self._b.lazy(f"{name}.scale", ir.DataType.FLOAT16, scales, once.scales)
        return self._b.op("DequantizeLinear", values, scale, **attributes)

    def _rounded_input(self, x: ir.Value, names: Sequence[str]) -> ir.Value:
        b = self._b
        missing = [name for name in names if name not in self._ranges]
        if missing:
            raise ConfigError(
                f"calibration must hold the range of {missing[0]}'s input for precision fp8, got none. "
                "`flowcut calibrate quantize` measures it."
            )
        scale = b.const(fp8_scale(max(self._ranges[name] for name in names)), NUMPY_DTYPE[self._precision])
        zero = b.const(0, "float8e4m3fn")
        return b.op("DequantizeLinear", b.op("QuantizeLinear", x, scale, zero), scale, zero)

    def _narrowed(self, name: str, parts: Sequence[str]) -> Array:
        """Before it is transposed, so that an error tells the checkpoint's place."""
        return narrowed(name, self._load(parts), ir_dtype(NUMPY_DTYPE[self._precision]).numpy(), self._precision)

    def _load(self, names: Sequence[str]) -> Array:
        arrays = [self._weights.load(name) for name in names]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class _Once:
    """Values and scales of one weight, which is read and rounded once for both."""

    def __init__(self, name: str, precision: str, load: Callable[[], Array]) -> None:
        self._name, self._precision, self._load = name, precision, load
        self._lock, self._rest = Lock(), dict[str, Array]()

    def values(self) -> ir.TensorProtocol:
        array = self._take("values")
        if self._precision != "int4":
            return ir.Tensor(transposed(array.T), name=self._name)
        nibbles = transposed(array.T).reshape(-1, 2).view(np.uint8) & 0xF  # two to a byte, the first below
        packed = nibbles[:, 0] | nibbles[:, 1] << 4
        return ir.PackedTensor(packed, ir.DataType.INT4, shape=array.shape, name=self._name)

    def scales(self) -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(self._take("scales")), name=f"{self._name}.scale")

    def _take(self, which: str) -> Array:
        with self._lock:
            if which not in self._rest:
                self._rest = vars(self._round())
            return self._rest.pop(which)

    def _round(self) -> Rounded:
        weight = self._load()
        narrowed(self._name, weight, np.float16, self._precision)  # which is what the graph multiplies by
        return round_weight(weight, self._precision)


def _joined(names: Sequence[str]) -> str:
    """layer.q_proj.weight, layer.k_proj.weight -> layer.q_proj+k_proj.weight"""
    if len(names) == 1:
        return names[0]
    heads, tails = zip(*(name.rsplit(".", 2)[::2] for name in names), strict=True)
    middle = "+".join(name.rsplit(".", 2)[1] for name in names)
    return f"{heads[0]}.{middle}.{tails[0]}"
