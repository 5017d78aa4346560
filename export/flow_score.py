"""`flowcut::FlowScore`: the scoring op as a custom-domain node with a standard-op body.

ONNX Runtime and TensorRT-RTX inline the body; TensorRT can take the node as a plugin. Two forms of one definition,
of which FlowCut's ablations have variants with the same inputs, `FlowScoreNoSemantic` and the like (`op_name`):

    running' = FlowScore(q_row, v_row, k, v, rows, running)
    running', entropy_ratio = FlowScoreMasked(q_row, v_row, k, v, rows, running, key_valid)

    q_row, v_row   [B, H, 1, d]     query and value of the source token (CLS in vision)
    k, v           [B, H, S, d]     keys and values, source included
    rows           [N] int64        the keys that are scored; all S take part in both softmaxes
    running        [B, N] float32   running score so far; any broadcastable zeros with history = 0
    key_valid      [B, 1, 1, S] bool  keys that exist (schedule `masked`)
    running'       [B, N] float32   history * running + (1 - history) * score
    entropy_ratio  [B, 1] float32   entropy of the source's attention over `rows`, over ln of their number

    logit_scale, semantic_scale, history: float attributes

All arithmetic is float32. Probabilities are kept as logarithms and the largest is factored out before heads are summed
(see flowcut/scoring.py, whose results these are), so that nothing underflows to 0/0 in any input type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from export.builder import GraphBuilder

DOMAIN = "flowcut"
ATTRIBUTES = ("logit_scale", "semantic_scale", "history")
INPUTS = ("q_row", "v_row", "k", "v", "rows", "running")


class _Body(GraphBuilder):
    """A function body: constants are nodes, since functions have no initializers."""

    def const(self, value: Any, dtype: str, name: str | None = None) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.asarray(value, dtype)))

    def parameter(self, name: str) -> ir.Value:
        """Declare a function input; its type is the caller's."""
        value = ir.Value(name=name)
        self._inputs.append(value)
        return value

    def attribute(self, name: str) -> ir.Value:
        return self.op("Constant", value_float=ir.RefAttr("value_float", name, ir.AttributeType.FLOAT))


def op_name(masked: bool = False, semantic: bool = True, strength: bool = True) -> str:
    """The op's name in that form and without the parts that are False."""
    without = ("" if semantic else "NoSemantic") + ("" if strength else "NoStrength")
    return f"FlowScore{without}{'Masked' if masked else ''}"


def flow_score_function(masked: bool = False, semantic: bool = True, strength: bool = True) -> ir.Function:
    """The body of `FlowScore`, or of another of `op_name`'s.

    Attention and similarity are one batch of 2B: k over v, one product, one softmax. Against two of each, that halves
    what TensorRT generates per sequence length. Without the semantic part it is a batch of B, of attention alone.
    """
    b = _Body(op_name(masked, semantic, strength))
    values = {name: b.parameter(name) for name in (*INPUTS, *(("key_valid",) if masked else ()))}
    rows, key_valid = values["rows"], values.get("key_valid")

    sources = b.op("Mul", _float(b, values["q_row"]), b.attribute("logit_scale"))  # [B, H, 1, d]
    keys = values["k"]
    if semantic:
        similar = b.op("Mul", _float(b, values["v_row"]), b.attribute("semantic_scale"))
        sources = b.op("Concat", sources, similar, axis=0)  # [2B, H, 1, d]
        keys = b.op("Concat", keys, values["v"], axis=0)  # [2B, H, S, d]
    logits = b.op("MatMul", sources, b.op("Transpose", _float(b, keys), perm=[0, 1, 3, 2]))  # [2B or B, H, 1, S]
    if key_valid is not None:
        valid = b.op("Concat", key_valid, key_valid, axis=0) if semantic else key_valid
        logits = b.op("Where", valid, logits, b.const(-np.inf, "float32"))
    share = _share(b, logits, rows, parts=1 + semantic)  # [2 or 1, B, 1, N], each row summing to 1
    score = b.op("ReduceSum", share, b.const([0, 2], "int64"), keepdims=0)  # [B, N]
    if strength:
        mean_value = b.op("ReduceMean", _float(b, values["v"]), b.const([1], "int64"), keepdims=0)  # [B, S, d]
        norm = b.op("ReduceL1", mean_value, b.const([2], "int64"), keepdims=0)
        score = b.op("Mul", score, b.op("Gather", norm, rows, axis=1))
    outputs = {"running_out": _accumulate(b, values["running"], score)}
    if key_valid is not None:
        outputs["entropy_ratio"] = _entropy_ratio(b, share, key_valid)
    body = b.graph(outputs)
    attributes = [ir.Attr(name, ir.AttributeType.FLOAT, None) for name in ATTRIBUTES]
    return ir.Function(DOMAIN, str(body.name), graph=body, attributes=attributes)


def _float(b: GraphBuilder, x: ir.Value) -> ir.Value:
    return b.op("Cast", x, to=ir.DataType.FLOAT)


def _share(b: GraphBuilder, logits: ir.Value, rows: ir.Value, parts: int) -> ir.Value:
    """Head-mean softmax of logits [parts * B, H, 1, S] at `rows`, normalised over them: [parts, B, 1, N]."""
    last = b.const([3], "int64")
    # The steps of a stable log-softmax, spelled out: importers differ in how they expand the composite ops.
    shifted = b.op("Sub", logits, b.op("ReduceMax", logits, last, keepdims=1))
    total = b.op("Log", b.op("ReduceSum", b.op("Exp", shifted), last, keepdims=1))
    log_share = b.op("Gather", b.op("Sub", shifted, total), rows, axis=3)  # [parts * B, H, 1, N]
    largest = b.op("ReduceMax", log_share, b.const([1, 3], "int64"), keepdims=1)
    weight = b.op("Exp", b.op("Sub", log_share, largest))
    weight = b.op("ReduceSum", weight, b.const([1], "int64"), keepdims=1)  # [parts * B, 1, 1, N]
    share = b.op("Div", weight, b.op("ReduceSum", weight, last, keepdims=1))
    return b.op("Reshape", share, b.const([parts, -1, 1, 0], "int64"))


def _accumulate(b: _Body, running: ir.Value, score: ir.Value) -> ir.Value:
    history = b.attribute("history")
    fresh = b.op("Sub", b.const(1.0, "float32"), history)
    return b.op("Add", b.op("Mul", running, history), b.op("Mul", score, fresh))


def _entropy_ratio(b: GraphBuilder, share: ir.Value, key_valid: ir.Value) -> ir.Value:
    """-sum p ln p / ln n of the attention share; 1 where fewer than two keys are scored."""
    p = b.op("Gather", share, b.const(0, "int64"), axis=0)  # [B, 1, N]
    log_p = b.op("Log", b.op("Max", p, b.const(np.finfo(np.float32).tiny, "float32")))
    entropy = b.op("Neg", b.op("ReduceSum", b.op("Mul", p, log_p), b.const([2], "int64"), keepdims=0))  # [B, 1]
    keys = b.op("ReduceSum", b.op("Cast", key_valid, to=ir.DataType.FLOAT), b.const([1, 2, 3], "int64"), keepdims=0)
    count = b.op("Sub", b.op("Reshape", keys, b.const([-1, 1], "int64")), b.const(1.0, "float32"))
    two = b.const(2.0, "float32")
    ratio = b.op("Div", entropy, b.op("Log", b.op("Max", count, two)))
    return b.op("Where", b.op("GreaterOrEqual", count, two), ratio, b.const(1.0, "float32"))
