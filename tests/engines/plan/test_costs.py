"""Bytes and operations of single nodes, each against a sum by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from engines.flops import GROUPS, count_model
from engines.plan.costs import Cost, NodeCost, count_cost, together
from engines.plan.roof import Roof


def graph(signature: str, body: str, **weights: np.ndarray | onnx.TensorProto) -> ir.Model:
    """A model in ONNX's text form, opset 24, with weights by name."""
    model = parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]> g {signature} {{ {body} }}')
    for name, value in weights.items():
        tensor = numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        tensor.name = name
        model.graph.initializer.append(tensor)
    return dotted(ir.from_proto(model))


def dotted(model: ir.Model) -> ir.Model:
    """The contract's names of caches, whose dots the text form does not know: past_0_key is past.0.key."""
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    for value in values:
        if str(value.name).startswith(("past_", "present_")):
            value.name = str(value.name).replace("_", ".")
    return model


def weight(*shape: int, dtype: str = "float16") -> np.ndarray:
    return np.zeros(shape, dtype)


def int4(*shape: int) -> onnx.TensorProto:
    packed = bytes(-(-int(np.prod(shape)) // 2))
    return helper.make_tensor("w", TensorProto.INT4, shape, packed, raw=True)


def sizes(cost: Cost) -> tuple[int, int, int, int]:
    return cost.weight_bytes, cost.state_bytes, cost.io_bytes, cost.activation_bytes


def test_a_weight_is_its_stored_bytes_and_inputs_and_outputs_are_io() -> None:
    one = graph("(float16[b, 3] x) => (float16[b, 7] y)", "y = MatMul(x, w)", w=weight(3, 7))
    found = count_cost(one, {"b": 2})
    assert sizes(found) == (2 * 21, 0, 2 * (2 * 3 + 2 * 7), 0)
    assert found.bytes == 42 + 40
    assert found.flops == found.least_flops == 2 * 2 * 3 * 7


def test_int4_is_two_to_a_byte_with_its_scales() -> None:
    body = "d = DequantizeLinear<axis=0, block_size=4>(w, s) y = MatMul(x, d)"
    one = graph("(float16[b, 8] x) => (float16[b, 5] y)", body, w=int4(8, 5), s=weight(2, 5))
    assert count_cost(one, {"b": 1}).weight_bytes == 8 * 5 // 2 + 2 * 2 * 5


def test_an_odd_number_of_nibbles_takes_the_last_byte_whole() -> None:
    body = "d = DequantizeLinear(w, s) y = MatMul(x, d)"
    one = graph("(float16[b, 3] x) => (float16[b, 5] y)", body, w=int4(3, 5), s=weight())
    assert count_cost(one, {"b": 1}).weight_bytes == 8 + 2


def test_a_weight_that_two_nodes_read_passes_once() -> None:
    one = graph("(float16[b, 3] x) => (float16[b, 3] y)", "a = MatMul(x, w) y = MatMul(a, w)", w=weight(3, 3))
    found = count_cost(one, {"b": 2})
    assert found.weight_bytes == 18
    assert [node.weight_bytes for node in found.nodes] == [18, 0]


def test_of_a_table_the_rows_that_are_read() -> None:
    one = graph("(int64[b, s] i) => (float16[b, s, 6] y)", "y = Gather(t, i)", t=weight(1000, 6))
    assert count_cost(one, {"b": 2, "s": 3}).weight_bytes == 2 * 2 * 3 * 6
    few = graph("(int64[b, s] i) => (float16[b, s, 6] y)", "y = Gather(t, i)", t=weight(4, 6))
    assert count_cost(few, {"b": 2, "s": 3}).weight_bytes == 2 * 4 * 6, "never more than there is"


def test_a_table_that_is_gathered_from_and_multiplied_by_is_whole() -> None:
    body = "e = Gather(t, i) y = Gemm<transB=1>(e, t)"
    one = graph("(int64[s] i) => (float16[s, 50] y)", body, t=weight(50, 6))
    found = count_cost(one, {"s": 3})
    assert [node.weight_bytes for node in found.nodes] == [2 * 3 * 6, 2 * (50 - 3) * 6]


def test_of_rotary_angles_the_rows_that_are_read() -> None:
    signature = "(float16[b, 2, s, 8] x, int64[b, s] p) => (float16[b, 2, s, 8] y)"
    one = graph(signature, "y = RotaryEmbedding(x, c, z, p)", c=weight(99, 4), z=weight(99, 4))
    assert count_cost(one, {"b": 2, "s": 3}).weight_bytes == 2 * (2 * (2 * 3) * 4)


def test_activations_are_written_once_and_read_by_each_who_takes_them() -> None:
    body = "a = Exp(x) c = Mul(a, a) r = Reshape(c, s) d = Add(r, a) y = Exp(d)"
    one = graph("(float[b, 6] x) => (float[b, 6] y)", body, s=np.array([-1, 6]))
    tensor = 4 * 2 * 6
    # Exp writes; Mul reads one, writes; Reshape nothing; Add reads two, writes; Exp reads.
    assert count_cost(one, {"b": 2}).activation_bytes == (1 + 2 + 0 + 3 + 1) * tensor


def test_what_tells_a_size_reads_nothing_and_constants_cost_no_activation() -> None:
    body = "n = Shape<start=0, end=1>(x) m = Concat<axis=0>(n, k) y = Expand(t, m)"
    one = graph("(float[b, 99] x) => (float[b, 5] y)", body, t=weight(1, 5, dtype="float32"), k=np.array([5]))
    found = count_cost(one, {"b": 3})
    assert sizes(found) == (4 * 5 + 8, 0, 4 * 3 * 5, 8 + 16 + 16)
    assert [node.moves for node in found.nodes] == [False, True, True]


CACHED = (
    "(float16[b, 4, s, 8] q, float16[b, 2, s, 8] k, float16[b, 2, s, 8] v, float16[b, 2, 20, 8] past_0_key, "
    "float16[b, 2, 20, 8] past_0_value, int64[b] row, bool[b, 1, s, 20] m) => (float16[b, 4, s, 8] y, "
    "float16[b, 2, 20, 8] present_0_key, float16[b, 2, 20, 8] present_0_value)"
)
SCATTERED = (
    "present_0_key = TensorScatter(past_0_key, k, row) present_0_value = TensorScatter(past_0_value, v, row) "
    "y = Attention(q, present_0_key, present_0_value, m)"
)


@pytest.mark.parametrize(("rows", "past"), [(6, 0), (1, 13), (3, 5)])
def test_the_cache_is_its_rows_in_use(rows: int, past: int) -> None:
    batch = 2
    one = graph(CACHED, SCATTERED)
    known = {"past.0.key": past, "past.0.value": past}
    found = count_cost(one, {"b": batch, "s": rows}, known)
    row = 2 * 2 * (2 * 8)  # keys and values of two heads
    assert found.state_bytes == batch * (past + rows) * row
    assert found.flops == 2 * batch * 4 * rows * 20 * (8 + 8), "as the graph says: all 20 rows"
    pairs = sum(past + own for own in range(1, rows + 1))
    assert found.least_flops == 2 * batch * 4 * pairs * (8 + 8)
    assert found.io_bytes == batch * rows * (2 * 8 * (4 + 2 + 2 + 4) + 20) + 8 * batch, "q, k, v, y; m; row"
    assert {node.group for node in found.nodes} == {"attention"}


def test_attention_without_a_cache_is_not_taken_to_be_causal() -> None:
    one = graph("(float16[b, 4, s, 8] q) => (float16[b, 4, s, 8] y)", "y = Attention(q, q, q)")
    found = count_cost(one, {"b": 1, "s": 5})
    assert found.least_flops == found.flops == 2 * 4 * 5 * 5 * 16


def test_sums_are_those_of_the_nodes_and_of_engines_flops() -> None:
    model, given = graph(CACHED, SCATTERED), {"b": 1, "s": 4}
    found = count_cost(model, given)
    assert found.by_group == count_model(model, given).by_group
    assert tuple(found.by_group) == GROUPS
    for name in ("flops", "least_flops", "weight_bytes", "state_bytes", "io_bytes", "activation_bytes", "bytes"):
        assert getattr(found, name) == sum(getattr(node, name) for node in found.nodes)
    twice = together([found, found])
    assert (twice.flops, twice.bytes, len(twice.nodes)) == (2 * found.flops, 2 * found.bytes, 2 * len(found.nodes))


def test_without_nodes_the_sums_are_one_part() -> None:
    cost = Cost(10, 1, 2, 3, 4, {"linear": 10})
    assert cost.parts == (NodeCost("rest", 10, 10, 1, 2, 3, 4),)
    assert cost.bytes == cost.parts[0].bytes == 6
    assert Roof("r", 1.0, 1.0, "").bound_ms(cost) == pytest.approx(10e3)
