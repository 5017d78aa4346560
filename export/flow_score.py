"""`flowcut::FlowScore`, the scoring op: its signature, its forms, and its body in standard ops. Others follow it.

    running' = FlowScore(q_row, v_row, k, v, rows, running)
    running', entropy_ratio = FlowScoreMasked(q_row, v_row, k, v, rows, running, key_valid)

    q_row          [B, H, G, d]       the source token's query (CLS in vision); G query heads per key head
    v_row          [B, H, 1, d]       the source token's value
    k, v           [B, H, S, d]       keys and values; float16, bfloat16 or float32, as q_row and v_row are
                                      (where G > 1, d is a multiple of 4)
    rows           [N] int64          the keys that are scored: arange(source_in_keys, S), a constant
    running        [B, N] float32     running score so far; with history = 0 any finite numbers that broadcast to it
    key_valid      [B, 1, 1, S] bool  keys that exist, the source among them; without others outputs are finite
    running'       [B, N] float32     history * running + (1 - history) * score
    entropy_ratio  [B, 1] float32     -sum p ln p / ln n of the source's attention p over the n valid `rows`; 1 if n < 2

    logit_scale, semantic_scale   float, >= 0    factors of q_row . k and of v_row . v
    history                       float, 0 .. 1  weight of `running`
    source_in_keys                int, 0 or 1    1: key 0 is the source, in every softmax's denominator but not scored

With A_h over S the softmax of logit_scale * q_row . k of one query head, M_h that of semantic_scale * v_row . v of one
key head, and all sums over `rows`:

    score = ( mean_h A_h / sum mean_h A_h  +  mean_h M_h / sum mean_h M_h ) * || mean over heads of v ||_1

Vision (docs/algorithm.md 1) scores CLS's keys: source_in_keys = 1, semantic_scale = 1. The step inside LLaVA-NeXT's
language model has the last instruction token as source and the visual tokens as keys: source_in_keys = 0,
semantic_scale = logit_scale, history = 0.

Forms. The name says what a node does (`Form`), and each has its own body: `FlowScore`, then `Grouped` where G > 1, then
`NoSemantic` (without M) and `NoStrength` (without the norm) for FlowCut's ablations, then `Masked`.

Numerics. All arithmetic is float32. Shares are kept as logarithms and the largest is factored out before heads are
summed (flowcut/scoring.py, whose results these are), so nothing underflows to 0/0 for any |value| <= 65504 in any input
type. Keys that are not valid score 0 whatever finite numbers they hold.

Who computes it. ONNX Runtime and TensorRT-RTX inline the body. For TensorRT, engines/flow_score/nodes.py replaces
the node by two plugin nodes, FlowScoreLogits and FlowScoreCombine[Masked]. Their Triton kernels (kernel.py) read K and
V once; they take source_in_keys and never `rows`.

Why `rows`, when source_in_keys says the same: the body has to drop the source's key, and importers surround a
Slice with shape arithmetic. Measured per scored layer of CLIP-L/14-336 on TensorRT-RTX 1.7.1: 105 network layers with
Slice, 56 with a Gather of constant rows. A body per length is no way out either, since that parser ignores
overloads of functions and takes the first body for all. `flow_score` makes rows and attribute agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from export.builder import GraphBuilder

DOMAIN = "flowcut"
ATTRIBUTES = {
    "logit_scale": ir.AttributeType.FLOAT,
    "semantic_scale": ir.AttributeType.FLOAT,
    "history": ir.AttributeType.FLOAT,
    "source_in_keys": ir.AttributeType.INT,
}
INPUTS = ("q_row", "v_row", "k", "v", "rows", "running")
MASKED_INPUTS = (*INPUTS, "key_valid")
_NAME = re.compile(r"FlowScore(Grouped)?(NoSemantic)?(NoStrength)?(Masked)?")


@dataclass(frozen=True)
class Form:
    """One of the op's forms; see the module's docstring."""

    masked: bool = False
    semantic: bool = True
    strength: bool = True
    grouped: bool = False

    @property
    def name(self) -> str:
        """The node's op_type."""
        without = ("" if self.semantic else "NoSemantic") + ("" if self.strength else "NoStrength")
        return f"FlowScore{'Grouped' if self.grouped else ''}{without}{'Masked' if self.masked else ''}"

    @classmethod
    def named(cls, op_type: str) -> Form | None:
        """The form of that name, None where there is none."""
        if (match := _NAME.fullmatch(op_type)) is None:
            return None
        grouped, no_semantic, no_strength, masked = (part is not None for part in match.groups())
        return cls(masked, not no_semantic, not no_strength, grouped)


