"""Operations counted from graphs: against sums by hand, a closed form of llava-tiny, and calib's formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from calib.flops import flops as tower_flops
from engines.flops import Flops, count, count_model
from export.builder import save
from export.language import language_model
from export.vision import vision_model
from flowcut.aliases import Model, resolve
from flowcut.contract import Limits, language_contract, vision_contract
from flowcut.errors import ConfigError, EngineError
from flowcut.schedule import Schedule, make_schedule


def graph(signature: str, body: str, functions: str = "", imports: str = "", **weights: np.ndarray) -> ir.Model:
    """A model in ONNX's text form, opset 24, with weights by name."""
    text = f'<ir_version: 11, opset_import: ["" : 24{imports}]> g {signature} {{ {body} }} {functions}'
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(model)


def weight(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def groups(found: Flops) -> tuple[int, ...]:
    return tuple(found.by_group[name] for name in ("linear", "attention", "scoring", "rest"))


@pytest.fixture(scope="module")
def tiny() -> Model:
    return resolve("llava-tiny")


def vision(model: Model, schedule: Schedule, precision: str = "fp32") -> ir.Model:
    contract = vision_contract(model.config, schedule.tokens, precision, Limits())
    return vision_model(model.weights, contract, schedule, precision, {})


# --- one op at a time ---


def test_a_product_with_weights_is_two_per_multiply_add() -> None:
    one = graph("(float[b, 5, 3] x) => (float[b, 5, 7] y)", "y = MatMul(x, w)", w=weight(3, 7))
    assert groups(count_model(one, {"b": 2})) == (2 * 2 * 5 * 3 * 7, 0, 0, 0)


def test_weights_may_be_quantized_and_cost_nothing_to_widen() -> None:
    signature = "(float16[b, 4] x) => (float16[b, 6] y)"
    body = "d = DequantizeLinear<axis=1>(w, s) y = MatMul(x, d)"
    one = graph(signature, body, w=weight(4, 6, dtype="int8"), s=weight(6, dtype="float16"))
    found = count_model(one, {"b": 3})
    assert groups(found) == (2 * 3 * 4 * 6, 0, 0, 0)
    assert found.by_op == {"MatMul": 144}


def test_a_product_of_two_activations_is_attention() -> None:
    one = graph(
        "(float[2, 3, n, 4] x) => (float[2, 3, n, n] y)", "t = Transpose<perm=[0, 1, 3, 2]>(x) y = MatMul(x, t)"
    )
    assert groups(count_model(one, {"n": 5})) == (0, 2 * 2 * 3 * 5 * 5 * 4, 0, 0)


@pytest.mark.parametrize("across", [0, 1])
def test_gemm_adds_its_bias(across: int) -> None:
    shape = "[3, b]" if across else "[b, 3]"
    body = f"y = Gemm<transA={across}>(x, w, c)"
    one = graph(f"(float{shape} x) => (float[b, 7] y)", body, w=weight(3, 7), c=weight(7))
    assert groups(count_model(one, {"b": 2})) == (2 * 2 * 3 * 7 + 2 * 7, 0, 0, 0)


def test_a_convolution_counts_its_kernel_at_every_place() -> None:
    body = "y = Conv<strides=[2, 2], group=2>(x, w)"
    one = graph("(float[b, 4, 8, 8] x) => (float[b, 6, p, p] y)", body, w=weight(6, 2, 2, 2))
    assert groups(count_model(one, {"b": 3})) == (2 * (3 * 6 * 4 * 4) * (2 * 2 * 2), 0, 0, 0)


def test_attention_is_two_products_over_all_keys_or_the_earlier_half() -> None:
    signature = "(float[b, 4, s, 8] q, float[b, 2, c, 8] k, float[b, 2, c, 16] v) => (float[b, 4, s, 16] y)"
    one, sizes = graph(signature, "y = Attention(q, k, v)"), {"b": 2, "s": 5, "c": 9}
    assert groups(count_model(one, sizes)) == (0, 2 * 2 * 4 * 5 * 9 * (8 + 16), 0, 0)
    pairs = 1 + 2 + 3 + 4 + 5
    assert groups(count_model(one, sizes, causal=True)) == (0, 2 * 2 * 4 * pairs * (8 + 16), 0, 0)
    step = {**sizes, "s": 1}
    assert count_model(one, step, causal=True) == count_model(one, step), "one query sees the whole cache"


def test_attention_of_flat_heads_with_past_keys() -> None:
    signature = "(float[b, s, 32] q, float[b, s, 16] k, float[b, 2, p, 8] pk, float[b, 2, p, 8] pv)"
    signature += " => (float[b, s, 32] y, float[b, 2, t, 8] ok, float[b, 2, t, 8] ov)"
    one = graph(signature, "y, ok, ov = Attention<q_num_heads=4, kv_num_heads=2>(q, k, k, , pk, pv)")
    assert groups(count_model(one, {"b": 2, "s": 3, "p": 7})) == (0, 2 * 2 * (4 * 3) * (7 + 3) * (8 + 8), 0, 0)


def test_other_arithmetic_is_one_per_element_and_moving_is_free() -> None:
    signature = "(float[b, 6] x) => (float[3, b, 2] y)"
    body = "a = Add(x, w) e = Exp(a) m = ReduceMax<keepdims=1>(e) d = Sub(e, m) r = Reshape(d, s) y = Identity(r)"
    one = graph(signature, body, w=weight(6), s=np.array([3, -1, 2]))
    found = count_model(one, {"b": 4})
    assert groups(found) == (0, 0, 0, 4 * 24), "a reduction reads all elements, a bias is spread over all"
    assert found.by_op == {"Add": 24, "Exp": 24, "ReduceMax": 24, "Sub": 24}


def test_what_depends_on_no_input_is_free() -> None:
    body = "p = MatMul(u, w) q = Exp(p) y = MatMul(x, q)"
    one = graph("(float[b, 3] x) => (float[b, 3] y)", body, u=weight(3, 9), w=weight(9, 3))
    assert groups(count_model(one, {"b": 1})) == (2 * 3 * 3, 0, 0, 0)


def test_functions_are_counted_where_they_are_called_and_flowcuts_are_scoring() -> None:
    body = "a = flowcut.Twice(x) y = other.Twice(a)"
    functions = "".join(
        f'<domain: "{domain}", opset_import: ["" : 24]> Twice (x) => (y) {{ t = Transpose(x) y = MatMul(t, x) }} '
        for domain in ("flowcut", "other")
    )
    one = graph("(float[n, n] x) => (float[n, n] y)", body, functions, ', "flowcut" : 1, "other" : 1')
    assert groups(count_model(one, {"n": 3})) == (0, 2 * 27, 2 * 27, 0)
    assert len(one.functions) == 2, "the model itself is as it was"
    assert str(one.graph.inputs[0].shape) == "[n,n]"


# --- what cannot be counted ---


@pytest.mark.parametrize("sizes", [{}, {"b": 0}, {"b": 2, "c": 3}, {"c": 3}])
def test_sizes_must_be_those_of_the_graph(sizes: dict[str, int]) -> None:
    one = graph("(float[b, 3] x) => (float[b, 3] y)", "y = Exp(x)")
    with pytest.raises(ConfigError, match=r"sizes must give a number of at least 1 for each of b, got \{"):
        count_model(one, sizes)


def test_a_shape_that_depends_on_the_data_is_refused_by_name() -> None:
    one = graph("(float[b, 3] x) => (int64[2, n] y)", "n = NonZero(x) y = Add(n, n)")
    with pytest.raises(EngineError, match=r"shape of 'n' at node \S* \(NonZero\) must follow from the sizes"):
        count_model(one, {"b": 2})


def test_shapes_that_do_not_fit_are_refused_in_one_line() -> None:
    one = graph("(float[b, 3] x) => (float[b, 7] y)", "y = MatMul(x, w)", w=weight(4, 7))
    with pytest.raises(EngineError, match=r"^shapes must fit together in the graph, got: [^\n]*$"):
        count_model(one, {"b": 2})


def test_a_graph_without_one_of_its_tensors_is_refused_in_one_line() -> None:
    one = graph("(float[b, 3] x) => (float[b, 7] y)", "y = MatMul(x, w)")
    with pytest.raises(EngineError, match=r"^graph 'g' must be a valid ONNX graph, got [^\n]*$"):
        count_model(one, {"b": 2})


@pytest.mark.parametrize(
    ("body", "named"), [("y = Einsum<equation='ij->ij'>(x)", "Einsum"), ("y = com.acme.Exp(x)", "com.acme.Exp")]
)
def test_an_unknown_op_is_refused(body: str, named: str) -> None:
    one = graph("(float[b, 3] x) => (float[b, 3] y)", body.replace("'", '"'), imports=', "com.acme" : 1')
    with pytest.raises(EngineError, match=f"must be of an op whose operations are known, got .*{named}"):
        count_model(one, {"b": 2})


def test_not_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match="must be an ONNX file"):
        count(path, {})


