"""Bytes that one scoring step moves, counted from the two kernels. Triton, a GPU and TensorRT are not needed.

A load that several programs repeat is counted as often as it is made: it costs L2, while device memory sees it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from engines.flow_score import launch

ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
FLOAT = 4  # bytes: everything between the kernels and after them is float32


@dataclass(frozen=True)
class Traffic:
    """Bytes of one scoring step, all images together.

    Attributes:
        kv_bytes: K and V, each element read once.
        source_bytes: the source's query and value, read by each program of the first kernel.
        logits_written: per-head logits that the first kernel leaves for the second.
        logits_read: the same, by the second kernel: each program reads all of them for its sums, its own once more.
        other_bytes: strength written and read, running score read and written; with a mask, its loads and the
            parts of the entropy ratio.
        first_device_bytes: what the first kernel moves if no byte passes between device memory and L2 twice.
        combine_device_bytes: the same of the second kernel.
    """

    kv_bytes: int
    source_bytes: int
    logits_written: int
    logits_read: int
    other_bytes: int
    first_device_bytes: int
    combine_device_bytes: int

    @property
    def total_bytes(self) -> int:
        """All loads and stores that the kernels make, repeated ones counted each time."""
        return self.kv_bytes + self.source_bytes + self.logits_written + self.logits_read + self.other_bytes

    @property
    def device_bytes(self) -> int:
        """Device memory's share if L2 kept nothing from one launch to the next and everything within one."""
        return self.first_device_bytes + self.combine_device_bytes


def traffic(call: launch.Call, dtype: str, head_size: int, masked: bool = False, source_in_keys: int = 1) -> Traffic:
    """Bytes of FlowScore with all its parts and a running score. The dimensions of `call` must be numbers.

    Raises:
        EngineError: a type or head size that the kernel is not made for.
    """
    launch.Variant(launch.LOGITS, dtype, head_size)
    rows, scored = call.query_heads + call.heads, call.keys - source_in_keys
    vectors = call.batch * head_size * ITEMSIZE[dtype]
    kv, source = 2 * call.heads * call.keys * vectors, rows * vectors
    logits, strength = (call.batch * n * call.keys * FLOAT for n in (rows, 1))
    first_programs, programs = programs_of(call, source_in_keys)
    own_logits = call.batch * rows * scored * FLOAT
    scores = 3 * call.batch * scored * FLOAT  # strength and running score in, running score out
    mask_loads, mask_once = _mask_bytes(call, source_in_keys) if masked else (0, 0)
    return Traffic(
        kv_bytes=kv,
        source_bytes=first_programs * source,
        logits_written=logits,
        logits_read=programs * logits + own_logits,
        other_bytes=strength + scores + mask_loads,
        first_device_bytes=kv + source + logits + strength,
        combine_device_bytes=logits + scores + mask_once,
    )


def programs_of(call: launch.Call, source_in_keys: int = 1) -> tuple[int, int]:
    """Programs per image of the first and of the second kernel."""
    return call.programs(launch.LOGITS), call.programs(launch.COMBINE, source_in_keys)


def _mask_bytes(call: launch.Call, source_in_keys: int) -> tuple[int, int]:
    """Loads of the mask and stores of the entropy's parts: as made, and each once.

    A program reads the scored keys' bytes for every block of heads and to count them, its own keys' twice.
    """
    scored = call.keys - source_in_keys
    block = launch.Variant(launch.COMBINE_MASKED).constants["BLOCK_H"]
    head_blocks = ceil(call.query_heads / block) + ceil(call.heads / block)
    programs = programs_of(call, source_in_keys)[1]
    parts = call.batch * programs * FLOAT
    return call.batch * (programs * (head_blocks + 1) * scored + 2 * scored) + parts, call.batch * scored + parts
