"""What the kernels are compiled for and launched with.

Plain arithmetic, without triton, torch or TensorRT: dimensions are ints, or TensorRT's symbolic expressions of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flowcut.errors import EngineError

Dim = Any
"""An int, or a TensorRT ShapeExpr: both add, subtract and multiply, the expression on the left."""

DTYPES = ("fp16", "bf16", "fp32")
HEAD_SIZES = range(32, 129, 8)
LOGITS, COMBINE, COMBINE_MASKED = "flow_score_logits", "flow_score_combine", "flow_score_combine_masked"
KEYS_PER_PROGRAM, SCORES_PER_PROGRAM = 4, 64
_LARGEST = float.fromhex("0x1.fffffep+127")  # float32's
# Arguments of each kernel, in order; integers are int32.
INPUTS = {
    LOGITS: ("q", "v_source", "k", "v"),
    COMBINE: ("logits", "strength", "running"),
    COMBINE_MASKED: ("logits", "strength", "running", "key_valid"),
}
LOGITS_INTEGERS = (
    *("logit_scale", "semantic_scale", "query_heads", "heads", "keys"),
    *("q_batch", "q_head", "source_batch", "source_head", "key_head", "key_row"),
)
COMBINE_INTEGERS = (
    *("history", "query_heads", "heads", "keys", "source_in_keys", "running_batch", "semantic", "strengthened"),
)
INTEGERS = {LOGITS: LOGITS_INTEGERS, COMBINE: COMBINE_INTEGERS, COMBINE_MASKED: COMBINE_INTEGERS}
OUTPUTS = {
    LOGITS: ("logits", "strength"),
    COMBINE: ("running_out",),
    COMBINE_MASKED: ("running_out", "entropy_ratio"),
}


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel. Only the logits differ by input type and head size.

    Raises:
        EngineError: an unknown kernel, or a type or head size that the kernel is not made for.
    """

    kernel: str
    dtype: str = "fp32"
    head_size: int = 0

    def __post_init__(self) -> None:
        if self.kernel not in INPUTS:
            raise EngineError(f"kernel must be one of {', '.join(INPUTS)}, got {self.kernel!r}.")
        if self.kernel == LOGITS:
            if self.dtype not in DTYPES:
                raise EngineError(f"dtype must be one of {', '.join(DTYPES)} for FlowScore, got {self.dtype!r}.")
            if self.head_size not in HEAD_SIZES:
                raise EngineError(
                    f"head_size must be a multiple of 8 from {HEAD_SIZES[0]} to {HEAD_SIZES[-1]} for FlowScore's "
                    f"kernel, got {self.head_size}. Engines for ONNX Runtime and TensorRT-RTX take any."
                )
        elif (self.dtype, self.head_size) != ("fp32", 0):
            raise EngineError(f"{self.kernel} must be fp32 without head size, got {self.dtype}, {self.head_size}.")

    @property
    def label(self) -> str:
        """ "flow_score_logits-fp16-64", "flow_score_combine"."""
        return f"{self.kernel}-{self.dtype}-{self.head_size}" if self.kernel == LOGITS else self.kernel

    @cached_property
    def pointers(self) -> dict[str, str]:
        """Triton types of the tensor arguments."""
        inputs = dict.fromkeys(INPUTS[self.kernel], f"*{self.dtype}")
        outputs = dict.fromkeys(OUTPUTS[self.kernel], "*fp32")
        return {**inputs, **outputs} | ({"key_valid": "*i1"} if "key_valid" in inputs else {})

    @cached_property
    def constants(self) -> dict[str, int]:
        """Values of the kernel's constexpr arguments."""
        if self.kernel == LOGITS:
            padded = 1 << (self.head_size - 1).bit_length()
            return {"HEAD_SIZE": self.head_size, "BLOCK_D": padded, "BLOCK_H": 16, "BLOCK_S": KEYS_PER_PROGRAM}
        return {"BLOCK_H": 16, "BLOCK_S": 128, "BLOCK_N": SCORES_PER_PROGRAM}

    @property
    def num_warps(self) -> int:
        return 4 if self.kernel == LOGITS and self.head_size <= 64 else 8

    @property
    def max_registers(self) -> int:
        """Per thread, said so that ptxas spills nothing: by itself it aims lower. 128 leave room for 16 warps on an SM;
        wide float32 heads do not fit.
        """
        return 160 if self.dtype == "fp32" and self.head_size > 64 else 128


@dataclass(frozen=True)
class Call:
    """Dimensions of one scoring step.

    Attributes:
        batch, keys: images and keys of each.
        heads: key and value heads; each serves `group` query heads.
        q_rows, source_rows: rows per head of the tensors whose first row is the source's query and value.
        token_major: q, v_source, k and v are [B, rows, heads, d], as a projection leaves them, not [B, heads, rows, d].
    """

    batch: Dim
    heads: int
    keys: Dim
    group: int = 1
    q_rows: Dim = 1
    source_rows: Dim = 1
    token_major: bool = False

    @property
    def query_heads(self) -> int:
        return self.heads * self.group

    def programs(
        self, kernel: str, source_in_keys: int = 0, ceil_div: Callable[[Dim, int], Dim] = lambda a, b: -(-a // b)
    ) -> Dim:
        """Of that kernel along the grid's x; y counts images. The logits do not go by `source_in_keys`."""
        if kernel == LOGITS:
            return ceil_div(self.keys, KEYS_PER_PROGRAM)
        return ceil_div(self.keys - source_in_keys, SCORES_PER_PROGRAM)

    def logits_integers(self, logit_scale: float, semantic_scale: float) -> list[Dim]:
        """LOGITS_INTEGERS' values. Strides count rows of d elements."""
        major = self.token_major
        return [
            *(float_bits(logit_scale), float_bits(semantic_scale), self.query_heads, self.heads, self.keys),
            *(self.q_rows * self.query_heads, 1 if major else self.q_rows),
            *(self.source_rows * self.heads, 1 if major else self.source_rows),
            *((1, self.heads) if major else (self.keys, 1)),
        ]

    def combine_integers(self, history: float, source_in_keys: int, semantic: int, strengthened: int) -> list[Dim]:
        """COMBINE_INTEGERS' values. Without history the running score is not used, so it may be one number."""
        running_batch = self.keys - source_in_keys if history else 0
        sizes = [self.query_heads, self.heads, self.keys]
        return [float_bits(history), *sizes, source_in_keys, running_batch, semantic, strengthened]


def float_bits(x: float) -> int:
    """The int32 with the bits of float32 `x`. TensorRT passes integers to ahead-of-time kernels, not floats.

    Raises:
        EngineError: x is negative or beyond float32, which no weight or scale here is.
    """
    if not 0 <= x <= _LARGEST:  # nor NaN
        raise EngineError(f"scales and weights of FlowScore must be finite and 0 or more, got {x}.")
    return int(struct.unpack("<i", struct.pack("<f", abs(x)))[0])  # -0.0 has a bit that no dimension could hold
