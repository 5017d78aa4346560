"""GraphBuilder: shared constants, lazy weights, names, contracts, and what `save` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.builder import IR_VERSION, OPSET, GraphBuilder, ir_dtype, save
from export.linear import Linear
from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, Precision, TextConfig, VisionConfig
from flowcut.contract import GraphContract, TensorSpec

CONFIG = LlavaConfig(VisionConfig(16, 32, 3, 2, 28, 14), TextConfig(16, 32, 1, 2, 2, 512), image_token_id=448)
LINEAR = "multi_modal_projector.linear_1"
CONTRACT = GraphContract(
    "linear",
    (TensorSpec("x", "float32", ("images", 4, 16)),),
    (TensorSpec("y", "float32", ("images", 4, 16)),),
)


class CountedWeights:
    """Random weights that remember what was read."""

    def __init__(self) -> None:
        self._weights = random_weights(CONFIG, 7, "float32")
        self.config, self.random, self.sha256 = CONFIG, True, "0"
        self.loaded: list[str] = []

    def load(self, name: str) -> np.ndarray:
        self.loaded.append(name)
        return self._weights.load(name)


def linear_model(weights: CountedWeights, precision: Precision = "fp32", bias: bool = True) -> ir.Model:
    b = GraphBuilder("linear")
    x = b.input(CONTRACT.inputs[0])
    cast = b.op("Cast", x, to=ir_dtype("float16" if precision == "fp16" else "float32"))
    y = b.op("Cast", Linear(b, weights, precision)(cast, LINEAR, bias=bias), to=ir.DataType.FLOAT)
    return b.model(CONTRACT, {"y": y}, {"schedule": "off", "tokens": "4"})


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_x_times_the_transposed_weight_plus_bias(bias: bool, tmp_path: Path) -> None:
    weights, path = CountedWeights(), tmp_path / "linear.onnx"
    save(linear_model(weights, bias=bias), path)
    x = np.random.default_rng(0).standard_normal((3, 4, 16), np.float32)
    (y,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    expected = x @ weights.load(f"{LINEAR}.weight").T + bias * weights.load(f"{LINEAR}.bias")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_read_once_each_and_only_when_the_file_is_written(tmp_path: Path) -> None:
    weights = CountedWeights()
    model = linear_model(weights)
    assert weights.loaded == []
    save(model, tmp_path / "linear.onnx")
    assert sorted(weights.loaded) == [f"{LINEAR}.bias", f"{LINEAR}.weight"]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_weights_are_written_beside_the_graph_in_its_precision(
    precision: Precision, dtype: str, tmp_path: Path
) -> None:
    b, weights, path = GraphBuilder("w"), CountedWeights(), tmp_path / "w.onnx"
    y = b.op("Identity", b.weight(weights, f"{LINEAR}.weight", precision))
    save(b.model(GraphContract("w", (), (TensorSpec("y", dtype, (16, 16)),)), {"y": y}, {}), path)
    assert (tmp_path / "w.onnx.data").stat().st_size == 16 * 16 * (4 if precision == "fp32" else 2)
    stored = ir.load(path).graph.initializers[f"{LINEAR}.weight"].const_value
    assert stored is not None
    expected = weights.load(f"{LINEAR}.weight").astype(ir_dtype(dtype).numpy())
    np.testing.assert_array_equal(stored.numpy().astype(np.float32), expected.astype(np.float32))


def test_a_tensor_used_twice_is_one_initializer() -> None:
    b, weights = GraphBuilder("g"), CountedWeights()
    assert b.weight(weights, f"{LINEAR}.bias", "fp32") is b.weight(weights, f"{LINEAR}.bias", "fp32")


def test_equal_constants_are_shared_and_different_ones_are_not() -> None:
    b = GraphBuilder("g")
    one = b.const([1, 2, 3], "int64")
    assert b.const(np.array([1, 2, 3]), "int64") is one
    others = [
        b.const([1, 2, 4], "int64"),
        b.const([[1, 2, 3]], "int64"),
        b.const([1, 2, 3], "int32"),
        b.const([1, 2, 3], "float32"),
        b.const(-0.0, "float32"),
        b.const(0.0, "float32"),
        b.const(0, "int32"),
    ]
    assert len({id(v) for v in [one, *others]}) == 8
    assert len({v.name for v in [one, *others]}) == 8


def test_constants_hold_their_values() -> None:
    b = GraphBuilder("g")
    tensor = b.const(-np.inf, "float16").const_value
    assert tensor is not None
    assert tensor.dtype == ir.DataType.FLOAT16
    assert tensor.shape.numpy() == ()
    assert tensor.numpy() == -np.inf


def test_nodes_are_named_by_scope_and_never_twice() -> None:
    b = GraphBuilder("g")
    x = b.const(1.0, "float32")
    with b.scope("layers.0"):
        first = b.op("Neg", x)
        with b.scope("flow"):
            inner = b.op("Neg", x)
        second = b.op("Neg", x)
    assert [v.name for v in (first, inner, second)] == ["layers.0/Neg", "layers.0/flow/Neg", "layers.0/Neg.1"]
    values, indices = b.ops("TopK", x, x, outputs=2)
    assert [values.name, indices.name] == ["TopK.0", "TopK.1"]
    names = [n.name for n in b.graph({})]
    assert len(set(names)) == len(names) == 4


def test_the_file_is_valid_self_describing_and_typed_by_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "linear.onnx"
    save(linear_model(CountedWeights()), path)
    onnx.checker.check_model(path, full_check=True)
    proto = onnx.load(path, load_external_data=False)
    assert proto.ir_version == IR_VERSION
    assert {o.domain: o.version for o in proto.opset_import} == {"": OPSET}
    assert {p.key: p.value for p in proto.metadata_props} == {"schedule": "off", "tokens": "4"}
    for specs, values in ((CONTRACT.inputs, proto.graph.input), (CONTRACT.outputs, proto.graph.output)):
        found = [(v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]
        assert found == [(spec.name, spec.dims) for spec in specs]


def test_saving_reports_the_weights_it_writes(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    save(linear_model(CountedWeights()), tmp_path / "linear.onnx", lambda *event: seen.append(event))
    assert seen == [(f"{LINEAR}.weight", 0, 1)]  # the bias is small enough to lie in the graph's own file


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bfloat16", "BFLOAT16"), ("float16", "FLOAT16"), ("float32", "FLOAT"), ("int64", "INT64"), ("bool", "BOOL")],
)
def test_dtype_names(name: str, expected: str) -> None:
    assert ir_dtype(name).name == expected


def test_one_name_is_one_weight() -> None:
    b = GraphBuilder("g")
    first = b.computed_weight("w", (2, 3), "fp16", lambda: np.zeros((2, 3), np.float32))
    assert b.computed_weight("w", (2, 3), "fp16", lambda: np.zeros((2, 3), np.float32)) is first
    for shape, precision in (((3, 2), "fp16"), ((2, 3), "fp32")):
        with pytest.raises(ValueError, match="w must be one weight"):
            b.computed_weight("w", shape, precision, lambda: np.zeros((2, 3), np.float32))
