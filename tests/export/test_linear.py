"""Linear layers in every precision: on ONNX Runtime their weights are the rounded ones, inputs too in fp8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from calib.rounding import round_weight
from export.builder import GraphBuilder, save
from export.linear import Linear
from flowcut.checkpoint import random_weights
from flowcut.config import NUMPY_DTYPE, LlavaConfig, TextConfig, VisionConfig
from flowcut.contract import GraphContract, TensorSpec
from flowcut.errors import CheckpointError, ConfigError

CONFIG = LlavaConfig(
    VisionConfig(96, 192, 3, 4, 28, 14), TextConfig(128, 320, 2, 4, 2, 512, 4096, 1e-5), image_token_id=448
)
LAYER = "language_model.model.layers.0."
QKV = tuple(f"{LAYER}self_attn.{name}_proj" for name in "qkv")
DOWN = f"{LAYER}mlp.down_proj"
FC1, FC2 = (f"vision_tower.vision_model.encoder.layers.0.mlp.{name}" for name in ("fc1", "fc2"))
PRECISIONS = ("fp32", "fp16", "int8", "int4", "fp8")
STORED = {"int8": onnx.TensorProto.INT8, "int4": onnx.TensorProto.INT4, "fp8": onnx.TensorProto.FLOAT8E4M3FN}
Build = Callable[..., Path]


@dataclass(frozen=True)
class Changed:
    """Seeded weights, some of them replaced."""

    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    config: LlavaConfig = CONFIG
    random: bool = True
    sha256: str = ""

    def load(self, name: str) -> np.ndarray:
        found = self.tensors.get(name)
        return random_weights(self.config, dtype="float16").load(name) if found is None else found


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(precision, *names) -> a graph of one product: x [n, in] -> y [n, out]."""

    def write(
        precision: str,
        *names: str,
        bias: bool = False,
        ranges: Mapping[str, float] | None = None,
        weights: Changed | None = None,
    ) -> Path:
        weights, dtype = weights or Changed(), NUMPY_DTYPE[precision]
        sizes = [weights.load(f"{name}.weight").shape for name in names]
        b = GraphBuilder("one")
        x_spec = TensorSpec("x", dtype, ("n", sizes[0][1]))
        y = Linear(b, weights, precision, ranges)(b.input(x_spec), *names, bias=bias)
        contract = GraphContract("one", (x_spec,), (TensorSpec("y", dtype, ("n", sum(n for n, _ in sizes))),))
        path = tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}.onnx"
        save(b.model(contract, {"y": y}, {}), path)
        return path

    return write


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    dtype = {"tensor(float16)": np.float16, "tensor(float)": np.float32}[session.get_inputs()[0].type]
    (y,) = session.run(None, {"x": x.astype(dtype)})
    return np.asarray(y)


def multiplied_by(path: Path, inputs: int) -> np.ndarray:
    """What the graph multiplies by, [out, in]: its answer to one input after the other."""
    return run(path, np.eye(inputs)).astype(np.float32).T


def ones(*names: str) -> dict[str, float]:
    """Ranges for inputs of ones and zeros, which E4M3 then holds exactly."""
    return dict.fromkeys(names, 1.75)


