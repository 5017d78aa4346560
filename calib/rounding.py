"""Weights of a linear layer rounded to int8, int4 or FP8, to nearest, one layer at a time.

Scales are float16 and positive, zero points are 0, as TensorRT asks. What is rounded is divided by the scale as it is
stored, so a scale's own rounding costs nothing twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowcut.deps import require
from flowcut.errors import ConfigError
from flowcut.tensors import Array

BLOCKS = (128, 64)
"""Inputs that share an int4 scale, best first: what TensorRT knows. Fewer make smaller errors and more scales."""
_SPAN = {"int8": 127, "fp8": 448}
"""What the largest absolute value is scaled to."""
_RANGE = {"int8": (-127, 127), "int4": (-8, 7), "fp8": (-448, 448)}
_INT4_SPAN = (-8.5, 7.5)
"""What the least and the largest of a block are scaled to, at most: half a step beyond int4, so that they are off no
further than the others. Steps are finer than with (-7, 7): a fifth less squared error on normal weights. With (-8, 8) a
large positive weight loses a whole step, and those that AWQ enlarges are such."""
_LEAST_SCALE = 2.0**-20  # of weights that are all zero, or nearly; float16 has 16 steps there


@dataclass(frozen=True)
class Rounded:
    """A weight [out, in] as its graph holds it, transposed.

    Attributes:
        values: [in, out], the transpose of an array in memory; int8 (for int4 too, within -8..7) or float8_e4m3fn.
        scales: float16; int8 [out], int4 [in / block, out], fp8 [].
    """

    values: Array
    scales: Array

    def widened(self) -> Array:
        """The weight that the graph multiplies by, float32 [out, in]."""
        values, scales = self.values.T.astype(np.float32, order="C"), self.scales.T.astype(np.float32)
        if scales.ndim == 2:
            values.reshape(*scales.shape, -1)[...] *= scales[..., None]
            return values
        return values * (scales[..., None] if scales.ndim else scales)


def round_weight(weight: Array, precision: str) -> Rounded:
    """Round `weight`, any float type [out, in], to `precision`: "int8", "int4" or "fp8"."""
    wide = weight.astype(np.float32)
    if precision == "int4":
        return _by_block(wide, block_size(wide.shape[1]))
    scales = _scale(np.abs(wide).max(axis=1 if precision == "int8" else None), precision)
    wide /= scales.astype(np.float32)[..., None] if scales.ndim else scales.astype(np.float32)
    return Rounded(_nearest(wide, precision).T, scales)


def block_size(inputs: int) -> int:
    """Inputs that share a scale in int4.

    Raises:
        ConfigError: no block size divides `inputs`.
    """
    for block in BLOCKS:
        if inputs % block == 0:
            return block
    raise ConfigError(
        f"inputs of a layer in int4 must be a multiple of {BLOCKS[-1]}, got {inputs}. Choose int8 or fp16 for it."
    )


def fp8_scale(largest: float) -> float:
    """The scale of values up to `largest`."""
    return float(_scale(np.asarray(largest, np.float32), "fp8"))


def _by_block(wide: Array, block: int) -> Rounded:
    blocks = wide.reshape(len(wide), -1, block)
    below, above = _INT4_SPAN
    scales = _storable(np.maximum(blocks.max(axis=2) / np.float32(above), blocks.min(axis=2) / np.float32(below)))
    blocks /= scales.astype(np.float32)[..., None]
    return Rounded(_nearest(wide, "int4").T, np.ascontiguousarray(scales.T))


def _scale(largest: Array, precision: str) -> Array:
    return _storable(largest / np.float32(_SPAN[precision]))


def _storable(scales: Array) -> Array:
    return np.maximum(scales, _LEAST_SCALE).astype(np.float16)


def _nearest(scaled: Array, precision: str) -> Array:
    least, largest = _RANGE[precision]  # a scale that was rounded down leaves values beyond them
    if precision == "fp8":
        return np.clip(scaled, least, largest).astype(require("ml_dtypes", extra="export").float8_e4m3fn)
    return np.clip(np.rint(scaled, out=scaled), least, largest, out=scaled).astype(np.int8)
