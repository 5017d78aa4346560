"""Dropping visual tokens between two decoder layers, as graph nodes: flowcut.contract.language_contract's `llm_tokens`.

Two moves along the sequence, both closed formulas of where the pictures stand, so that no shape follows the data:

    close   LLaVA-NeXT: the host leaves each picture as many rows as it can have; those that are no visual token go, and
            what follows moves up. Applied to token numbers, before the embedding.
    prune   after layer PRUNE_LAYER each picture keeps its `llm_tokens` best rows. Applied to hidden states.

Row p of the moved sequence comes from row p + shift, where shift counts the rows that were dropped before it. In a
decode step no picture has rows, every shift is 0, and the same nodes change nothing; they are computed all the same,
FlowScore over `slots` rows of each picture that is fed.

Letters: B sequences, I pictures, S positions, M rows that a picture can have, T rows that it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.builder import GraphBuilder
from export.flow_score import Form, Source, flow_score, flow_score_function
from flowcut.config import TextConfig
from flowcut.contract import GraphContract
from flowcut.errors import ConfigError


@dataclass(frozen=True)
class Heads:
    """A layer's rotated queries [B, H, S, d] and keys [B, Hkv, S, d], and values like the keys, of this run alone."""

    q: ir.Value
    k: ir.Value
    v: ir.Value