@dataclass(frozen=True)
class Source:
    """What is scored against what: the first four inputs, and the number S of keys."""

    q_row: ir.Value
    v_row: ir.Value
    k: ir.Value
    v: ir.Value
    keys: int


def flow_score(
    b: GraphBuilder,
    form: Form,
    source: Source,
    *,
    logit_scale: float,
    semantic_scale: float = 1.0,
    source_in_keys: bool = True,
    running: ir.Value | None = None,
    history: float = 0.0,
    key_valid: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value | None]:
    """Emit one node; the graph needs `flow_score_function(form)` beside it.

    Args:
        running: None at the first step, whatever `history` is.
        key_valid: for masked forms, and only for them.

    Returns:
        running' and, of a masked form, entropy_ratio.
    """
    if form.masked != (key_valid is not None):
        raise ValueError(f"key_valid must be given for masked forms alone, got {key_valid} for {form.name}.")
    rows = b.const(np.arange(int(source_in_keys), source.keys), "int64")
    before = b.const([[0.0]], "float32") if running is None else running
    outputs = b.ops(
        form.name,
        *(source.q_row, source.v_row, source.k, source.v, rows, before),
        *([] if key_valid is None else [key_valid]),
        outputs=1 + form.masked,
        domain=DOMAIN,
        logit_scale=float(logit_scale),
        semantic_scale=float(semantic_scale),
        history=0.0 if running is None else float(history),
        source_in_keys=int(source_in_keys),
    )
    return outputs[0], outputs[1] if form.masked else None


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


def flow_score_function(form: Form) -> ir.Function:
    """The body of a form.

    Attention and similarity are one batch of 2B: k over v, one product, one softmax. Against two of each, that halves
    what TensorRT generates per sequence length. Without the semantic part it is a batch of B, of attention alone. Where
    queries are grouped, similarity is computed G times, equal copies, whose mean it is as well.
    """
    b = _Body(form.name)
    values = {name: b.parameter(name) for name in (MASKED_INPUTS if form.masked else INPUTS)}
    rows, key_valid = values["rows"], values.get("key_valid")
    logits = _logits(b, form, values)  # [2B or B, H, G, S]
    if key_valid is not None:
        valid = b.op("Concat", key_valid, key_valid, axis=0) if form.semantic else key_valid
        logits = b.op("Where", valid, logits, b.const(np.finfo(np.float32).min, "float32"))  # -inf less -inf is NaN
    share = _share(b, logits, rows, form)  # [2 or 1, B, 1, N], each row summing to 1
    score = b.op("ReduceSum", share, b.const([0, 2], "int64"), keepdims=0)  # [B, N]
    if form.strength:
        mean_value = b.op("ReduceMean", _float(b, values["v"]), b.const([1], "int64"), keepdims=0)  # [B, S, d]
        norm = b.op("ReduceL1", mean_value, b.const([2], "int64"), keepdims=0)
        score = b.op("Mul", score, b.op("Gather", norm, rows, axis=1))
    outputs = {"running_out": _accumulate(b, values["running"], score)}
    if key_valid is not None:
        outputs["entropy_ratio"] = _entropy_ratio(b, share, key_valid, rows)
    attributes = [ir.Attr(name, kind, None) for name, kind in ATTRIBUTES.items()]
    return ir.Function(DOMAIN, form.name, graph=b.graph(outputs), attributes=attributes)


def _float(b: GraphBuilder, x: ir.Value) -> ir.Value:
    return b.op("Cast", x, to=ir.DataType.FLOAT)


