"""Floating-point operations of one run, counted from the nodes of an ONNX graph. No weight is read.

    linear      products with a constant operand (MatMul, Gemm, Conv; weights may pass a DequantizeLinear first)
    attention   the two products of every Attention node, and products of two activations
    scoring     whatever happens inside FlowScore's functions
    rest        all other arithmetic, one operation per element of a node's largest input or output

A multiplication and an addition are two. Attention counts every pair of query and key, masked ones too, unless
`causal` is asked for; its softmax is not counted. Moving and converting data costs nothing (Gather, Transpose, Cast),
nor does what depends on no input; choosing (TopK, Where) is in the rest. Functions are inlined, sizes of all tensors
follow from the named dimensions by ONNX's shape inference: a graph whose shapes depend on its data cannot be counted,
and the error names the node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.widen import load_model
from flowcut.deps import require
from flowcut.errors import ConfigError, EngineError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

GROUPS = ("linear", "attention", "scoring", "rest")
GATHERING = ("Gather", "GatherElements", "GatherND")
"""Read of a table the rows that are asked for."""
VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Give a tensor another shape and move nothing."""
Shape = tuple[int, ...]
_SCORING = "flowcut"  # domain of FlowScore's functions
_DOMAIN = "flops.domain"
_STANDARD = ("", "ai.onnx")
_PRODUCTS = ("MatMul", "MatMulInteger", "QLinearMatMul")
_FREE = {
    *("Cast", "CastLike", "Compress", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Expand", "EyeLike"),
    *("Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Range", "Reshape", "Scatter"),
    *("ScatterElements", "ScatterND", "Shape", "Size", "Slice", "SpaceToDepth", "Split", "Squeeze", "TensorScatter"),
    *("Tile", "Transpose", "Unsqueeze"),
}
_UNKNOWN = {
    *("ConvInteger", "ConvTranspose", "DFT", "DeformConv", "Einsum", "FlexAttention", "GRU", "If", "LSTM", "Loop"),
    *("QLinearConv", "RNN", "STFT", "Scan"),
}
"""Whose operations are not one per element, and which no graph here has."""
_KEPT = 1024
"""Whole numbers of at most so many elements, which may be shapes or axes, keep their values for shape inference."""


@dataclass(frozen=True)
class Flops:
    """Operations of one run, by group (GROUPS) and by op type; what costs nothing is left out of `by_op`."""

    by_group: Mapping[str, int]
    by_op: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_group.values())


def count(path: Path, sizes: Mapping[str, int], *, causal: bool = False) -> Flops:
    """Count the graph in a file; its external data need not exist.

    Args:
        sizes: of every named dimension of the inputs.
        causal: count a query's own and earlier keys alone where Attention has several queries, as if all began at
            position 0: what a kernel that skips masked pairs computes of a prefill.

    Raises:
        ConfigError: sizes that are missing, not the graph's, or below 1.
        EngineError: not an ONNX file, a shape that does not follow from the sizes, or an op that is not known here.
        FlowCutError: onnx or onnx_ir is not installed.
    """
    return count_model(load_model(path), sizes, causal=causal)


def count_model(model: ir.Model, sizes: Mapping[str, int], *, causal: bool = False) -> Flops:
    """`count` of a model in memory, which is not changed; weights that load when saved are not loaded."""
    groups, ops = dict.fromkeys(GROUPS, 0), dict[str, int]()
    for each in counted_nodes(flat_graph(model, sizes), causal=causal):
        if each.group is None:
            continue
        groups[each.group] += each.flops
        if each.flops:
            ops[each.node.op_type] = ops.get(each.node.op_type, 0) + each.flops
    return Flops(groups, dict(sorted(ops.items())))


