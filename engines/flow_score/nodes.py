"""A graph's FlowScore nodes -> the plugin nodes that TensorRT takes in their place. The ONNX file stays as it is.

    FlowScore(q_row, v_row, k, v, rows, running)
        -> FlowScoreLogits(q, v_source, k, v) -> FlowScoreCombine(logits, strength, running)
    FlowScoreMasked(.., key_valid)
        -> FlowScoreLogits(..) -> FlowScoreCombineMasked(.., key_valid) -> ReduceSum of the entropy's parts

A plugin takes the first rows of q and v for the source's, and all four tensors as the projections leave them. So the
Gathers of those rows, and the Transposes in front, are passed by where the graph has them; what nothing else uses
then goes, as do the functions. Types and sizes are those that ONNX's shape inference finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.flow_score.launch import COMBINE, COMBINE_MASKED, LOGITS, OUTPUTS, Variant
from engines.flow_score.plugin import NAMES, NAMESPACE, VERSION
from flowcut.deps import require
from flowcut.errors import EngineError

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    from export.flow_score import Form

DTYPES = {"FLOAT16": "fp16", "BFLOAT16": "bf16", "FLOAT": "fp32"}
"""launch.DTYPES by ONNX's names."""
HEADS_FIRST = [0, 2, 1, 3]
"""The Transpose from [B, rows, heads, d] to [B, heads, rows, d]."""
ENTROPY_AXES = "flowcut.entropy_axes"


def plugin_model(model: onnx.ModelProto, directory: Path) -> onnx.ModelProto:
    """The same graph with plugin nodes. Weights that lie outside the file stay there.

    Args:
        directory: where the file is, for constants that lie outside it.

    Raises:
        EngineError: a node that the plugins cannot compute.
    """
    ir = require("onnx_ir", extra="export")
    passes = require("onnx_ir.passes.common", extra="export")
    rewritten = _inferred(model)
    ir.external_data.set_base_dir(rewritten.graph, directory)
    for step in _steps(rewritten.graph):
        _check(step)
        _replace(step, rewritten.graph)
    passes.RemoveUnusedNodesPass()(rewritten)
    passes.RemoveUnusedFunctionsPass()(rewritten)
    result: onnx.ModelProto = ir.to_proto(rewritten)
    return result


def plugin_variants(model: onnx.ModelProto) -> set[Variant]:
    """The kernels that the plugins of that graph need; none where nothing is scored.

    Raises:
        EngineError: a type or head size that there is no kernel for.
    """
    return {variant for step in _steps(_inferred(model).graph) for variant in (step.logits, step.combine)}


@dataclass(frozen=True)
class _Step:
    """A FlowScore node. Its errors name it."""

    node: onnx_ir.Node
    form: Form

    @cached_property
    def logits(self) -> Variant:
        kinds = [x.dtype.name if x is not None and x.dtype is not None else "unknown" for x in self.node.inputs[:4]]
        if len(set(kinds)) > 1:
            raise self.error(f"q_row, v_row, k and v must be of one type, got {', '.join(kinds)}.")
        try:
            return Variant(LOGITS, DTYPES.get(kinds[0], kinds[0].lower()), self.size("k", 2, 3))
        except EngineError as error:
            raise self.error(str(error)) from None

    @property
    def combine(self) -> Variant:
        return Variant(COMBINE_MASKED if self.form.masked else COMBINE)

    @cached_property
    def group(self) -> int:
        """Query heads per key head."""
        return self.size("q_row", 0, 2) if self.form.grouped else 1

    def attribute(self, name: str) -> Any:
        if name not in self.node.attributes:
            raise self.error(f"{name} must be given, got no such attribute. Export the graph again.")
        return self.node.attributes[name].value

    def size(self, name: str, index: int, axis: int) -> int:
        """A dimension of input `index` that the kernels need to know."""
        shape = _dims(self.node.inputs[index])
        if len(shape) != 4 or shape[axis] is None:
            raise self.error(f"{name} must be [batch, heads, rows, size] with dimension {axis} fixed, got {shape}.")
        return int(shape[axis] or 0)

    def error(self, text: str) -> EngineError:
        return EngineError(f"{self.node.op_type} {self.node.name}: {text}")


def _inferred(model: onnx.ModelProto) -> onnx_ir.Model:
    infer_shapes = require("onnx.shape_inference", extra="export").infer_shapes
    result: onnx_ir.Model = require("onnx_ir", extra="export").from_proto(infer_shapes(model))
    return result


def _steps(graph: onnx_ir.Graph) -> Iterator[_Step]:
    from export.flow_score import DOMAIN, Form

    for node in [node for node in graph if node.domain == DOMAIN]:
        if (form := Form.named(node.op_type)) is None:
            raise EngineError(f"{node.name}: op_type must be a form of FlowScore, got {node.op_type!r}.")
        yield _Step(node, form)


def _check(step: _Step) -> None:
    """The plugins go by source_in_keys and history where the function's body goes by rows and running."""
    source_in_keys = step.attribute("source_in_keys")
    if source_in_keys not in (0, 1):
        raise step.error(f"source_in_keys must be 0 or 1, got {source_in_keys}.")
    rows = _constant(step.node.inputs[4])
    last = step.size("k", 2, 2) - 1
    if rows is None or rows.tolist() != list(range(source_in_keys, last + 1)):
        got = "no constant" if rows is None else f"{rows.size} numbers"
        raise step.error(f"rows must be all numbers from {source_in_keys} to {last} for TensorRT's plugin, got {got}.")
    _check_broadcast(step, rows.size)


