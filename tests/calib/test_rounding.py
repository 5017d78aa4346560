"""Rounded weights against torch's types, plain loops, and ONNX Runtime's own quantizer."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from onnxruntime.capi import _pybind_state as ort_c

from calib.rounding import block_size, fp8_scale, round_weight
from flowcut.errors import ConfigError

QUANTIZED = ("int8", "int4", "fp8")
LEAST = {"int8": -127, "int4": -8, "fp8": -448}


def weight(outputs: int = 48, inputs: int = 256, dtype: object = np.float32) -> np.ndarray:
    """Normal, each output and each input of another size."""
    rng = np.random.default_rng(7)
    sizes = np.exp(rng.normal(0, 0.7, (outputs, 1)) + rng.normal(0, 0.4, (1, inputs)))
    return (0.02 * sizes * rng.standard_normal((outputs, inputs))).astype(dtype)


def scale_at(scales: np.ndarray, i: int, o: int, inputs: int) -> float:
    """The scale of the weight from input i to output o."""
    if scales.ndim == 2:
        return float(scales[i // (inputs // len(scales)), o])
    return float(scales[o] if scales.ndim else scales)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_widened_is_value_times_scale(precision: str) -> None:
    rounded = round_weight(weight(6, 128), precision)
    wide = rounded.widened()
    assert (wide.shape, wide.dtype) == ((6, 128), np.float32)
    for o in range(6):
        for i in range(128):
            assert wide[o, i] == np.float32(rounded.values[i, o]) * np.float32(scale_at(rounded.scales, i, o, 128))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_every_weight_is_at_the_nearest_step(precision: str) -> None:
    w = weight().astype(np.float64)
    rounded = round_weight(weight(), precision)
    scales = rounded.scales.astype(np.float64)
    steps = (np.repeat(scales, 256 // len(scales), 0) if scales.ndim == 2 else scales[None].repeat(256, 0)).T
    allowed = np.arange(LEAST[precision], 8 if precision == "int4" else 128)
    nearest = np.abs(w[..., None] - steps[..., None] * allowed).min(-1)
    assert np.abs(rounded.widened() - w) == pytest.approx(nearest, abs=1e-9)


def test_fp8_is_the_nearest_e4m3_that_torch_knows() -> None:
    rounded = round_weight(weight(), "fp8")
    expected = torch.from_numpy(weight() / np.float32(rounded.scales)).to(torch.float8_e4m3fn).float()
    assert rounded.values.dtype == ml_dtypes.float8_e4m3fn
    assert np.array_equal(rounded.values.astype(np.float32).T, expected.numpy())


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_stored_type_does_not_matter(precision: str, dtype: object) -> None:
    w = weight(dtype=dtype)
    kept = w.copy()
    narrow, wide = round_weight(w, precision), round_weight(w.astype(np.float32), precision)
    assert np.array_equal(narrow.widened(), wide.widened())
    assert np.array_equal(w, kept), "the weight itself must stay"


@pytest.mark.parametrize("precision", QUANTIZED)
def test_scales_are_positive_and_fit_the_largest(precision: str) -> None:
    w = weight()
    w[3] = 0
    w[4] = np.float32(1e-20)  # below what float16 holds
    rounded = round_weight(w, precision)
    assert rounded.scales.dtype == np.float16
    assert rounded.scales.min() > 0
    assert np.isfinite(rounded.widened()).all()
    assert not rounded.widened()[3:5].any()
    assert np.abs(rounded.widened()).max() == pytest.approx(np.abs(w).max(), rel=0.08 if precision == "int4" else 1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_no_int4_weight_is_off_by_more_than_half_a_step(sign: int) -> None:
    """Though there is no 8: a large positive weight, such as AWQ makes, must not lose more than the others."""
    w = sign * weight()
    rounded = round_weight(w, "int4")
    steps = np.repeat(rounded.scales.astype(np.float32), 128, 0).T
    assert (np.abs(rounded.widened() - w) / steps).max() < 0.505  # scales are rounded to float16
    assert {rounded.values.min(), rounded.values.max()} == {-8, 7}


def test_rows_round_apart_from_each_other() -> None:
    w = weight()
    for precision in ("int8", "int4"):
        together, alone = round_weight(w, precision), round_weight(w[5:9], precision)
        assert np.array_equal(together.widened()[5:9], alone.widened())


def test_int4_is_no_worse_than_onnx_runtimes() -> None:
    w = weight(64, 512)
    theirs = np.zeros((64, 4, 64), np.uint8)
    scales, zeros = np.zeros((64, 4), np.float32), np.zeros((64, 2), np.uint8)
    ort_c.quantize_matmul_4bits(theirs, np.ascontiguousarray(w.T), scales, zeros, 128, 64, 512, True)
    nibbles = np.stack([theirs & 0xF, theirs >> 4], -1).reshape(64, 4, 128).astype(np.float32) - 8
    expected = ((nibbles * scales[..., None]).reshape(64, 512) - w).std()
    assert 0.5 * expected < (round_weight(w, "int4").widened() - w).std() < 1.03 * expected
    assert scales.min() < 0, "else theirs would do: TensorRT wants positive scales"


def test_precisions_are_ordered_by_error() -> None:
    errors = [np.square(round_weight(weight(), precision).widened() - weight()).sum() for precision in QUANTIZED]
    assert errors[0] < errors[2] < errors[1]


@pytest.mark.parametrize(("inputs", "block"), [(4096, 128), (11008, 128), (64, 64), (192, 64), (320, 64)])
def test_block_size(inputs: int, block: int) -> None:
    assert block_size(inputs) == block
    assert round_weight(weight(4, inputs), "int4").scales.shape == (inputs // block, 4)


def test_inputs_that_no_block_divides_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"inputs of a layer in int4 must be a multiple of 64, got 96\. Choose int8"):
        round_weight(weight(4, 96), "int4")


def test_fp8_scale_reaches_the_largest_value() -> None:
    assert fp8_scale(448.0) == 1
    assert fp8_scale(7.0) == pytest.approx(7 / 448, rel=1e-3)
    assert fp8_scale(0.0) > 0