# --- whole graphs ---


def test_the_tiny_vision_graph_unpruned(tiny: Model) -> None:
    """Closed form: patch embedding, L-1 layers over N+1 rows, the projector over N rows."""
    v, text, images = tiny.config.vision, tiny.config.text.hidden_size, 3
    n, h = v.patches, v.hidden_size
    found = count_model(vision(tiny, make_schedule("static", v, n)), {"images": images})
    layers, rows = v.num_hidden_layers - 1, n + 1
    linear = 2 * n * h * 3 * v.patch_size**2 + 2 * n * (h * text + text * text)
    linear += layers * 2 * rows * (4 * h * h + 2 * h * v.intermediate_size)
    attention = layers * 4 * rows * rows * h
    assert groups(found)[:3] == (images * linear, images * attention, 0)
    assert 0 < found.by_group["rest"] < 0.02 * found.total


@pytest.mark.parametrize("kind", ["static", "masked"])
@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_the_towers_layers_agree_with_calibs_formula(tiny: Model, tokens: int, kind: str) -> None:
    """calib.flops leaves out what no schedule changes, patch embedding and projector, and scoring."""
    v, text = tiny.config.vision, tiny.config.text.hidden_size
    schedule = make_schedule(kind, v, tokens)
    found = count_model(vision(tiny, schedule), {"images": 1})
    outside = 2 * v.patches * v.hidden_size * 3 * v.patch_size**2 + 2 * tokens * (v.hidden_size * text + text * text)
    assert found.by_group["linear"] + found.by_group["attention"] - outside == tower_flops(v, schedule.counts)
    assert 0 < found.by_group["scoring"] < 0.02 * found.total


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_tiny_language_graph(tiny: Model, precision: str) -> None:
    """Closed form: layers over S rows and C cache rows, and logits of one token a sequence."""
    text, limits, (batch, rows) = tiny.config.text, Limits(4, 4, 50, 14), (3, 40)
    contract = language_contract(tiny.config, 16, precision, limits)
    model = language_model(tiny.weights, contract, precision, {})  # type: ignore[arg-type]
    sizes = {"batch": batch, "sequence": rows, "images": 3}
    h, kv = text.hidden_size, text.num_key_value_heads * text.head_size
    linear = text.num_hidden_layers * 2 * rows * (2 * h * h + 2 * h * kv + 3 * h * text.intermediate_size)
    linear += 2 * h * text.vocab_size
    found = count_model(model, sizes)
    assert groups(found)[:3] == (batch * linear, batch * text.num_hidden_layers * 4 * rows * 64 * h, 0)
    causal = count_model(model, sizes, causal=True)
    assert causal.by_group["attention"] == batch * text.num_hidden_layers * 4 * (rows * (rows + 1) // 2) * h
    assert causal.by_group["linear"] == found.by_group["linear"]


def test_a_file_is_counted_without_its_weights(tiny: Model, tmp_path: Path) -> None:
    model, sizes = vision(tiny, make_schedule("static", tiny.config.vision, 16), "fp16"), {"images": 2}
    before = count_model(model, sizes)
    save(model, tmp_path / "vision.onnx")
    (tmp_path / "vision.onnx.data").unlink()
    assert count(tmp_path / "vision.onnx", sizes) == before
    assert before.total == sum(before.by_op.values())


def test_weights_are_not_drawn_to_be_counted() -> None:
    class Unreadable:
        config, random, sha256 = resolve("llava-1.5-7b", random=True).config, True, ""

        def load(self, name: str) -> None:
            raise AssertionError(name)

    contract = language_contract(Unreadable.config, 64, "int4", Limits(1, 1, 128, 1))
    model = language_model(Unreadable(), contract, "int4", {})  # type: ignore[arg-type]
    found = count_model(model, {"batch": 1, "sequence": 128, "images": 1})
    assert found.by_group["linear"] == pytest.approx(2 * 128 * 6.476e9, rel=1e-3)  # the layers
