"""The pruning step between two encoder layers, as graph nodes: what flowcut/pruner.py does, with fixed shapes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.builder import GraphBuilder
from export.flow_score import Form, Source, flow_score, flow_score_function
from flowcut.config import VisionConfig
from flowcut.schedule import Schedule, layers_left
from flowcut.selector import selector


class PruningSteps:
    """Emits scoring after every layer that the selector reads and gathers at pruning points.

    State between layers: the running score [images, N], original patch numbers [images, N] (None while they are still
    0..N-1), and, for `masked`, the valid count as float32 [images, 1] with the key mask made from it.
    """

    def __init__(self, b: GraphBuilder, schedule: Schedule, vision: VisionConfig, pixel_values: ir.Value) -> None:
        self._b, self._schedule, self._vision = b, schedule, vision
        self._pixel_values = pixel_values  # tells how many images there are
        self._selector = selector(schedule.selector)
        self._points = schedule.points(vision.num_hidden_layers)
        self._scored_layers = schedule.scored_layers(vision.num_hidden_layers)
        self._patches = schedule.patches
        self._running: ir.Value | None = None
        self._numbers: ir.Value | None = None
        self._masked = schedule.kind == "masked"
        self._form = Form(self._masked, self._selector.semantic, self._selector.strength)
        self._valid_count: ir.Value | int = schedule.patches
        self._key_valid: ir.Value | None = None  # while None, every row is valid
        self._mask: list[ir.Value] = []
        self._kept: list[tuple[int, int, ir.Value | None]] = []
        self._counts: list[ir.Value | int] = [schedule.patches]

    def attention_mask(self) -> list[ir.Value]:
        """Attention's optional mask input, [images, 1, N+1, N+1] bool; one for all layers up to the next point."""
        if self._key_valid is None:
            return []
        if not self._mask:
            # ONNX Runtime broadcasts this mask over images and heads, not over queries.
            queries = self._b.const(np.ones((1, 1, self._patches + 1, 1)), "bool")
            self._mask = [self._b.op("And", self._key_valid, queries)]
        return self._mask

    def after_layer(self, layer: int, q: ir.Value, k: ir.Value, v: ir.Value, hidden: ir.Value) -> ir.Value:
        """Score layer `layer` from its q, k, v [images, H, N+1, d]; at a pruning point drop rows of hidden."""
        if self._patches > self._schedule.tokens and layer in self._scored_layers:
            with self._b.scope("flow"):
                entropy_ratio = self._score(q, k, v)
                if layer in self._points:
                    hidden = self._prune(layer, entropy_ratio, hidden)
        self._counts.append(self._patches if self._key_valid is None else self._valid_count)
        return hidden

    def functions(self) -> list[ir.Function]:
        """Bodies of the custom nodes that were emitted."""
        if self._schedule.kind == "off" or self._selector.constant is not None:
            return []
        return [flow_score_function(self._form)]

    def kept(self) -> ir.Value:
        """Original numbers of the patches that are left, [images, T]."""
        return self._numbers if self._numbers is not None else self._per_image(np.arange(self._patches))

    def trace(self) -> dict[str, ir.Value]:
        """`counts` [images, L+1] and `kept.<layer>` [images, C] as int64."""
        outputs = {}
        for layer, size, numbers in self._kept:
            numbers = numbers or self._per_image(np.arange(size))
            outputs[f"kept.{layer}"] = self._b.op("Identity", numbers)  # a value can be one output only
        missing = self._vision.num_hidden_layers + 1 - len(self._counts)
        columns = [self._column(c) for c in self._counts + self._counts[-1:] * missing]
        return {**outputs, "counts": self._b.op("Concat", *columns, axis=1)}

    def _score(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value | None:
        """Update the running score; returns the entropy ratio where the schedule needs it."""
        b, by = self._b, self._selector
        if by.constant is not None:
            self._running = self._per_image(by.constant(self._schedule.patches, self._schedule.tokens), "float32")
            return None
        cls = b.const([0], "int64")
        q_row, v_row = (b.op("Gather", x, cls, axis=2) for x in (q, v))
        self._running, entropy_ratio = flow_score(
            b,
            self._form,
            Source(q_row, v_row, k, v, keys=self._patches + 1),
            logit_scale=self._vision.head_size**-0.5,
            running=self._running if by.history else None,  # not 0 times it: it may hold -inf
            history=by.history,
            key_valid=self._valid_keys() if self._masked else None,
        )
        return entropy_ratio

    def _valid_keys(self) -> ir.Value:
        """[images, 1, 1, N+1] bool: all, before the first pruning point."""
        if self._key_valid is not None:
            return self._key_valid
        return self._per_image(np.ones((1, 1, self._patches + 1)), "bool")

    def _prune(self, layer: int, entropy_ratio: ir.Value | None, hidden: ir.Value) -> ir.Value:
        keep = self._schedule.counts[self._points.index(layer)]
        self._mask = []
        if keep < self._patches or self._masked:
            hidden = self._gather(hidden, self._order(layer, keep, entropy_ratio), keep)
        self._kept.append((layer, keep, self._numbers))
        return hidden

    def _order(self, layer: int, keep: int, entropy_ratio: ir.Value | None) -> ir.Value:
        """Rows that stay, [images, K] int64: valid ones first, in spatial order."""
        b, running = self._b, self._running
        if self._key_valid is not None and isinstance(self._valid_count, ir.Value):
            exists = b.op("LessOrEqual", self._rows(1, self._patches + 1, "float32"), self._valid_count)
            running = b.op("Where", exists, running, b.const(-np.inf, "float32"))
            self._running = running
        best = self._top(running, keep, largest=1)
        if entropy_ratio is None or layers_left(self._vision.num_hidden_layers, layer) == 0:
            self._key_valid = None
            return self._top(best, keep, largest=0, output=0)
        self._valid_count = self._masked_count(layer, keep, entropy_ratio)
        count = b.op("Reshape", self._valid_count, b.const([-1, 1, 1, 1], "int64"))
        self._key_valid = b.op("LessOrEqual", b.const(np.arange(keep + 1).reshape(1, 1, 1, -1), "float32"), count)
        surplus = b.op("GreaterOrEqual", self._rows(0, keep, "float32"), self._valid_count)
        behind = b.op("Mul", b.op("Cast", surplus, to=ir.DataType.INT64), b.const(self._patches, "int64"))
        ordered = self._top(b.op("Add", best, behind), keep, largest=0, output=0)  # keys beyond every valid row last
        return b.op("Mod", ordered, b.const(self._patches, "int64"))

    def _masked_count(self, layer: int, capacity: int, entropy_ratio: ir.Value) -> ir.Value:
        """min(rule, capacity) with the valid count as N (docs/algorithm.md 3); float32 [images, 1]."""
        b, tokens = self._b, self._b.const(self._schedule.tokens, "float32")
        root = b.const(layers_left(self._vision.num_hidden_layers, layer) ** 0.5, "float32")
        count = self._valid_count
        if isinstance(count, int):
            count = b.const([[count]], "float32")
        surplus = b.op("Div", b.op("Sub", count, tokens), root)
        spread = b.op("Sub", b.const(1.0, "float32"), b.op("Mul", entropy_ratio, entropy_ratio))
        drop = b.op("Round", b.op("Mul", surplus, spread))  # half to even, as the rule asks
        kept = b.op("Max", b.op("Sub", count, drop), tokens)
        return b.op("Min", kept, b.const(capacity, "float32"))

    def _gather(self, hidden: ir.Value, order: ir.Value, keep: int) -> ir.Value:
        """Take `order` from hidden (CLS stays first), the running score and the patch numbers."""
        b = self._b
        row = b.op("Reshape", b.op("Add", order, b.const(1, "int64")), b.const([-1, keep, 1], "int64"))
        cls = b.op("Gather", hidden, b.const([0], "int64"), axis=1)
        hidden = b.op("Concat", cls, b.op("GatherND", hidden, row, batch_dims=1), axis=1)
        if keep > self._schedule.tokens and self._selector.history:
            self._running = b.op("GatherElements", self._running, order, axis=1)
        self._numbers = order if self._numbers is None else b.op("GatherElements", self._numbers, order, axis=1)
        self._patches = keep
        return hidden

    def _top(self, x: ir.Value | None, k: int, largest: int, output: int = 1) -> ir.Value:
        return self._b.ops("TopK", x, self._b.const([k], "int64"), outputs=2, axis=1, largest=largest, sorted=1)[output]

    def _rows(self, start: int, stop: int, dtype: str = "int64") -> ir.Value:
        return self._b.const(np.arange(start, stop), dtype)

    def _column(self, count: ir.Value | int) -> ir.Value:
        if isinstance(count, int):
            return self._per_image(np.array([count]))
        return self._b.op("Cast", count, to=ir.DataType.INT64)

    def _per_image(self, value: np.ndarray, dtype: str = "int64") -> ir.Value:
        """The same constant for every image: [images, *value.shape]."""
        b = self._b
        images = b.op("Shape", self._pixel_values, start=0, end=1)
        return b.op(
            "Expand", b.const(value[None], dtype), b.op("Concat", images, b.const(value.shape, "int64"), axis=0)
        )
