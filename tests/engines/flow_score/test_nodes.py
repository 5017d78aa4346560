"""FlowScore nodes -> plugin nodes. What TensorRT would run is run by ONNX's reference evaluator, plugins in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import recipe
from conftest import WriteCheckpoint
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from references import relative_error

from engines.flow_score.launch import COMBINE, COMBINE_MASKED, LOGITS, SCORES_PER_PROGRAM, Variant
from engines.flow_score.nodes import plugin_model, plugin_variants
from export.builder import GraphBuilder, save
from export.flow_score import Form, Source, flow_score, flow_score_function
from export.vision import vision_model
from flowcut.checkpoint import Weights, open_checkpoint
from flowcut.contract import GraphContract, Limits, TensorSpec, vision_contract
from flowcut.errors import EngineError
from flowcut.schedule import Schedule

Array = np.ndarray[Any, Any]
PATCHES, TOKENS, PIXELS = 64, 9, recipe.pixels(56, 2, 5)
SCHEDULES = {
    "static": Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, 9)),
    "masked": Schedule("masked", PATCHES, TOKENS, (62, 50, 50, 20, 9)),
    "masked-no-semantic": Schedule("masked", PATCHES, TOKENS, (62, 50, 50, 20, 9), "no-semantic"),
    "no-strength": Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, 9), "no-strength"),
    "cls": Schedule("static", PATCHES, TOKENS, (TOKENS,), "cls"),
}
HEADS, SIZE = 4, 32
ALWAYS = {"plugin_namespace": b"flowcut", "plugin_version": b"1", "aot": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


class FlowScoreLogits(OpRun):
    """What the plugin of that name promises, in float64."""

    op_domain = "flowcut"

    def _run(self, q: Array, v_source: Array, k: Array, v: Array, **given: Any) -> tuple[Array, Array]:
        rows = 1 if given["token_major"] else 2
        q, v_source, k, v = (np.moveaxis(x.astype(float), rows, 2) for x in (q, v_source, k, v))
        query = q if given["group"] > 1 else q[:, :, :1]
        attention = np.einsum("bhgd,bhsd->bhgs", query, k) * given["logit_scale"]
        similarity = np.einsum("bhd,bhsd->bhs", v_source[:, :, 0], v) * given["semantic_scale"]
        logits = np.concatenate([attention.reshape(len(k), -1, k.shape[2]), similarity], 1)
        return logits.astype(np.float32), np.abs(v.mean(1)).sum(-1).astype(np.float32)


class FlowScoreCombineMasked(OpRun):
    """As above. Its parts of the entropy are not the kernel's, their sum is."""

    op_domain = "flowcut"

    def _run(
        self, logits: Array, strength: Array, running: Array, valid: Array | None = None, **given: Any
    ) -> tuple[Array, Array]:
        batch, rows, keys = logits.shape
        exists = np.ones((batch, keys), bool) if valid is None else valid.reshape(batch, keys)
        first = given["source_in_keys"]
        heads = rows // (given["group"] + 1) * given["group"]
        p, similarity = (share(x.astype(float), exists, first) for x in (logits[:, :heads], logits[:, heads:]))
        score = p + similarity if given["semantic"] else p
        score = score * (strength[:, first:] if given["strengthened"] else 1)
        before = given["history"] * running if given["history"] else 0
        count = np.maximum(exists[:, first:].sum(1, keepdims=True), 2)
        surprise = -p * np.log(np.where(p > 0, p, 1)) / np.log(count)
        parts = np.zeros((batch, -(-score.shape[1] // SCORES_PER_PROGRAM)))
        parts[:, -1] = np.where(exists[:, first:].sum(1) < 2, 1, surprise.sum(1))
        return (before + (1 - given["history"]) * score).astype(np.float32), parts.astype(np.float32)


class FlowScoreCombine(FlowScoreCombineMasked):
    op_domain = "flowcut"

    def _run(self, *inputs: Array, **given: Any) -> tuple[Array]:  # type: ignore[override]
        return super()._run(*inputs, **given)[:1]


class GatherElements(OpRun):
    """The evaluator's own takes no axis of more than 64."""

    def _run(self, x: Array, index: Array, axis: int) -> tuple[Array]:
        return (np.take_along_axis(x, index, axis),)


def share(logits: Array, exists: Array, first: int) -> Array:
    """Head-mean softmax [B, keys - first], normalised; in logarithms, as the semantic shares underflow."""
    logits = np.where(exists[:, None], logits, -np.inf)
    log_share = (logits - np.logaddexp.reduce(logits, 2, keepdims=True))[:, :, first:]
    log_mean = np.logaddexp.reduce(log_share, 1)
    return np.exp(log_mean - np.logaddexp.reduce(log_mean, 1, keepdims=True))


def run_plugins(model: onnx.ModelProto, feed: dict[str, Array]) -> list[Array]:
    new_ops = [FlowScoreLogits, FlowScoreCombine, FlowScoreCombineMasked, GatherElements]
    return list(ReferenceEvaluator(model, new_ops=new_ops).run(None, feed))  # type: ignore[arg-type]


def scored(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "flowcut"]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# Whole vision graphs


@pytest.fixture(scope="module")
def weights(checkpoint: WriteCheckpoint) -> Weights:
    return open_checkpoint(checkpoint("tiny", vision={"heads": 2}, seed=4))


def export(weights: Weights, path: Path, name: str, precision: Any = "fp32") -> onnx.ModelProto:
    """The model as the compiler reads it, its weights beside it."""
    contract = vision_contract(weights.config, TOKENS, precision, Limits())
    save(vision_model(weights, contract, SCHEDULES[name], precision, {"made": "here"}, trace=True), path)
    return onnx.load(path, load_external_data=False)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_vision_graph_keeps_the_same_patches(name: str, weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "vision.onnx"
    model = plugin_model(export(weights, path, name), tmp_path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert [output.name for output in model.graph.output] == names
    expected = dict(zip(names, session.run(None, {"pixel_values": PIXELS}), strict=True))
    onnx.load_external_data_for_model(model, str(tmp_path))
    got = dict(zip(names, run_plugins(model, {"pixel_values": PIXELS}), strict=True))
    for output in names:
        if expected[output].dtype == np.int64:
            np.testing.assert_array_equal(got[output], expected[output])
    assert relative_error(got["features"], expected["features"]) <= 1e-5
    assert relative_error(got["image_embeds"], expected["image_embeds"]) <= 1e-5


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_node_becomes_plugins_and_no_function_is_left(name: str, weights: Weights, tmp_path: Path) -> None:
    before = export(weights, tmp_path / "vision.onnx", name)
    count, content = len(scored(before)), before.SerializeToString()
    model = plugin_model(before, tmp_path)
    masked, by = name.startswith("masked"), {"cls": (0, 0), "no-strength": (1, 0), "masked-no-semantic": (0, 1)}
    combine = "FlowScoreCombineMasked" if masked else "FlowScoreCombine"
    assert [node.op_type for node in scored(model)] == ["FlowScoreLogits", combine] * count
    assert not model.functions
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 24, "flowcut": 1}
    assert before.SerializeToString() == content, "the caller's model is not touched"
    for i, (first, second) in enumerate(zip(scored(model)[::2], scored(model)[1::2], strict=True)):
        assert attributes(first) == ALWAYS | {
            **{"logit_scale": np.float32(SIZE**-0.5), "semantic_scale": 1.0, "group": 1, "token_major": 1}
        }
        semantic, strengthened = by.get(name, (1, 1))
        history = 0.5 if i and name != "cls" else 0.0
        options = {"history": history, "group": 1, "source_in_keys": 1}
        assert attributes(second) == ALWAYS | options | {"semantic": semantic, "strengthened": strengthened}


def test_the_projections_are_read_as_they_are(weights: Weights, tmp_path: Path) -> None:
    """No Gather of a row, no Transpose between a projection and its plugin; attention keeps its own three."""
    before = export(weights, tmp_path / "vision.onnx", "static")
    model = plugin_model(before, tmp_path)
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in scored(model)[::2]:
        q, v_source, k, v = node.input
        assert [producers[x].op_type for x in (q, k, v)] == ["Reshape"] * 3
        assert v_source == v
        assert len({q, k, v}) == 3
    count = len(scored(before))
    kinds = [[node.op_type for node in graph.node].count("Transpose") for graph in (before.graph, model.graph)]
    assert kinds[0] == kinds[1]
    gathers = [[node.op_type for node in graph.node].count("Gather") for graph in (before.graph, model.graph)]
    assert gathers[1] == gathers[0] - 2 * count
    used = {name for node in model.graph.node for name in node.input} | {output.name for output in model.graph.output}
    assert all(used.intersection(node.output) for node in model.graph.node)


def test_weights_stay_where_they_were_and_unused_ones_go(weights: Weights, tmp_path: Path) -> None:
    before = export(weights, tmp_path / "vision.onnx", "static", "fp16")
    model = plugin_model(before, tmp_path)
    old, new = ({tensor.name: tensor for tensor in graph.initializer} for graph in (before.graph, model.graph))
    rows = {node.input[4] for node in scored(before)}
    assert old.keys() - new.keys() == rows
    assert all(tensor == old[name] for name, tensor in new.items())
    external = [t for t in new.values() if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} == {
        "vision.onnx.data"
    }
    assert {p.key: p.value for p in model.metadata_props} == {"made": "here"}
    path = tmp_path / "plugins.onnx"
    onnx.save_model(model, path)
    onnx.checker.check_model(path)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_variants_are_the_kernels_that_the_graph_needs(precision: str, weights: Weights, tmp_path: Path) -> None:
    static = export(weights, tmp_path / "static.onnx", "static", precision)
    masked = export(weights, tmp_path / "masked.onnx", "masked", precision)
    logits = Variant(LOGITS, precision, SIZE)
    assert plugin_variants(static) == {logits, Variant(COMBINE)}
    assert plugin_variants(masked) == {logits, Variant(COMBINE_MASKED)}
    assert plugin_variants(plugin_graph_without_scoring()) == set()


def plugin_graph_without_scoring() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    return helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y]))


# One node


def one_node(
    form: Form,
    group: int = 1,
    dtype: str = "float32",
    size: int = SIZE,
    keys: int = 11,
    source_in_keys: bool = True,
    history: float = 0.0,
    **how: Any,
) -> onnx.ModelProto:
    """q, v [B, ..] -> FlowScore. how: transposed inputs ("q", "k", "v"), `gathered` row (None: rows are inputs)."""
    transposed, gathered = how.get("transposed", ""), how.get("gathered")

    def tokens(name: str, rows: int, per: int = 1) -> tuple[str, tuple[Any, ...]]:
        return name, ("b", rows, HEADS, size) if name in transposed else ("b", HEADS, rows * per, size)

    q_rows, v_rows = (group, 1) if gathered is None else (keys, keys)
    shapes = dict([tokens("q", q_rows), tokens("k", keys), tokens("v", keys)])
    if gathered is None:
        shapes["v_row"] = ("b", HEADS, v_rows, size)
    inputs = [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]
    score = ("b", keys - source_in_keys)
    inputs.append(TensorSpec("running", "float32", score))
    outputs = [TensorSpec("running_out", "float32", score)]
    if form.masked:
        inputs.append(TensorSpec("key_valid", "bool", ("b", 1, 1, keys)))
        outputs.append(TensorSpec("entropy_ratio", "float32", ("b", 1)))
    contract = GraphContract("one", tuple(inputs), tuple(outputs))
    b = GraphBuilder("one")
    x = {spec.name: b.input(spec) for spec in inputs}
    for name in transposed:
        x[name] = b.op("Transpose", x[name], perm=how.get("perm", [0, 2, 1, 3]))
    row = None if gathered is None else b.const(gathered, "int64")
    q_row, v_row = (x["q"], x["v_row"]) if row is None else (b.op("Gather", x[n], row, axis=2) for n in "qv")
    got = flow_score(
        b,
        form,
        Source(q_row, v_row, x["k"], x["v"], keys),
        logit_scale=0.25,
        semantic_scale=0.5,
        source_in_keys=source_in_keys,
        running=x["running"],
        history=history,
        key_valid=x.get("key_valid"),
    )
    named = {spec.name: value for spec, value in zip(outputs, got, strict=False) if value is not None}
    return ir.to_proto(b.model(contract, named, {}, [flow_score_function(form)]))


def random_feed(model: onnx.ModelProto, batch: int = 2) -> dict[str, Array]:
    rng, feed = np.random.default_rng(0), {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or batch for dim in kind.shape.dim]
        if kind.elem_type == onnx.TensorProto.BOOL:
            feed[value.name] = rng.random(shape) < 0.7
            feed[value.name][..., :2] = True
        else:
            feed[value.name] = rng.standard_normal(shape, np.float32)
    return feed


@pytest.mark.parametrize(
    ("form", "how", "token_major"),
    [
        (Form(), {}, 0),
        (Form(), {"gathered": [0]}, 0),
        (Form(), {"gathered": [3]}, 0),
        (Form(), {"gathered": [0], "transposed": "qkv"}, 1),
        (Form(), {"gathered": [3], "transposed": "qkv"}, 0),
        (Form(), {"gathered": [0], "transposed": "kv"}, 0),
        (Form(), {"gathered": [0], "transposed": "qv", "history": 0.25}, 0),
        (Form(masked=True), {"gathered": [0], "transposed": "qkv", "history": 0.5}, 1),
        (Form(masked=True, strength=False), {"source_in_keys": False}, 0),
        (Form(semantic=False), {"source_in_keys": False, "history": 0.5}, 0),
        (Form(grouped=True), {"group": 3}, 0),
        (Form(grouped=True), {"group": 2, "transposed": "kv"}, 0),
        (Form(grouped=True, masked=True), {"group": 3, "source_in_keys": False, "keys": 70}, 0),
        (Form(grouped=True, masked=True, semantic=False, strength=False), {"group": 2}, 0),
        (Form(grouped=True), {"group": 1}, 0),
    ],
    ids=str,
)
def test_one_node_computes_the_same(form: Form, how: dict[str, Any], token_major: int, tmp_path: Path) -> None:
    before = one_node(form, **how)
    onnx.checker.check_model(before, full_check=True)
    model, feed = plugin_model(before, tmp_path), random_feed(before)
    session = ort.InferenceSession(before.SerializeToString(), providers=["CPUExecutionProvider"])
    for got, expected in zip(run_plugins(model, feed), session.run(None, feed), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    logits, combine = scored(model)
    assert attributes(logits)["token_major"] == token_major
    assert attributes(logits)["group"] == attributes(combine)["group"] == how.get("group", 1)
    assert attributes(combine)["source_in_keys"] == how.get("source_in_keys", True)


def test_a_transpose_of_other_axes_stays(tmp_path: Path) -> None:
    before = one_node(Form(), gathered=[0], transposed="qkv", keys=HEADS, perm=[0, 2, 1, 3])
    for node in before.graph.node:
        if node.op_type == "Transpose":
            node.attribute[0].ints[:] = [0, 1, 2, 3]
    logits, _ = scored(plugin_model(before, tmp_path))
    assert attributes(logits)["token_major"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precisions_are_seen_in_the_graph(dtype: str, tmp_path: Path) -> None:
    logits = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    assert plugin_variants(one_node(Form(), dtype=dtype)) == {Variant(LOGITS, logits, SIZE), Variant(COMBINE)}
    assert len(scored(plugin_model(one_node(Form(), dtype=dtype), tmp_path))) == 2


# What the plugins cannot compute


def changed(model: onnx.ModelProto, **attributes: Any) -> onnx.ModelProto:
    """With other attributes of the FlowScore node; None takes one away."""
    (node,) = scored(model)
    kept = [a for a in node.attribute if a.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)
    return model


def with_rows(rows: Array | None) -> onnx.ModelProto:
    model = one_node(Form())
    (node,) = scored(model)
    if rows is None:
        model.graph.input.append(helper.make_tensor_value_info("chosen", onnx.TensorProto.INT64, [10]))
    else:
        model.graph.initializer.append(onnx.numpy_helper.from_array(rows, "chosen"))
    node.input[4] = "chosen"
    return model


def with_op_type(name: str) -> onnx.ModelProto:
    model = one_node(Form())
    scored(model)[0].op_type = name
    return model


def with_mixed_types() -> onnx.ModelProto:
    model = one_node(Form())
    model.graph.input[2].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return model


def with_doubles() -> onnx.ModelProto:
    model = one_node(Form())
    for value in model.graph.input:
        if value.name != "running":
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return model


def with_open_dimension(name: str, axis: int) -> onnx.ModelProto:
    model = one_node(Form(grouped=True), group=2)
    value = next(value for value in model.graph.input if value.name == name)
    value.type.tensor_type.shape.dim[axis].dim_param = "open"
    return model


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: one_node(Form(), size=16), r"head_size must be a multiple of 8 from 32 to 128 .* got 16\."),
        (lambda: one_node(Form(), size=160), "head_size must be .* got 160"),
        (
            with_doubles,
            "dtype must be one of fp16, bf16, fp32 for FlowScore, got 'double'",
        ),
        (with_mixed_types, "must be of one type, got FLOAT, FLOAT, FLOAT, FLOAT16"),
        (lambda: with_rows(np.array([2, 5, 7])), "rows must be all numbers from 1 to 10 for .*, got 3 numbers"),
        (lambda: with_rows(np.arange(11)), "rows must be all numbers from 1 to 10 for .*, got 11 numbers"),
        (lambda: with_rows(np.arange(1, 11)[::-1].copy()), "rows must be all numbers from 1 to 10"),
        (lambda: with_rows(None), "rows must be all numbers from 1 to 10 for TensorRT's plugin, got no constant"),
        (lambda: changed(one_node(Form()), source_in_keys=0), "rows must be all numbers from 0 to 10"),
        (lambda: changed(one_node(Form()), source_in_keys=2), "source_in_keys must be 0 or 1, got 2"),
        (
            lambda: changed(one_node(Form()), source_in_keys=None),
            "source_in_keys must be given.* Export the graph again",
        ),
        (lambda: changed(one_node(Form()), logit_scale=None), "logit_scale must be given"),
        (lambda: with_op_type("FlowScoreTwice"), "op_type must be a form of FlowScore, got 'FlowScoreTwice'"),
        (lambda: with_open_dimension("q", 2), r"q_row must be \[batch, heads, rows, size\] with dimension 2 fixed"),
        (lambda: with_open_dimension("k", 3), "k must be .* with dimension 3 fixed"),
        (lambda: with_open_dimension("k", 2), "k must be .* with dimension 2 fixed"),
    ],
)
def test_what_the_plugins_cannot_compute_is_refused(model: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=says) as error:
        plugin_model(model(), tmp_path)
    assert "FlowScore" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_running_score_that_would_be_broadcast_is_refused(tmp_path: Path) -> None:
    model = one_node(Form(), history=0.5)
    next(v for v in model.graph.input if v.name == "running").type.tensor_type.shape.dim[1].dim_value = 1
    with pytest.raises(EngineError, match=r"running must be \[batch, 10\] where history is 0\.5, got \[None, 1\]"):
        plugin_model(model, tmp_path)
    assert len(scored(plugin_model(changed(model, history=0.0), tmp_path))) == 2


@pytest.mark.parametrize("name", ["running", "key_valid"])
def test_one_row_for_all_images_is_refused(name: str, tmp_path: Path) -> None:
    """ONNX Runtime would broadcast it; the kernel would read past its end."""
    model = one_node(Form(masked=True), history=0.5)
    next(v for v in model.graph.input if v.name == name).type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(EngineError, match=rf"{name} must have a row for each of any number of images, got \[1, "):
        plugin_model(model, tmp_path)
    for value in model.graph.input:  # one image is all there is
        value.type.tensor_type.shape.dim[0].dim_value = 1
    plugin_model(model, tmp_path)


@pytest.mark.parametrize("size", [None, 10], ids=["missing", "truncated"])
def test_constants_that_are_not_there_are_refused(size: int | None, weights: Weights, tmp_path: Path) -> None:
    model = export(weights, tmp_path / "vision.onnx", "static")
    data = tmp_path / "vision.onnx.data"
    data.unlink() if size is None else data.write_bytes(data.read_bytes()[:size])
    with pytest.raises(EngineError, match=r"weights must hold the constant .*Export the graph again\."):
        plugin_model(model, tmp_path)
