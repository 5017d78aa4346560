"""Times that a GPU's published figures leave a plan's stages: predicted, every one of them, and what they are made of.

    roofline   `Roof.bound_ms`: no launches, activations on the chip
    low        the roofline, and a cheap launch of each product, each attention, and two of each scoring step: all else
               is fused into them
    high       nothing is fused: every node is a kernel with a dear launch, and its activations go through device memory

Launches are engines.roofline.LAUNCH_US, an assumption. Real kernels stay below their peaks, by how much is for a GPU to
tell: a measured time may be above `high`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.flops import GROUPS
from engines.plan.costs import Cost, NodeCost
from engines.plan.roof import Roof, gpu_roof
from engines.plan.stages import STAGES
from engines.plan.subject import Row
from engines.roofline import KNOWN, LAUNCH_US, Gpu, find_gpu
from flowcut.config import Precision
from flowcut.errors import ConfigError

TOTAL = "total"
"""Vision and prefill: what stands before the first token, but for the host's part."""
KINDS = (*GROUPS, "launches")
_FUSED = ("linear", "attention")


@dataclass(frozen=True)
class Times:
    """Milliseconds of a stage; see the module's docstring.

    Attributes:
        kinds: `low` by KINDS. memory: the part of `roofline` that memory, not arithmetic, decides.
    """

    roofline: float
    low: float
    high: float
    kinds: Mapping[str, float]
    memory: float

    def __add__(self, other: Times) -> Times:
        kinds = {kind: self.kinds[kind] + other.kinds[kind] for kind in KINDS}
        low, high = self.low + other.low, self.high + other.high
        return Times(self.roofline + other.roofline, low, high, kinds, self.memory + other.memory)


@dataclass(frozen=True)
class Machine:
    """A GPU and its roofs, which differ where vision has another precision."""

    gpu: Gpu
    vision: Roof
    decoder: Roof

    def times(self, row: Row) -> dict[str, Times]:
        """By STAGES, and TOTAL."""
        found = {name: stage_times(self.roof(name), row.costs[name]) for name in STAGES}
        return found | {TOTAL: found["vision"] + found["prefill"]}

    def total_ms(self, costs: Mapping[str, Cost]) -> float:
        """Roofline of vision and prefill."""
        return self.vision.bound_ms(costs["vision"]) + self.decoder.bound_ms(costs["prefill"])

    def roof(self, stage: str) -> Roof:
        return self.vision if stage == "vision" else self.decoder

    def fits(self, row: Row) -> bool | None:
        """Whether weights and cache fit its memory, and nothing is left for activations or code; None: not known."""
        memory = self.gpu.memory_bytes
        return None if memory is None else row.weight_bytes + row.cache_bytes <= memory


def stage_times(roof: Roof, cost: Cost) -> Times:
    """What a roof leaves one stage."""
    cheap, dear = (us / 1e3 for us in LAUNCH_US)
    bound = roof.bound_ms(cost)
    fused = sum(node.group in _FUSED and node.flops > 0 for node in cost.parts) + 2 * cost.scorings
    launches = cheap * fused
    high = sum(_alone_ms(roof, node) + dear * node.moves for node in cost.parts)
    kinds = {**roof.shares_ms(cost), "launches": launches}
    return Times(bound, bound + launches, high, kinds, roof.memory_bound_ms(cost))


def _alone_ms(roof: Roof, node: NodeCost) -> float:
    """Of a node whose activations come from device memory and go there."""
    return 1e3 * max(node.least_flops / roof.flops_per_s, (node.bytes + node.activation_bytes) / roof.bytes_per_s)


def find_machines(names: Sequence[str], decoder: Precision, vision: Precision) -> tuple[list[Machine], list[str]]:
    """Those of the names, or all that have the precisions; and why others were left out, a line each.

    Raises:
        ConfigError: a name that is no GPU's, or a GPU that was named and lacks a precision.
    """
    if names:
        gpus = dict.fromkeys(find_gpu(name).name for name in names)
        return [_machine(find_gpu(name), decoder, vision) for name in gpus], []
    machines, left_out = [], []
    for gpu in KNOWN:
        try:
            machines.append(_machine(gpu, decoder, vision))
        except ConfigError:
            left_out.append(f"{gpu.name} is left out: sm{gpu.sm} has no {' or '.join(sorted({decoder, vision}))}.")
    return machines, left_out


def _machine(gpu: Gpu, decoder: Precision, vision: Precision) -> Machine:
    return Machine(gpu, gpu_roof(gpu, vision), gpu_roof(gpu, decoder))


def times_dict(times: Times) -> dict[str, Any]:
    """Milliseconds as JSON has them."""
    return {"roofline_ms": times.roofline, "low_ms": times.low, "high_ms": times.high}


def shares(times: Mapping[str, Times]) -> dict[str, float]:
    """Where the time before the first token goes: shares of TOTAL's `low`, by stage and by kind; and of its roofline
    the share that memory decides."""
    total = times[TOTAL]
    stages = {name: times[name].low / total.low for name in ("vision", "prefill")}
    return {
        **stages,
        **{k: ms / total.low for k, ms in total.kinds.items()},
        "memory_bound": total.memory / total.roofline,
    }
