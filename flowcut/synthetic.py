"""Seeded random tensors of any geometry: engines can be timed before a checkpoint is downloaded."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist

import numpy as np

from flowcut.config import NUMPY_DTYPE, LlavaConfig
from flowcut.errors import ConfigError
from flowcut.tensors import NEWLINE, Array, Shape, expected_tensors, geometry_digest, numpy_dtype

_CHUNK = 1 << 16  # elements: raw bits and result stay in the processor's cache


@dataclass(frozen=True)
class RandomWeights:
    """Normal tensors, scaled so that attention is neither uniform nor one-hot (logits deviate by about 2)."""

    config: LlavaConfig
    seed: int = 0
    dtype: str = "float16"
    random: bool = True

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}.")
        known = list(dict.fromkeys(NUMPY_DTYPE.values()))
        if self.dtype not in known:
            raise ConfigError(f"dtype must be one of {', '.join(known)}, got {self.dtype!r}.")

    def load(self, name: str) -> Array:
        shape = self._shapes[name]
        mean, deviation = _spread(name, shape)
        table = (np.float32(mean) + np.float32(deviation) * _normal_quantiles()).astype(numpy_dtype(self.dtype))
        return _draw(table, math.prod(shape), [self.seed, zlib.crc32(name.encode())]).reshape(shape)

    @cached_property
    def sha256(self) -> str:
        digest = geometry_digest(self.config)
        digest.update(f"random {self.seed} {self.dtype}".encode())
        return digest.hexdigest()

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return expected_tensors(self.config)


def _spread(name: str, shape: Shape) -> tuple[float, float]:
    """Mean and standard deviation of a random tensor."""
    if len(shape) == 1 and name.endswith(".bias"):
        return 0.0, 0.1
    if name.endswith(("class_embedding", "position_embedding.weight", "embed_tokens.weight", NEWLINE)):
        return 0.0, 0.5
    if len(shape) == 1:
        return 1.0, 0.2
    gain = 1.0
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        gain = 1.4
    elif name.startswith("vision_tower.") and name.endswith("v_proj.weight"):
        gain = 0.35
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


@lru_cache(maxsize=1)
def _normal_quantiles() -> Array:
    """The standard normal in 65536 equally likely values, float32 [65536]."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)


def _draw(table: Array, count: int, seed: list[int]) -> Array:
    """`count` seeded picks of the table. Raw bits index it: numpy promises their stream, and it is four times as fast
    as drawing normals and rounding them."""
    bits = np.random.PCG64(seed)
    out = np.empty(count, table.dtype)
    for start in range(0, count, _CHUNK):
        part = out[start : start + _CHUNK]
        np.take(table, bits.random_raw(-(-len(part) // 4)).view(np.uint16)[: len(part)], out=part, mode="clip")
    return out