class LanguagePruning:
    """The nodes of one graph. Numbers of pictures are columns [I, 1] int64, those of sequences are [B]."""

    def __init__(
        self, b: GraphBuilder, config: TextConfig, contract: GraphContract, inputs: Mapping[str, ir.Value]
    ) -> None:
        dims = {spec.name: spec.dims for spec in (*contract.inputs, *contract.outputs)}
        self._b, self._config, self._inputs = b, config, inputs
        self._slots, self._keep = int(dims["image_embeds"][1]), int(dims["kept_tokens"][1])
        self._gaps = "image_lengths" in inputs
        self._form = Form(masked=self._gaps, grouped=config.num_key_value_heads != config.num_attention_heads)
        if self._form.grouped and config.head_size % 4:
            raise ConfigError(
                "text_config head size must be a multiple of 4 where grouped queries are scored, "
                f"got {config.head_size}."
            )
        with b.scope("pictures"):
            self._locate()

    def close(self) -> tuple[ir.Value, ir.Value]:
        """input_ids and image_rows [B, S] with no gap between their tokens."""
        b, names = self._b, ("input_ids", "image_rows")
        if not self._gaps:
            return self._inputs[names[0]], self._inputs[names[1]]
        with b.scope("close"):
            moved = b.op("Where", b.op("Less", self._places, self._end), self._cell(0), self._gap)  # [I, S]
            rows = self._source_rows(self._places, moved)
            ids, image_rows = (b.op("GatherElements", self._inputs[name], rows, axis=1) for name in names)
            return ids, image_rows

    def prune(self, heads: Heads, hidden: ir.Value) -> ir.Value:
        """hidden [B, S, D] -> [B, S', D] by the scores of the layer that made it."""
        b = self._b
        with b.scope("prune"):
            self._kept = self._best(self._score(heads))
            places = self._relative("pruned_position_ids")
            rows = self._source_rows(places, self._shift(places))
            return b.op("GatherND", hidden, b.op("Unsqueeze", rows, self._ints(2)), batch_dims=1)

    def last_token(self) -> ir.Value:
        """The row of each sequence's last token once it is pruned, [B]."""
        return self._pruned_last

    def found(self) -> dict[str, ir.Value]:
        """The contract's outputs on what was done."""
        lengths, pruned = (self._b.op("Add", last, self._ints(1)) for last in (self._last, self._pruned_last))
        return {"lengths": lengths, "pruned_lengths": pruned, "kept_tokens": self._kept}

    def functions(self) -> list[ir.Function]:
        """Bodies of the custom nodes."""
        return [flow_score_function(self._form)]

    def _locate(self) -> None:
        """Where every picture is, and how much of it goes."""
        b = self._b
        self._sequence, first, capacity = (self._column("image_spans", i) for i in range(3))
        self._of_sequence = b.op("Equal", self._numbered(), self._row(self._sequence))  # [B, I]
        self._end, self._last = b.op("Add", first, capacity), self._inputs["last_token"]
        # [I, I]: the picture of the column is that of the row, or one before it in its sequence
        together = b.op("Equal", self._sequence, self._row(self._sequence))
        self._reached = b.op("And", together, b.op("Less", self._row(first), self._end))
        self._places = self._relative("position_ids")
        self._bottom = b.op("ReduceMax", self._places, self._ints(1), keepdims=1)  # S - 1, [1, 1]
        self._tokens = capacity
        if self._gaps:
            lengths = b.op("Unsqueeze", self._inputs["image_lengths"], self._ints(1))
            self._tokens = b.op("Min", lengths, capacity)
            self._gap = b.op("Sub", capacity, self._tokens)
            self._end = b.op("Sub", self._end, self._so_far(self._gap))
            self._last = b.op("Sub", self._last, self._total(self._gap))
        self._start = b.op("Sub", self._end, self._tokens)
        self._dropped = b.op("Max", b.op("Sub", self._tokens, self._cell(self._keep)), self._cell(0))
        self._pruned_last = b.op("Sub", self._last, self._total(self._dropped))

    def _score(self, heads: Heads) -> ir.Value:
        """[I, M] float32: each row's score, -inf where a picture has fewer."""
        b, config = self._b, self._config
        last = b.op("Gather", self._last, self._sequence)
        source, rows = self._index(last, 1), self._index(self._start, self._slots)
        q, k, v = (b.op("Transpose", x, perm=[0, 2, 1, 3]) for x in (heads.q, heads.k, heads.v))  # [B, S, heads, d]
        q_row, v_row, keys, values = (
            b.op("Transpose", b.op("GatherND", x, index), perm=[0, 2, 1, 3])
            for x, index in ((q, source), (v, source), (k, rows), (v, rows))
        )
        if self._form.grouped:
            q_row = b.op("Reshape", q_row, b.const([0, config.num_key_value_heads, -1, config.head_size], "int64"))
        scale, valid = config.head_size**-0.5, None
        if self._gaps:
            exists = b.op("Less", b.const(np.arange(self._slots)[None], "int64"), self._tokens)  # [I, M]
            valid = b.op("Unsqueeze", exists, self._ints(1, 2))
        score, _ = flow_score(
            b,
            self._form,
            Source(q_row, v_row, keys, values, self._slots),
            logit_scale=scale,
            semantic_scale=scale,
            source_in_keys=False,
            key_valid=valid,
        )
        return score if valid is None else b.op("Where", exists, score, b.const([[-np.inf]], "float32"))

    def _best(self, score: ir.Value) -> ir.Value:
        """[I, T]: numbers of the rows that stay, ascending; rows that exist come before those that do not."""
        b, k = self._b, self._ints(self._keep)
        best = b.ops("TopK", score, k, outputs=2, axis=1, largest=1, sorted=1)[1]
        return b.ops("TopK", best, k, outputs=2, axis=1, largest=0, sorted=1)[0]

    def _shift(self, places: ir.Value) -> ir.Value:
        """[I, S']: how many rows of the picture go before the row that comes to each place [1, S']."""
        b, keep = self._b, self._keep
        gone = b.op("Sub", self._kept, b.const(np.arange(keep)[None], "int64"))
        # Of a picture with fewer than T rows the last numbers of `kept` mean nothing, and none of its rows go.
        gone = b.op("Min", gone, self._dropped)
        none = b.op("Sub", self._dropped, self._dropped)
        table = b.op("Concat", none, gone, self._dropped, axis=1)  # before it, each of its rows, behind it
        start = b.op("Sub", self._start, b.op("Sub", self._so_far(self._dropped), self._dropped))
        number = b.op("Add", b.op("Sub", places, start), self._cell(1))
        number = b.op("Min", b.op("Max", number, self._cell(0)), self._cell(keep + 1))
        return b.op("GatherElements", table, number, axis=1)

    def _source_rows(self, places: ir.Value, moved: ir.Value) -> ir.Value:
        """[B, S]: the row that comes to each place [1, S], each picture having `moved` what follows by [I, S]."""
        b, nowhere = self._b, self._b.const([[[0]]], "int64")
        own = b.op("Where", b.op("Unsqueeze", self._of_sequence, self._ints(2)), moved, nowhere)  # [B, I, S]
        shift = b.op("ReduceSum", own, self._ints(1), keepdims=0)
        return b.op("Min", b.op("Add", places, shift), self._bottom)

    def _index(self, row: ir.Value, count: int) -> ir.Value:
        """[I, count, 2]: GatherND's (sequence, row) of `count` rows of each picture's sequence from `row` [I, 1] on."""
        b = self._b
        index = b.op("Unsqueeze", b.op("Concat", self._sequence, row, axis=1), self._ints(1))
        if count == 1:
            return index
        steps = np.stack([np.zeros(count), np.arange(count)], axis=1)[None]
        bound = b.op("Concat", b.const([[np.iinfo(np.int32).max]], "int64"), self._bottom, axis=1)
        return b.op("Min", b.op("Add", index, b.const(steps, "int64")), bound)

    def _so_far(self, rows: ir.Value) -> ir.Value:
        """Sum over a picture and those before it in its sequence."""
        b = self._b
        counted = b.op("Where", self._reached, self._row(rows), self._cell(0))
        return b.op("ReduceSum", counted, self._ints(1), keepdims=1)

    def _total(self, rows: ir.Value) -> ir.Value:
        """Sum over each sequence's pictures, [B]."""
        b = self._b
        counted = b.op("Where", self._of_sequence, self._row(rows), self._cell(0))
        return b.op("ReduceSum", counted, self._ints(1), keepdims=0)

    def _numbered(self) -> ir.Value:
        """0, 1, .. B-1 as [B, 1]. Range would do as well, at 18 TensorRT layers instead of 5."""
        b, last = self._b, self._inputs["last_token"]
        ones = b.op("Cast", b.op("Equal", last, last), to=ir.DataType.INT64)
        return b.op("Unsqueeze", b.op("CumSum", ones, b.const(0, "int64"), exclusive=1), self._ints(1))

    def _relative(self, name: str) -> ir.Value:
        """[1, S]: places in the sequence, the same in all: 0, 1, .. S-1."""
        b = self._b
        positions = b.op("Gather", self._inputs[name], self._ints(0), axis=0)
        return b.op("Sub", positions, b.op("Gather", positions, self._ints(0), axis=1))

    def _column(self, name: str, index: int) -> ir.Value:
        return self._b.op("Gather", self._inputs[name], self._ints(index), axis=1)

    def _row(self, column: ir.Value) -> ir.Value:
        return self._b.op("Reshape", column, self._ints(1, -1))

    def _cell(self, value: int) -> ir.Value:
        """[1, 1]: of a scalar TensorRT makes that first, a layer each time."""
        return self._b.const([[value]], "int64")

    def _ints(self, *values: int) -> ir.Value:
        return self._b.const(values, "int64")
