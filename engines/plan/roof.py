"""What a machine could do at best, and the time that this leaves a run no less than."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engines.flops import GROUPS
from engines.numerics import NEEDED_SM
from engines.plan.costs import Cost, NodeCost
from engines.roofline import Gpu
from flowcut.errors import ConfigError


@dataclass(frozen=True)
class Roof:
    """A peak rate of arithmetic and one of memory. `source` says where they are from, measured or published."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    source: str

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}.")

    def bound_ms(self, cost: Cost) -> float:
        """The roofline of a run: each node takes its arithmetic at the peak rate, or moving what only it moves of
        `Cost.bytes` if that takes longer, and nodes run one after the other.

        What it is not: a strict limit. That is `floor_ms`, which this is never below; it would take an engine that
        reads the next node's weights while it computes this one's products, all the time. And it is no estimate:
        launches, activations that leave the chip and kernels below their peak are left out. Arithmetic outside
        products counts at the same peak, which it never reaches.
        """
        return sum(self.node_ms(node) for node in cost.parts)

    def floor_ms(self, cost: Cost) -> float:
        """What no engine can beat: all arithmetic at the peak rate, or all bytes, whichever takes longer."""
        least = cost.flops if cost.least_flops is None else cost.least_flops
        return 1e3 * max(least / self.flops_per_s, cost.bytes / self.bytes_per_s)

    def node_ms(self, node: NodeCost) -> float:
        return 1e3 * max(node.least_flops / self.flops_per_s, node.bytes / self.bytes_per_s)

    def memory_bound(self, node: NodeCost) -> bool:
        """Whether moving its bytes takes longer than its arithmetic."""
        return node.bytes / self.bytes_per_s > node.least_flops / self.flops_per_s

    def shares_ms(self, cost: Cost) -> Mapping[str, float]:
        """`bound_ms` by kind of node, engines.flops.GROUPS."""
        return {group: sum(self.node_ms(node) for node in cost.parts if node.group == group) for group in GROUPS}

    def memory_bound_ms(self, cost: Cost) -> float:
        """The part of `bound_ms` that is memory's."""
        return sum(self.node_ms(node) for node in cost.parts if self.memory_bound(node))


def gpu_roof(gpu: Gpu, precision: str) -> Roof:
    """Of a GPU for graphs of a precision, from published figures.

    Weights in int8 and int4 are widened and multiplied in float16. fp8 has twice that rate on a GPU that has the type,
    and is granted it for all products, attention's and the head's among them, which our graphs compute in float16.
    fp32 is what runs outside the tensor cores.

    Raises:
        ConfigError: a precision that the GPU lacks, or whose rate is not known.
    """
    tflops, named = gpu.fp16_tflops, "fp16_tflops"
    needed = NEEDED_SM.get(precision, 0)
    if gpu.sm < needed:
        raise ConfigError(
            f"gpu must have {precision}, which GPUs have from sm{needed} on, got {gpu.name!r} (sm{gpu.sm}). Choose "
            "another --precision, or another --gpu."
        )
    if precision == "fp8":
        tflops *= 2
    elif precision == "fp32":
        if gpu.fp32_tflops is None:
            raise ConfigError(f"precision must be one whose rate on {gpu.name} is known, got 'fp32'. Take fp16.")
        tflops, named = gpu.fp32_tflops, "fp32_tflops"
    twice = " (fp8: twice)" if precision == "fp8" else ""
    source = f"published: {gpu.sources.get(named, 'unknown')}{twice}; {gpu.sources.get('memory_gbps', 'unknown')}"
    return Roof(f"{gpu.name}, {precision}", tflops * 1e12, gpu.memory_gbps * 1e9, source)