def _logits(b: _Body, form: Form, values: dict[str, ir.Value]) -> ir.Value:
    """Of attention, over similarity unless the form lacks it: [2B or B, H, G, S]."""
    sources = b.op("Mul", _float(b, values["q_row"]), b.attribute("logit_scale"))  # [B, H, G, d]
    keys = values["k"]
    if form.semantic:
        similar = b.op("Mul", _float(b, values["v_row"]), b.attribute("semantic_scale"))
        if form.grouped:
            similar = b.op("Expand", similar, b.op("Shape", values["q_row"]))
        sources = b.op("Concat", sources, similar, axis=0)  # [2B, H, G, d]
        keys = b.op("Concat", keys, values["v"], axis=0)  # [2B, H, S, d]
    if not form.grouped:
        return b.op("MatMul", sources, b.op("Transpose", _float(b, keys), perm=[0, 1, 3, 2]))
    # ONNX Runtime adds up each product of several rows in one chain of d roundings: four chains keep it accurate.
    chains = b.const([0, 0, 0, 4, -1], "int64")
    sources = b.op("Transpose", b.op("Reshape", sources, chains), perm=[0, 1, 3, 2, 4])  # [2B, H, 4, G, d/4]
    keys = b.op("Transpose", b.op("Reshape", _float(b, keys), chains), perm=[0, 1, 3, 4, 2])  # [2B, H, 4, d/4, S]
    return b.op("ReduceSum", b.op("MatMul", sources, keys), b.const([2], "int64"), keepdims=0)


def _share(b: GraphBuilder, logits: ir.Value, rows: ir.Value, form: Form) -> ir.Value:
    """Head-mean softmax of logits at `rows`, normalised over them: [parts, B, 1, N]."""
    last, heads = b.const([3], "int64"), [1, 2] if form.grouped else [1]
    # The steps of a stable log-softmax, spelled out: importers differ in how they expand the composite ops.
    shifted = b.op("Sub", logits, b.op("ReduceMax", logits, last, keepdims=1))
    total = b.op("Log", b.op("ReduceSum", b.op("Exp", shifted), last, keepdims=1))
    log_share = b.op("Gather", b.op("Sub", shifted, total), rows, axis=3)  # [parts * B, H, G, N]
    largest = b.op("ReduceMax", log_share, b.const([*heads, 3], "int64"), keepdims=1)
    weight = b.op("Exp", b.op("Sub", log_share, largest))
    weight = b.op("ReduceSum", weight, b.const(heads, "int64"), keepdims=1)  # [parts * B, 1, 1, N]
    share = b.op("Div", weight, b.op("ReduceSum", weight, last, keepdims=1))
    return b.op("Reshape", share, b.const([1 + form.semantic, -1, 1, 0], "int64"))


def _accumulate(b: _Body, running: ir.Value, score: ir.Value) -> ir.Value:
    history = b.attribute("history")
    fresh = b.op("Sub", b.const(1.0, "float32"), history)
    return b.op("Add", b.op("Mul", running, history), b.op("Mul", score, fresh))


def _entropy_ratio(b: GraphBuilder, share: ir.Value, key_valid: ir.Value, rows: ir.Value) -> ir.Value:
    """-sum p ln p / ln n of the attention share; 1 where fewer than two keys are scored."""
    p = b.op("Gather", share, b.const(0, "int64"), axis=0)  # [B, 1, N]
    log_p = b.op("Log", b.op("Max", p, b.const(np.finfo(np.float32).tiny, "float32")))
    entropy = b.op("Neg", b.op("ReduceSum", b.op("Mul", p, log_p), b.const([2], "int64"), keepdims=0))  # [B, 1]
    scored = b.op("Gather", _float(b, key_valid), rows, axis=3)
    count = b.op("ReduceSum", scored, b.const([2, 3], "int64"), keepdims=0)  # [B, 1]
    two = b.const(2.0, "float32")
    ratio = b.op("Div", entropy, b.op("Log", b.op("Max", count, two)))
    return b.op("Where", b.op("GreaterOrEqual", count, two), ratio, b.const(1.0, "float32"))