def _check_broadcast(step: _Step, scored: int) -> None:
    """A function's operators would broadcast running and key_valid; the kernels read a row of each for every image."""
    batch = _dims(step.node.inputs[2])[0]
    shapes = dict(zip(("running", "key_valid"), map(_dims, step.node.inputs[5:]), strict=False))
    if (history := step.attribute("history")) == 0:
        del shapes["running"]
    elif len(shapes["running"]) != 2 or shapes["running"][1] not in (scored, None):
        raise step.error(f"running must be [batch, {scored}] where history is {history}, got {shapes['running']}.")
    for name, shape in shapes.items():
        if shape and shape[0] == 1 != batch:
            raise step.error(f"{name} must have a row for each of {batch or 'any number of'} images, got {shape}.")


def _replace(step: _Step, graph: onnx_ir.Graph) -> None:
    """Put plugin nodes in the place of a FlowScore node; its outputs keep their names."""
    ir = require("onnx_ir", extra="export")
    node, name = step.node, step.node.name or step.node.outputs[0].name
    operands, token_major = _operands(step)
    options: dict[str, Any] = {key: step.attribute(key) for key in ("logit_scale", "semantic_scale")}
    options |= {"group": step.group, "token_major": int(token_major)}
    logits = _plugin(f"{name}.logits", step.logits, operands, options)

    options = {key: step.attribute(key) for key in ("history", "source_in_keys")}
    options |= {"group": step.group, "semantic": int(step.form.semantic), "strengthened": int(step.form.strength)}
    combine = _plugin(f"{name}.combine", step.combine, [*logits.outputs, *node.inputs[5:]], options)
    nodes, outputs = [logits, combine], [*combine.outputs]
    if step.form.masked:
        nodes.append(ir.node("ReduceSum", [outputs.pop(), _entropy_axes(graph)], name=f"{name}.entropy"))
        outputs.append(nodes[-1].outputs[0])
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, outputs)


def _plugin(name: str, kernel: Variant, inputs: list[onnx_ir.Value | None], options: dict[str, Any]) -> onnx_ir.Node:
    """aot: the engine holds the kernel, and building fails where it cannot."""
    node: onnx_ir.Node = require("onnx_ir", extra="export").node(
        NAMES[kernel.kernel],
        inputs,
        {**options, "plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": 1},
        domain=NAMESPACE,
        num_outputs=len(OUTPUTS[kernel.kernel]),
        name=name,
    )
    for value, suffix in zip(node.outputs, OUTPUTS[kernel.kernel], strict=True):
        value.name = f"{name}.{suffix}"
    return node


def _operands(step: _Step) -> tuple[list[onnx_ir.Value | None], bool]:
    """q, v_source, k and v, and whether they are [B, rows, heads, d]: if all four are Transposes of such."""
    q_row, v_row, k, v = step.node.inputs[:4]
    operands = [q_row if step.group > 1 else _ungathered(q_row), _ungathered(v_row), k, v]
    token_major = [_untransposed(x) for x in operands]
    if step.group > 1 or None in token_major:
        return operands, False
    return token_major, True


def _ungathered(row: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """The tensor [B, heads, rows, d] whose first row was gathered, or the row itself."""
    node = None if row is None else row.producer()
    if (
        node is None
        or (node.domain, node.op_type) != ("", "Gather")
        or node.attributes.get_int("axis", 0) not in (2, -2)
    ):
        return row
    index = _constant(node.inputs[1])
    return node.inputs[0] if index is not None and index.tolist() == [0] else row


def _untransposed(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """[B, rows, heads, d] where the value is that, transposed."""
    node = None if value is None else value.producer()
    if node is None or (node.domain, node.op_type) != ("", "Transpose"):
        return None
    return node.inputs[0] if list(node.attributes.get_ints("perm", ())) == HEADS_FIRST else None


def _entropy_axes(graph: onnx_ir.Graph) -> onnx_ir.Value:
    """[1], shared by all nodes."""
    ir = require("onnx_ir", extra="export")
    if ENTROPY_AXES not in graph.initializers:
        axes = ir.tensor(np.array([1], np.int64), name=ENTROPY_AXES)
        value = ir.Value(name=ENTROPY_AXES, shape=axes.shape, type=ir.TensorType(axes.dtype), const_value=axes)
        graph.register_initializer(value)
    return graph.initializers[ENTROPY_AXES]


def _constant(value: onnx_ir.Value | None) -> np.ndarray[Any, Any] | None:
    """What an initializer or a Constant node holds; None for anything else."""
    get = require("onnx_ir", extra="export").convenience.get_const_tensor
    if value is None or (tensor := get(value)) is None:
        return None
    try:
        return np.asarray(tensor.numpy())
    except (OSError, ValueError) as error:
        raise EngineError(
            f"weights must hold the constant {value.name}, got: {error}. Export the graph again."
        ) from None


def _dims(value: onnx_ir.Value | None) -> list[int | None]:
    """Dimensions, None for those that follow the input; nothing where not even their number is known."""
    if value is None or value.shape is None:
        return []
    return [dim if isinstance(dim, int) else None for dim in value.shape]
