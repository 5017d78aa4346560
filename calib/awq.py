"""Scales for int4: channels with large inputs get more of the rounding's resolution (AWQ, arXiv 2306.00978).

A channel's weights are multiplied by s, its input divided by s. As the weights of a block round in equal steps, the
channel's error falls by s, while the block's grows as far as s raises its largest weight. With x the inputs and w the
weights of a channel, s = mean|x|^alpha / mean|w|^beta; those exponents are taken with which the group's output over
sampled inputs has the least relative error. 0 and 0, plain rounding, take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from calib.rounding import round_weight
from flowcut.tensors import Array

EXPONENTS = tuple((i / 10, beta) for beta in (0.0, 0.5) for i in range(11))
"""Pairs of alpha and beta that are tried."""
TRIED_ROWS = 1024
"""Outputs of a group on which all exponents are tried, spread evenly; the best is then compared on all. Outputs round
apart from each other, so a few tell as much as all."""
_DEAD = 1e-4  # of the largest mean: what a channel of zeros counts as
_CHUNK = 4096  # outputs rounded at a time, for memory


@dataclass(frozen=True)
class Found:
    """The best scale of a group.

    Attributes:
        scale: float32 [in], what the columns are multiplied by; all 1 where nothing is gained.
        before, after: relative error of the outputs, rounded as they are and with the scale: the root of the mean, over
            layers and tokens, of squared error over squared output.
    """

    scale: Array
    exponents: tuple[float, float]
    before: float
    after: float


def search(weights: Sequence[Array], rows: Array, mean: Array) -> Found:
    """Find the scale of a group of layers.

    Args:
        weights: float32 [out, in] of each layer.
        rows: float32 [n, in], inputs to compare outputs on.
        mean: [in] absolute input of each channel.
    """
    x, one = torch.from_numpy(rows), np.ones(len(mean), np.float32)
    sizes = np.mean([np.abs(weight).mean(axis=0, dtype=np.float64) for weight in weights], axis=0)
    scales = {exponents: _scale(mean, sizes, *exponents) for exponents in EXPONENTS}
    few = _Product([weight[_spread(len(weight), TRIED_ROWS // len(weights))] for weight in weights], x)
    best = min(EXPONENTS, key=lambda exponents: few.error(scales[exponents]))
    every = _Product(weights, x)
    before, after = every.error(one), every.error(scales[best])
    if after >= before:
        return Found(one, (0.0, 0.0), before, before)
    return Found(scales[best], best, before, after)


def _scale(inputs: Array, sizes: Array, alpha: float, beta: float) -> Array:
    """The product of least and largest is 1, so that float16 holds what it multiplies and divides. float32 [in]."""
    powers = _positive(inputs) ** alpha / _positive(sizes) ** beta
    return np.asarray(powers / np.sqrt(powers.max() * powers.min()), np.float32)


def _positive(means: Array) -> Array:
    return np.maximum(means, max(_DEAD * float(means.max()), float(np.finfo(np.float32).tiny)))


class _Product:
    """Outputs of a group of layers: x W^T of each weight, every token's divided by their size.

    Else the few tokens with huge activations, which the next norm makes small again, would decide alone.
    """

    def __init__(self, weights: Sequence[Array], x: torch.Tensor) -> None:
        self._weights, self._inputs = weights, [_weighed(weight, x) for weight in weights]

    def error(self, scale: Array) -> float:
        """Relative error of the outputs with weights that were scaled, rounded and scaled back."""
        pairs = zip(self._weights, self._inputs, strict=True)
        return float(np.sqrt(np.mean([_energies(weight, x, scale).mean() for weight, x in pairs])))


def _weighed(weight: Array, x: torch.Tensor) -> torch.Tensor:
    """Tokens x [n, in], divided by the length of their output; 0 where it is 0."""
    sizes = _energies(weight, x).sqrt()
    return torch.where(sizes > 0, x.double() / sizes, 0.0).float()


def _energies(weight: Array, x: torch.Tensor, scale: Array | None = None) -> torch.Tensor:
    """Squared length of each token's output, or with a scale of what rounding adds to it: float64 [n, 1]."""
    total = torch.zeros(len(x), 1, dtype=torch.float64)
    for start in range(0, len(weight), _CHUNK):
        part = weight[start : start + _CHUNK]
        part = part if scale is None else _rounding(part, scale)
        total += (x @ torch.from_numpy(part).T).square().sum(1, keepdim=True, dtype=torch.float64)
    return total


def _rounding(weight: Array, scale: Array) -> Array:
    """What rounding adds to a weight."""
    rounded = round_weight(weight * scale, "int4").widened()
    rounded /= scale
    rounded -= weight
    return rounded


def _spread(length: int, count: int) -> Array:
    """At most `count` numbers of 0..length-1, evenly apart."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(np.int64))