@dataclass(frozen=True)
class FlatGraph:
    """A graph without functions and weights, all of whose sizes are known.

    Attributes:
        shapes: of every value whose shape follows from the sizes; types: ONNX's numbers of their elements' types.
    """

    graph: ir.Graph
    shapes: Mapping[str, Shape]
    types: Mapping[str, int]

    def bytes_of(self, name: str) -> int:
        """Of a whole value, as it is stored: int4 two to a byte.

        Raises:
            EngineError: its shape does not follow from the sizes.
        """
        if name not in self.shapes:
            raise EngineError(f"shape of {name!r} must follow from the sizes of the inputs' dimensions, got none.")
        bits: int = require("onnx_ir", extra="export").DataType(self.types[name]).bitwidth
        return -(-prod(self.shapes[name]) * bits // 8)


@dataclass(frozen=True)
class CountedNode:
    """One node, in the graph's order. `group` is one of GROUPS, None for a node that depends on no input."""

    node: ir.Node
    group: str | None
    flops: int


def flat_graph(model: ir.Model, sizes: Mapping[str, int]) -> FlatGraph:
    """Inline and infer a model, which is not changed. See `count` for the sizes and what is raised."""
    flat = _inlined(model)
    _set_sizes(flat, sizes)
    return FlatGraph(flat.graph, *_inferred(flat))


def counted_nodes(flat: FlatGraph, *, causal: bool = False) -> Iterator[CountedNode]:
    """Every node with its operations."""
    return _Counter(flat.shapes, causal).run(flat.graph)


def named_dims(model: ir.Model) -> set[str]:
    """The named dimensions of a model's inputs."""
    return {str(dim.value) for dim in _dims(model) if not isinstance(dim, int)}


class _Counter:
    """Counts a graph's nodes. Constants are values that depend on no input."""

    def __init__(self, shapes: Mapping[str, Shape], causal: bool) -> None:
        self._shapes, self._causal = shapes, causal
        self._constants = set[str]()

    def run(self, graph: ir.Graph) -> Iterator[CountedNode]:
        self._constants = {str(name) for name in graph.initializers}
        for node in graph:
            known = all(value.name in self._constants for value in _present(node.inputs))
            if known and node.op_type not in _UNKNOWN:  # some have graphs of their own, which see other values
                self._constants |= {str(value.name) for value in node.outputs}
                yield CountedNode(node, None, 0)
                continue
            group, flops = self._node(node)
            yield CountedNode(node, "scoring" if node.metadata_props.get(_DOMAIN) == _SCORING else group, flops)

    def _node(self, node: ir.Node) -> tuple[str, int]:
        """Group and operations."""
        if node.domain not in _STANDARD or node.op_type in _UNKNOWN:
            raise EngineError(
                f"node {node.name} must be of an op whose operations are known, got {node.domain or 'ai.onnx'}."
                f"{node.op_type}. engines/flops.py says which are."
            )
        if node.op_type in _FREE:
            return "rest", 0
        if node.op_type == "Attention":
            return "attention", self._attention(node)
        if node.op_type in (*_PRODUCTS, "Gemm", "Conv"):
            return self._product(node)
        sizes = [prod(self._shape(node, value)) for value in (*_present(node.inputs), *_present(node.outputs))]
        return "rest", max(sizes)

    def _product(self, node: ir.Node) -> tuple[str, int]:
        """2 m n k, and one per element for a bias that the node adds itself."""
        out = prod(self._shape(node, node.outputs[0]))
        right = 3 if node.op_type == "QLinearMatMul" else 1
        operands = [node.inputs[0], node.inputs[right]]
        if node.op_type == "Conv":
            depth = prod(self._shape(node, operands[1])[1:])  # channels of a group, times the kernel's places
        else:
            across = node.op_type == "Gemm" and _attribute(node, "transA", 0)
            depth = self._shape(node, operands[0])[-2 if across else -1]
        biased = node.op_type in ("Gemm", "Conv") and len(node.inputs) > 2 and node.inputs[2] is not None
        constant = any(value is not None and value.name in self._constants for value in operands)
        return "linear" if constant else "attention", 2 * out * depth + out * biased

    def _attention(self, node: ir.Node) -> int:
        """q [B, H, S, d], k and v [B, Hkv, R, d], or [B, S, H*d] with the numbers of heads as attributes."""
        q, k, v = (self._shape(node, value) for value in node.inputs[:3])
        keys, past = k[-2], node.inputs[4] if len(node.inputs) > 4 else None
        if past is not None:
            keys += self._shape(node, past)[-2]
        if len(q) == 3:
            heads, kv_heads = (int(_attribute(node, f"{side}_num_heads", 1)) for side in ("q", "kv"))
            queries, size, v_size = heads * q[1], q[2] // heads, v[2] // kv_heads
        else:
            queries, size, v_size = q[1] * q[2], q[3], v[3]
        seen: float = (q[-2] + 1) / 2 if self._causal and q[-2] > 1 else keys
        return round(2 * q[0] * queries * seen * (size + v_size))

    def _shape(self, node: ir.Node, value: ir.Value | None) -> Shape:
        name = "" if value is None else str(value.name)
        if name not in self._shapes:
            raise EngineError(
                f"shape of {name!r} at node {node.name} ({node.op_type}) must follow from the sizes of the inputs' "
                "dimensions, got one that does not. A graph whose shapes depend on its data cannot be counted."
            )
        return self._shapes[name]


def _present(values: Any) -> Iterator[ir.Value]:
    return (value for value in values if value is not None)


def _attribute(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def _inlined(model: ir.Model) -> ir.Model:
    """A copy without weights or functions; nodes that come of one remember its domain."""
    require("onnx", extra="export")
    ir = require("onnx_ir", extra="export")
    passes = require("onnx_ir.passes.common", extra="export")
    copy, whole = _copied(model), (ir.DataType.INT32, ir.DataType.INT64)
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and (tensor.size > _KEPT or tensor.dtype not in whole):
            value.const_value = ir.ExternalTensor("-", 0, 0, tensor.dtype, shape=tensor.shape, name=value.name)
    for function in copy.functions.values():
        for node in function:
            node.metadata_props[_DOMAIN] = function.domain
    passes.InlinePass()(copy)
    return copy


def _copied(model: ir.Model) -> ir.Model:
    try:
        return model.clone()
    except RuntimeError:  # its message is the graph itself
        raise EngineError(
            f"graph {model.graph.name!r} must be a valid ONNX graph, got one with an input of a node made by none."
        ) from None


def _set_sizes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Replace the named dimensions of the inputs."""
    named = named_dims(model)
    if named != sizes.keys() or any(size < 1 for size in sizes.values()):
        raise ConfigError(
            f"sizes must give a number of at least 1 for each of {', '.join(sorted(named)) or 'no dimension'}, "
            f"got {dict(sizes)!r}."
        )
    for value in model.graph.inputs:
        if value.shape is not None:
            for axis, dim in enumerate(value.shape):
                value.shape[axis] = dim if isinstance(dim, int) else sizes[str(dim.value)]


def _dims(model: ir.Model) -> Iterator[Any]:
    for value in model.graph.inputs:
        if value.shape is not None and not value.is_initializer():
            yield from value.shape


def _inferred(model: ir.Model) -> tuple[dict[str, Shape], dict[str, int]]:
    """Shapes and element types of all values whose shapes are known."""
    ir, onnx = require("onnx_ir", extra="export"), require("onnx", extra="export")
    try:
        inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise EngineError(f"shapes must fit together in the graph, got: {' '.join(str(error).split())}.") from None
    infos = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    shapes = {info.name: shape for info in infos if (shape := _static(info)) is not None}
    types = {info.name: info.type.tensor_type.elem_type for info in infos if info.name in shapes}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in inferred.graph.initializer}
    types |= {tensor.name: tensor.data_type for tensor in inferred.graph.initializer}
    return shapes, types


def _static(info: onnx.ValueInfoProto) -> Shape | None:
    kind = info.type.tensor_type
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return tuple(dim.dim_value for dim in kind.shape.dim)
