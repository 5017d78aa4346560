"""What a GPU could do at best, and what an encoder layer asks of it: plain arithmetic, nothing here runs on a GPU.

The figures are the makers' and others' measurements; `Gpu.sources` names one for each. A time made of them is a bound
that no engine reaches, so a share of such a time is a prediction, not a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from flowcut.deps import require
from flowcut.errors import ConfigError

if TYPE_CHECKING:
    import onnx_ir as ir

MIB, GB = 2**20, 10**9
LAUNCH_US = (0.9, 2.2)
"""An assumption: microseconds that one more small kernel adds. As much as one of 10,000 kernels on 4,096 doubles took
in a CUDA graph on L40 (0.94), A100 (1.34) and H200 (2.18): github.com/te42kyfo/gpu-benches, gpu-small-kernels."""


@dataclass(frozen=True)
class Gpu:
    """One product at its published clocks.

    Attributes:
        sm: compute capability as compilers spell it, 80 for 8.0.
        fp16_tflops: dense tensor-core float16 products, accumulated in float32, 10^12 operations a second.
        memory_gbps: device memory, 10^9 bytes a second.
        l2_bytes: size of the L2 cache.
        l2_gbps: what reads from L2 were measured to reach; None where no measurement is known to us.
        sources: where each of these numbers is from.
        fp32_tflops: float32 arithmetic outside the tensor cores, 10^12 operations a second.
        memory_bytes: of device memory, the maker's GB taken as 10^9: drivers tell up to 7% more.
    """

    name: str
    sm: int
    fp16_tflops: float
    memory_gbps: float
    l2_bytes: int
    l2_gbps: float | None
    sources: Mapping[str, str] = field(compare=False)
    fp32_tflops: float | None = None
    memory_bytes: int | None = None

    def arithmetic_us(self, flops: float) -> float:
        return flops / self.fp16_tflops / 1e6

    def memory_us(self, size_bytes: float) -> float:
        return size_bytes / self.memory_gbps / 1e3

    def l2_us(self, size_bytes: float) -> float:
        """A lower bound: 0 where L2's bandwidth is not known."""
        return size_bytes / self.l2_gbps / 1e3 if self.l2_gbps else 0.0

    def holds(self, size_bytes: float) -> bool:
        """Whether L2 could keep that much from one kernel to the next, if nothing else came through it."""
        return size_bytes <= self.l2_bytes


def _sources(compute: str, memory: str, l2: str, l2_speed: str = "") -> dict[str, str]:
    """`compute` is the source of both rates of arithmetic, `memory` of the memory's speed and size."""
    named = {"fp16_tflops": compute, "fp32_tflops": compute, "memory_gbps": memory, "memory_bytes": memory}
    return {**named, "l2_bytes": l2, **({"l2_gbps": l2_speed} if l2_speed else {})}


