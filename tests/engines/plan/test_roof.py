"""Times that follow from two rates, and which rates a GPU has for a precision."""

from __future__ import annotations

import pytest

from engines.plan.costs import Cost, NodeCost
from engines.plan.roof import Roof, gpu_roof
from engines.roofline import KNOWN, Gpu, find_gpu
from flowcut.errors import ConfigError

ROOF = Roof("one", flops_per_s=100.0, bytes_per_s=10.0, source="by hand")
NODES = (
    NodeCost("linear", 500, 400, weight_bytes=10, io_bytes=10, activation_bytes=10**9),  # 4 s against 2 s
    NodeCost("attention", 50, 50, state_bytes=20),  # 0.5 s against 2 s
    NodeCost("rest", 0, 0),
)


def test_a_bound_is_the_dearer_of_both_node_by_node() -> None:
    cost = Cost.of(NODES)
    assert ROOF.bound_ms(cost) == pytest.approx(4000 + 2000)
    assert ROOF.floor_ms(cost) == pytest.approx(4500)
    assert ROOF.shares_ms(cost) == pytest.approx({"linear": 4000, "attention": 2000, "scoring": 0, "rest": 0})
    assert ROOF.memory_bound_ms(cost) == pytest.approx(2000)
    assert [ROOF.memory_bound(node) for node in NODES] == [False, True, False]


@pytest.mark.parametrize("flops_per_s", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("bytes_per_s", [0.1, 7.0, 1e5])
def test_a_bound_is_never_below_what_the_sums_take(flops_per_s: float, bytes_per_s: float) -> None:
    roof, cost = Roof("r", flops_per_s, bytes_per_s, ""), Cost.of(NODES)
    assert roof.bound_ms(cost) >= roof.floor_ms(cost) * (1 - 1e-12)


@pytest.mark.parametrize("rates", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_rates_must_be_positive(rates: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"_per_s must be above 0, got"):
        Roof("r", *rates, source="")


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.name)
def test_weights_are_multiplied_in_float16_whatever_they_are_kept_in(gpu: Gpu) -> None:
    half = gpu_roof(gpu, "fp16")
    assert half.flops_per_s == gpu.fp16_tflops * 1e12
    assert half.bytes_per_s == gpu.memory_gbps * 1e9
    for precision in ("bf16", "int8", "int4"):
        assert gpu_roof(gpu, precision).flops_per_s == half.flops_per_s
    single = gpu_roof(gpu, "fp32")
    assert gpu.fp32_tflops is not None
    assert single.flops_per_s == gpu.fp32_tflops * 1e12 < half.flops_per_s
    assert half.source.startswith("published: NVIDIA")


def test_fp8_has_twice_the_rate_where_there_is_fp8() -> None:
    for name in ("H100", "H200", "L40S", "4090", "5090"):
        gpu = find_gpu(name)
        assert gpu_roof(gpu, "fp8").flops_per_s == 2 * gpu.fp16_tflops * 1e12
    for name in ("A100", "Orin"):
        with pytest.raises(ConfigError, match=r"gpu must have fp8, which GPUs have from sm89 on, got '.*sm8[07]\)"):
            gpu_roof(find_gpu(name), "fp8")


def test_a_rate_that_nobody_published_is_refused() -> None:
    gpu = Gpu("one", 80, 1.0, 1.0, 1, None, {})
    with pytest.raises(ConfigError, match="precision must be one whose rate on one is known, got 'fp32'"):
        gpu_roof(gpu, "fp32")