@pytest.mark.parametrize("name", [QKV[0], DOWN, FC2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_graph_multiplies_by_the_rounded_weight(build: Build, precision: str, name: str) -> None:
    stored = Changed().load(f"{name}.weight").astype(np.float32)
    wanted = stored if precision in ("fp32", "fp16") else round_weight(stored, precision).widened()
    got = multiplied_by(build(precision, name, ranges=ones(name)), stored.shape[1])
    # float16 rounds value times scale once more
    assert got == pytest.approx(wanted, rel=0 if precision in ("fp32", "fp16") else 2**-10, abs=1e-7)
    if precision in STORED:
        assert np.abs(got - stored).max() > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_joined_layers_are_the_separate_ones_side_by_side(build: Build, precision: str) -> None:
    x = np.random.default_rng(0).standard_normal((7, 128))
    together = run(build(precision, *QKV, ranges=ones(*QKV)), x)
    apart = np.hstack([run(build(precision, name, ranges=ones(*QKV)), x) for name in QKV])
    assert together.shape == apart.shape == (7, 128 + 64 + 64)
    # one scale for all three in fp8, so their weights may round to other steps
    tolerance = {"fp8": 0.05, "fp32": 1e-6}.get(precision, 2e-3)
    assert np.abs(together - apart).max() <= tolerance * np.abs(apart).max()


def test_fp8_joins_weights_under_one_scale(build: Build) -> None:
    stored = np.concatenate([Changed().load(f"{name}.weight").astype(np.float32) for name in QKV])
    got = multiplied_by(build("fp8", *QKV, ranges=ones(*QKV)), 128)
    assert got == pytest.approx(round_weight(stored, "fp8").widened(), rel=2**-10, abs=1e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bias_is_added_as_it_is(build: Build, precision: str) -> None:
    bias = Changed().load(f"{FC2}.bias")
    assert np.array_equal(
        run(build(precision, FC2, bias=True, ranges=ones(FC2)), np.zeros((2, 192))), np.stack([bias, bias])
    )


def test_fp8_rounds_inputs_to_e4m3_of_the_calibrated_scale(build: Build) -> None:
    """Against torch's type; inputs beyond the range become its end."""
    eye = Changed({f"{QKV[0]}.weight": np.eye(128, dtype=np.float32)})
    x = np.random.default_rng(1).standard_normal((50, 128)).astype(np.float16)
    y = run(build("fp8", QKV[0], ranges={QKV[0]: 2.0}, weights=eye), x)
    scale = torch.tensor(2.0 / 448, dtype=torch.float16)
    inside = torch.from_numpy(x).clamp(-448 * scale, 448 * scale)
    expected = (inside / scale).to(torch.float8_e4m3fn).to(torch.float16) * scale
    beyond = np.abs(x) > 2
    assert beyond.any()
    assert np.abs(y[beyond]) == pytest.approx(2, rel=2e-3)
    assert y[~beyond] == pytest.approx(expected.numpy()[~beyond], rel=2e-3)
    assert np.abs(y - x)[~beyond].max() > 0.01, "nothing was rounded"


def test_fp8_takes_the_largest_range_of_joined_layers(build: Build) -> None:
    eye = np.eye(128, dtype=np.float32)
    weights = Changed({f"{QKV[0]}.weight": eye, f"{QKV[1]}.weight": eye[:64], f"{QKV[2]}.weight": eye[:64]})
    y = run(build("fp8", *QKV, ranges=dict(zip(QKV, (1.0, 4.0, 2.0), strict=True)), weights=weights), 4 * eye)
    assert y.max() == pytest.approx(4, rel=2e-3)


def test_fp8_without_a_range_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=rf"calibration must hold the range of {QKV[1]}'s input for precision fp8"):
        build("fp8", *QKV, ranges={QKV[0]: 1.0})


@pytest.mark.parametrize("precision", STORED)
def test_file_stores_the_type_and_nothing_wider(build: Build, precision: str) -> None:
    path = build(precision, *QKV, ranges=ones(*QKV))
    onnx.checker.check_model(path, full_check=True)
    tensors = {t.name: t for t in onnx.load(path).graph.initializer}
    name = f"{LAYER}self_attn.q_proj+k_proj+v_proj.weight"
    assert tensors[name].data_type == STORED[precision]
    elements = 256 * 128
    assert len(tensors[name].raw_data) == (elements // 2 if precision == "int4" else elements)
    scale = tensors[f"{name}.scale"]
    assert scale.data_type == onnx.TensorProto.FLOAT16
    assert tuple(scale.dims) == {"int8": (256,), "int4": (1, 256), "fp8": ()}[precision]
    assert numpy_helper.to_array(scale).min() > 0


@pytest.mark.parametrize("name", [DOWN, FC2])
def test_int4_is_packed_as_onnx_packs_it(build: Build, name: str) -> None:
    """In blocks of 64 where 128 does not divide the inputs."""
    tensors = {t.name: t for t in onnx.load(build("int4", name)).graph.initializer}
    values = round_weight(Changed().load(f"{name}.weight"), "int4").values
    ours = tensors[f"{name}.weight"]
    theirs = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, values.shape, values.flatten().tolist())
    assert numpy_helper.to_array(ours).astype(np.int8).tolist() == values.tolist()
    assert numpy_helper.to_array(theirs).astype(np.int8).tolist() == values.tolist()
    packed = bytes(theirs.raw_data) or np.array(theirs.int32_data, np.uint8).tobytes()
    assert ours.raw_data == packed
    assert tensors[f"{name}.weight.scale"].dims[0] == values.shape[0] // 64


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tensor_that_is_not_finite_is_named(build: Build, precision: str, value: float) -> None:
    weight = Changed().load(f"{DOWN}.weight").copy()
    weight[3, 7] = value
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.weight must be finite, got {value} at"):
        build(precision, DOWN, ranges=ones(DOWN), weights=Changed({f"{DOWN}.weight": weight}))


def test_inputs_that_int4_has_no_block_for_are_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"inputs of a layer in int4 must be a multiple of 64, got 96\."):
        build("int4", FC1)


def test_bf16_computes_in_bfloat16(build: Build) -> None:
    """ONNX Runtime has no bfloat16 products, so the file is looked at."""
    path = build("bf16", QKV[0])
    (tensor,) = onnx.load(path).graph.initializer
    assert tensor.data_type == onnx.TensorProto.BFLOAT16
    wanted = torch.from_numpy(Changed().load(f"{QKV[0]}.weight").astype(np.float32)).to(torch.bfloat16).float()
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.float32).T, wanted.numpy())