_A100 = "NVIDIA A100 80GB datasheet (2021)"
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture (whitepaper), table 3"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet"
_ADA = "NVIDIA Ada GPU Architecture (whitepaper), appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture (whitepaper), appendix A"
_L40S = "NVIDIA L40S datasheet"
_ORIN = "NVIDIA Jetson AGX Orin Series Technical Brief"
_BENCH = "github.com/te42kyfo/gpu-benches, gpu-l2-cache/"
GPUS = (
    Gpu(
        *("A100 SXM 80GB", 80, 312.0, 2039.0, 40 * MIB, 5400.0),
        _sources(
            _A100, _A100, "NVIDIA A100 Tensor Core GPU Architecture (whitepaper)", _BENCH + "a100_80.txt, 2-24 MB"
        ),
        *(19.5, 80 * GB),
    ),
    Gpu(
        *("H100 SXM", 90, 989.4, 3352.0, 50 * MIB, 9700.0),
        _sources(_HOPPER, _HOPPER, _HOPPER, _BENCH + "h200.txt, 12-40 MB: the H200 has the H100's chip and L2"),
        *(66.9, 80 * GB),
    ),
    Gpu(
        *("L40S", 89, 362.05, 864.0, 96 * MIB, 5200.0),
        _sources(_L40S, _L40S, _ADA, _BENCH + "l40.txt, 2-90 MB: the L40 has the L40S's chip and L2"),
        *(91.6, 48 * GB),
    ),
    Gpu("RTX 4090", 89, 165.2, 1008.0, 72 * MIB, None, _sources(_ADA, _ADA, _ADA), 82.6, 24 * GB),
    Gpu(
        *("RTX 5090", 120, 209.5, 1792.0, 96 * MIB, None),
        _sources(_BLACKWELL, _BLACKWELL, _BLACKWELL),
        *(104.8, 32 * GB),
    ),
    Gpu(
        *("Jetson AGX Orin 64GB", 87, 42.5, 204.8, 4 * MIB, None),
        _sources(_ORIN + ": 170 sparse INT8 TOPS of its GPU, / 2 dense, / 2 float16; 5.3 float32", _ORIN, _ORIN),
        *(5.3, 64 * GB),
    ),
)
H200 = Gpu(
    *("H200 SXM", 90, 989.4, 4800.0, 50 * MIB, 9700.0),
    _sources(_HOPPER + ": the H200 has the H100's chip", _H200, _HOPPER, _BENCH + "h200.txt, 12-40 MB"),
    *(66.9, 141 * GB),
)
KNOWN = (*GPUS, H200)
"""All that `find_gpu` finds. GPUS are one of each chip, which docs/results/scoring_cost.md compares."""


def find_gpu(name: str) -> Gpu:
    """The one GPU whose name has `name` as a word or as words in a row, whatever the case, spaces and hyphens: "h100",
    "RTX4090", "Orin". Not a part of a word: L4 and L40 are other products than L40S.

    Raises:
        ConfigError: none or several do.
    """
    found = [gpu for gpu in KNOWN if _plain(name) in _names(gpu)]
    if not _plain(name) or len(found) != 1:
        raise ConfigError(f"gpu must be one of {', '.join(gpu.name for gpu in KNOWN)}, got {name!r}.")
    return found[0]


def _names(gpu: Gpu) -> set[str]:
    words = [_plain(word) for word in gpu.name.split()]
    return {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "")


@dataclass(frozen=True)
class EncoderLayer:
    """What one layer asks for, all images together.

    Attributes:
        flops: of matrix products, a multiplication and an addition being two.
        weight_bytes: its parameters, each once.
    """

    flops: int
    weight_bytes: int

    def bound_us(self, gpu: Gpu) -> float:
        """The least time it can take: its arithmetic, or reading its weights from device memory."""
        return max(gpu.arithmetic_us(self.flops), gpu.memory_us(self.weight_bytes))


def encoder_layer(model: ir.Model, layer: int = 0, images: int = 1) -> EncoderLayer:
    """Counted from the nodes of a `vision` graph (export/vision.py), scoring left out. No weight is read.

    The model is changed: its input has `images` images afterwards, and its values have shapes.
    """
    require("onnx", extra="export")
    from onnx_ir.passes.common import ShapeInferencePass

    for value in model.graph.inputs:
        assert value.shape is not None
        value.shape[0] = images
    ShapeInferencePass()(model)
    nodes = [node for node in model.graph if (node.name or "").startswith(f"layers.{layer}/")]
    nodes = [node for node in nodes if "/flow/" not in (node.name or "")]
    parameters = {value.name: value.const_value for value in _parameters(nodes)}
    return EncoderLayer(sum(map(_flops, nodes)), sum(tensor.nbytes for tensor in parameters.values() if tensor))


def _parameters(nodes: list[ir.Node]) -> Iterator[ir.Value]:
    """Initializers that are checkpoint tensors. Constants, which the builder shares by value, are not."""
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer() and not (value.name or "").startswith("const."):
                yield value


def _flops(node: ir.Node) -> int:
    if node.op_type in ("MatMul", "Gemm"):
        return 2 * prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[-1]
    if node.op_type == "Attention":  # q, k, v [B, H, S, d]: two products
        q, k, v = (_shape(value) for value in node.inputs[:3])
        return 2 * prod(q) * k[2] + 2 * prod(q[:3]) * prod(v[2:])
    return 0


def _shape(value: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = value.shape.numpy()
    return shape
