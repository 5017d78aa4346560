"""The `language` graph: Llama decoder, prefill and decode in one, KV cache written in place.

Inputs and outputs are flowcut.contract.language_contract; flowcut/language.py is the same mathematics in torch. Where
visual tokens are dropped after layer PRUNE_LAYER (export/language_pruning.py), the layers behind it have a step of
their own: other positions, and so other cache rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from export.builder import GraphBuilder
from export.language_pruning import Heads, LanguagePruning
from export.linear import Linear, Ranges
from flowcut.budget import PRUNE_LAYER
from flowcut.config import NUMPY_DTYPE, Precision, TextConfig
from flowcut.contract import GraphContract, cached_layers, exchange_dtype, hidden_name, past_names, present_names

if TYPE_CHECKING:
    from flowcut.checkpoint import Weights

PREFIX = "language_model."


@dataclass(frozen=True)
class Step:
    """Values that consecutive layers share.

    Attributes:
        position_ids: [B, S]; write_row: [B], the cache row of the first of them.
        cos, sin: [C, d/2] tables; mask: [B, 1, S, C] bool.
    """

    position_ids: ir.Value
    write_row: ir.Value
    cos: ir.Value
    sin: ir.Value
    mask: ir.Value


def language_model(
    weights: Weights,
    contract: GraphContract,
    precision: Precision,
    metadata: Mapping[str, str],
    ranges: Ranges | None = None,
) -> ir.Model:
    """Build the graph; weights are read when it is saved.

    Args:
        weights: checkpoint to read from.
        contract: of flowcut.contract.language_contract, or one of language_contracts, made for the same geometry and
            precision.
        precision: of weights, cache and arithmetic; int8, int4 and fp8 of the layers' weights, the rest being float16.
            Norms compute in float32 and return what the graph computes in, so do logits before they are cast.
        metadata: written into the file.
        ranges: see export.linear; fp8 only.
    """
    graph = _LanguageGraph(weights, contract, precision, ranges)
    return graph.builder.model(contract, graph.outputs(), metadata, graph.functions())


class _LanguageGraph:
    """One build: the builder, the declared inputs and the layers' cache outputs."""

    def __init__(self, weights: Weights, contract: GraphContract, precision: Precision, ranges: Ranges | None) -> None:
        self.config: TextConfig = weights.config.text
        self.weights, self.precision, self.contract = weights, precision, contract
        self.dtype = NUMPY_DTYPE[precision]
        self.builder = GraphBuilder(contract.name)
        self.linears = Linear(self.builder, weights, precision, ranges)
        self.inputs = {spec.name: self.builder.input(spec) for spec in contract.inputs}
        self.cache_rows = [int(spec.dims[2]) for spec in contract.inputs if spec.name.startswith("past.")]
        self.pruning: LanguagePruning | None = None
        if "image_spans" in self.inputs:
            self.pruning = LanguagePruning(self.builder, self.config, contract, self.inputs)

    def outputs(self) -> dict[str, ir.Value]:
        """Write all nodes; graph outputs by contract name."""
        presents: dict[str, ir.Value] = {}
        positions = "position_ids" if "position_ids" in self.inputs else "pruned_position_ids"
        hidden, step = self.entering(), self.step(positions, self.cache_rows[0])
        for i in cached_layers(self.contract):
            with self.builder.scope(f"layers.{i}"):
                hidden, cache, heads = self.layer(i, hidden, step)
                if self.pruning is not None and i == PRUNE_LAYER:
                    hidden = self.pruning.prune(heads, hidden)
                    step = self.step("pruned_position_ids", self.cache_rows[-1])
            presents |= dict(zip(present_names(i), cache, strict=True))
        found = {} if self.pruning is None else self.pruning.found()
        return self.leaving(hidden) | found | presents

    def functions(self) -> list[ir.Function]:
        """Bodies of the custom nodes that were emitted."""
        return [] if self.pruning is None else self.pruning.functions()

    def entering(self) -> ir.Value:
        """What the first layer of this graph takes: [B, S, D]."""
        if (name := hidden_name(cached_layers(self.contract)[0])) not in self.inputs:
            tokens = (self.inputs["input_ids"], self.inputs["image_rows"])
            return self.embed(*(tokens if self.pruning is None else self.pruning.close()))
        return self.builder.cast(self.inputs[name], exchange_dtype(self.precision), self.dtype)

    def leaving(self, hidden: ir.Value) -> dict[str, ir.Value]:
        """What becomes of the last layer's output."""
        if "logits" in {spec.name for spec in self.contract.outputs}:
            return {"logits": self.logits(hidden)}
        name = hidden_name(cached_layers(self.contract)[-1] + 1)
        return {name: self.builder.cast(hidden, self.dtype, exchange_dtype(self.precision))}

    def embed(self, input_ids: ir.Value, rows: ir.Value) -> ir.Value:
        """Token embeddings [B, S, D], replaced by image embeddings where `rows` (image_rows) are not -1."""
        b = self.builder
        text = b.op("Gather", self.weight("model.embed_tokens"), input_ids)
        table = b.op("Reshape", self.inputs["image_embeds"], b.const([-1, self.config.hidden_size], "int64"))
        table = b.cast(table, exchange_dtype(self.precision), self.dtype)
        images = b.op("Gather", table, b.op("Max", rows, b.const(0, "int64")))
        is_image = b.op("Greater", b.op("Unsqueeze", rows, b.const([2], "int64")), b.const(-1, "int64"))
        return b.op("Where", is_image, images, text)

    def step(self, position_ids: str, cache_rows: int) -> Step:
        """Everything that follows from the input of that name.

        The mask is explicit although opset 24's Attention could derive it from nonpad_kv_seqlen: TensorRT-RTX 1.7
        drops that input without an error ("Unused Input" in its log) and would compute wrong decode steps.
        """
        b = self.builder
        positions = self.inputs[position_ids]
        cos, sin = rotary_tables(self.config, self.cache_rows[0])  # the greater number, where there are two
        before = np.arange(-1, cache_rows - 1).reshape(1, 1, 1, -1)  # row <= position is position > row - 1
        return Step(
            position_ids=positions,
            write_row=b.op("Gather", positions, b.const(0, "int64"), axis=1),
            cos=b.const(cos, self.dtype, name="rotary.cos"),
            sin=b.const(sin, self.dtype, name="rotary.sin"),
            mask=b.op("Greater", b.op("Unsqueeze", positions, b.const([1, 3], "int64")), b.const(before, "int64")),
        )

    def layer(self, i: int, hidden: ir.Value, step: Step) -> tuple[ir.Value, tuple[ir.Value, ir.Value], Heads]:
        """One decoder layer: hidden [B, S, D], the layer's present keys and values, and what attention was from."""
        b, name = self.builder, f"model.layers.{i}"
        attended, cache, heads = self.attention(i, self.norm(hidden, f"{name}.input_layernorm"), step)
        hidden = b.op("Add", hidden, attended)
        x = self.norm(hidden, f"{name}.post_attention_layernorm")
        y = self.linear(x, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        y = b.op("Reshape", y, b.const([0, 0, 2, self.config.intermediate_size], "int64"))
        gate, up = (b.op("Gather", y, b.const(half, "int64"), axis=2) for half in range(2))
        gated = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
        return b.op("Add", hidden, self.linear(gated, f"{name}.mlp.down_proj")), cache, heads

    def attention(self, i: int, x: ir.Value, step: Step) -> tuple[ir.Value, tuple[ir.Value, ir.Value], Heads]:
        """Attention of x [B, S, D] over the updated cache [B, Hkv, C, d]."""
        b, config, name = self.builder, self.config, f"model.layers.{i}.self_attn"
        q, k, v = self.heads(x, name)
        q, k = self.rotate(q, step), self.rotate(k, step)
        past = [self.inputs[n] for n in past_names(i)]
        keys, values = (b.op("TensorScatter", p, new, step.write_row) for p, new in zip(past, (k, v), strict=True))
        # Without an explicit scale TensorRT computes it from shapes: ten more network layers each time.
        y = b.op("Attention", q, keys, values, step.mask, scale=config.head_size**-0.5)  # [B, H, S, d]
        y = b.op("Transpose", y, perm=[0, 2, 1, 3])
        y = b.op("Reshape", y, b.const([0, 0, config.hidden_size], "int64"))
        return self.linear(y, f"{name}.o_proj"), (keys, values), Heads(q, k, v)

    def heads(self, x: ir.Value, name: str) -> list[ir.Value]:
        """Project x [B, S, D] to q [B, H, S, d], k and v [B, Hkv, S, d]: one product, then heads of constant numbers.

        Gather rather than Split, whose Slices are more layers to TensorRT.
        """
        b, config = self.builder, self.config
        parts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        y = self.linear(x, *(f"{name}.{part}" for part in ("q_proj", "k_proj", "v_proj")))
        y = b.op("Reshape", y, b.const([0, 0, sum(parts), config.head_size], "int64"))
        y = b.op("Transpose", y, perm=[0, 2, 1, 3])
        ends = accumulate(parts)
        rows = (np.arange(end - count, end) for count, end in zip(parts, ends, strict=True))
        return [b.op("Gather", y, b.const(numbers, "int64"), axis=1) for numbers in rows]

    def rotate(self, x: ir.Value, step: Step) -> ir.Value:
        """Rotary embedding, rotate-half, of [B, H, S, d]."""
        return self.builder.op("RotaryEmbedding", x, step.cos, step.sin, step.position_ids)

    def logits(self, hidden: ir.Value) -> ir.Value:
        """Float32 logits [B, V] of each sequence's last token; the other rows never reach the head."""
        b = self.builder
        index = b.op("Unsqueeze", self.last_token(), b.const([1], "int64"))
        last = b.op("GatherND", hidden, index, batch_dims=1)  # [B, D]
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        logits = b.op("Gemm", self.norm(last, "model.norm"), self.weight(head), transB=1)
        return b.cast(logits, self.dtype, "float32")

    def last_token(self) -> ir.Value:
        """The row of hidden whose logits are wanted, [B]."""
        if self.pruning is not None:
            return self.pruning.last_token()
        if "last_token" in self.inputs:
            return self.inputs["last_token"]
        return self.builder.op("Sub", self.inputs["pruned_lengths"], self.builder.const(1, "int64"))

    def linear(self, x: ir.Value, *names: str) -> ir.Value:
        return self.linears(x, *(PREFIX + name for name in names), bias=False)

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """RMS norm; stash_type's default computes it in float32."""
        return self.builder.op("RMSNormalization", x, self.weight(name), epsilon=self.config.rms_norm_eps)

    def weight(self, name: str) -> ir.Value:
        return self.builder.weight(self.weights, f"{PREFIX}{name}.weight", self.precision)


def rotary_tables(config: TextConfig, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [rows, d/2] of rotary angles, float32."""
    exponent = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponent
    angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)
