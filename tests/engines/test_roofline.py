"""Bounds from published figures, and a layer's work counted from the exported graph."""

from __future__ import annotations

import pytest

from engines.roofline import KNOWN, LAUNCH_US, EncoderLayer, Gpu, encoder_layer, find_gpu
from export.vision import vision_model
from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, Precision, TextConfig, VisionConfig
from flowcut.contract import Limits, vision_contract
from flowcut.errors import ConfigError
from flowcut.schedule import Schedule

SMALL = VisionConfig(
    image_size=56,
    patch_size=7,
    hidden_size=48,
    intermediate_size=112,
    num_hidden_layers=6,
    num_attention_heads=4,
)
PATCHES = 64


def counted(vision: VisionConfig, schedule: Schedule, layer: int, images: int, precision: Precision) -> EncoderLayer:
    config = LlavaConfig(vision, TextConfig(64, 128, 1, 4, 4, 512), image_token_id=448)
    contract = vision_contract(config, schedule.tokens, precision, Limits())
    model = vision_model(random_weights(config), contract, schedule, precision, {})
    return encoder_layer(model, layer, images)


def formula(vision: VisionConfig, keys: int, images: int) -> int:
    """Four projections, an MLP of two, and two products of attention."""
    size, mlp = vision.hidden_size, vision.intermediate_size
    return images * (keys * (4 * 2 * size * size + 2 * 2 * size * mlp) + 2 * 2 * keys * keys * size)


def parameters(vision: VisionConfig) -> int:
    """The same six matrices with biases, and two layer norms of gain and bias."""
    size, mlp = vision.hidden_size, vision.intermediate_size
    return 4 * (size * size + size) + 2 * size * mlp + mlp + size + 2 * 2 * size


@pytest.mark.parametrize(("precision", "itemsize"), [("fp16", 2), ("fp32", 4)])
@pytest.mark.parametrize("images", [1, 8])
def test_a_clip_layer_is_what_the_formula_says(images: int, precision: Precision, itemsize: int) -> None:
    vision = VisionConfig()
    found = counted(vision, Schedule("off", 576, 576), 3, images, precision)
    assert found == EncoderLayer(formula(vision, 577, images), itemsize * parameters(vision))


def test_a_layer_behind_a_pruning_point_has_fewer_keys_and_scoring_is_not_counted() -> None:
    schedule = Schedule("static", PATCHES, 9, (40, 9))  # of six layers, after 1 and 3
    keys = {0: PATCHES, 1: PATCHES, 2: 40, 3: 40, 4: 9}
    for layer, patches in keys.items():
        found = counted(SMALL, schedule, layer, 2, "fp16")
        assert found == EncoderLayer(formula(SMALL, patches + 1, 2), 2 * parameters(SMALL))


def test_times_follow_from_units() -> None:
    gpu = Gpu("one", 80, fp16_tflops=1.0, memory_gbps=1.0, l2_bytes=100, l2_gbps=2.0, sources={})
    assert gpu.arithmetic_us(3e12) == pytest.approx(3e6)
    assert gpu.memory_us(4e9) == pytest.approx(4e6)
    assert gpu.l2_us(4e9) == pytest.approx(2e6)
    assert (gpu.holds(100), gpu.holds(101)) == (True, False)
    assert EncoderLayer(flops=10**12, weight_bytes=1).bound_us(gpu) == pytest.approx(1e6)
    assert EncoderLayer(flops=1, weight_bytes=10**9).bound_us(gpu) == pytest.approx(1e6)


def test_without_a_known_l2_bandwidth_reads_from_it_are_free() -> None:
    assert find_gpu("5090").l2_us(10**9) == 0


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.name)
def test_every_figure_names_its_source(gpu: Gpu) -> None:
    names = ("fp16_tflops", "memory_gbps", "l2_bytes", "l2_gbps", "fp32_tflops", "memory_bytes")
    figures = {name for name in names if getattr(gpu, name) is not None}
    assert set(gpu.sources) == figures
    assert all(gpu.sources.values())


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.name)
def test_caches_are_faster_than_memory_and_arithmetic_than_both(gpu: Gpu) -> None:
    assert gpu.l2_gbps is None or gpu.memory_gbps < gpu.l2_gbps < gpu.fp16_tflops * 1e3
    assert gpu.sm // 10 in (8, 9, 10, 12)
    assert 0 < LAUNCH_US[0] < LAUNCH_US[1]


def test_a_gpu_is_found_by_part_of_its_name() -> None:
    names = ("a100", "H100", "l40s", "RTX 4090", "5090", "orin", "H200", "rtx-4090", "RTX5090", "a100-sxm")
    assert [find_gpu(name).sm for name in names] == [80, 90, 89, 89, 120, 87, 90, 89, 120, 80]


def test_an_h200_is_an_h100_with_more_memory() -> None:
    h100, h200 = find_gpu("H100"), find_gpu("H200")
    assert h200.fp16_tflops == h100.fp16_tflops
    assert h200.memory_gbps / h100.memory_gbps == pytest.approx(1.43, abs=0.01)
    assert (h100.memory_bytes, h200.memory_bytes) == (80 * 10**9, 141 * 10**9)


@pytest.mark.parametrize("name", ["", "-", "RTX", "V100", "SXM", "L4", "L40", "A10", "H20", "00"])
def test_a_gpu_that_is_not_one_of_the_table_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="gpu must be one of A100 SXM 80GB, H100 SXM"):
        find_gpu(name)
