"""The `vision` graph: pixel_values -> image_embeds, kept. CLIP tower, FlowCut and projector, written by hand.

For LLaVA-NeXT the tower sees tiles, and export/packing.py makes pictures of them.

Shapes are constant but for the number of images: TopK with constant k, a second TopK for spatial order, one gather per
pruning point. No NonZero, no Slice, no shape arithmetic around gathers, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from export.builder import GraphBuilder
from export.linear import Linear, Ranges
from export.packing import Tiles, check_slots, packed
from export.pruning import PruningSteps
from flowcut.checkpoint import Weights
from flowcut.config import NUMPY_DTYPE, VisionConfig
from flowcut.contract import GraphContract, TensorSpec
from flowcut.schedule import Schedule, check_fixed_shapes
from flowcut.tensors import NEWLINE

TOWER = "vision_tower.vision_model."


def vision_model(
    weights: Weights,
    contract: GraphContract,
    schedule: Schedule,
    precision: str,
    metadata: Mapping[str, str],
    trace: bool = False,
    ranges: Ranges | None = None,
) -> ir.Model:
    """Build the graph; weights are read when it is saved.

    Args:
        contract: flowcut.contract.vision_contract for the same tokens and precision.
        precision: of weights and arithmetic; int8, int4 and fp8 of the layers' weights, the rest being float16. Scores
            are float32 whatever it is.
        trace: add the outputs `features` [images, T, hidden] float32, `counts` [images, L+1] int64 and per pruning
            point `kept.<layer>` [images, C] int64, for looking at what the pruner did. Of LLaVA-NeXT these are the
            tiles', and `tile_kept` [tiles, T] is what the last point left.
        ranges: see export.linear; fp8 only.

    Raises:
        ConfigError: the schedule is adaptive, whose lengths depend on the data; or a picture has too many tiles.
    """
    check_fixed_shapes(schedule)
    if weights.config.anyres:
        check_slots(contract)
    b = GraphBuilder(contract.name)
    tower = _Tower(b, weights, precision, ranges)
    pixels, *feeds = (b.input(spec) for spec in contract.inputs)
    hidden = tower.embed(b.cast(pixels, contract.inputs[0].dtype, tower.dtype))
    steps = PruningSteps(b, schedule, weights.config.vision, pixels)
    scale = weights.config.vision.head_size**-0.5  # spelled out: the default costs TensorRT ten layers a node
    for i in range(weights.config.vision.num_hidden_layers - 1):
        with b.scope(f"layers.{i}"):
            q, k, v = tower.heads(i, hidden)
            attended = b.op("Attention", q, k, v, *steps.attention_mask(), scale=scale)
            hidden = steps.after_layer(i, q, k, v, tower.finish_layer(i, hidden, attended))
    features = b.op("Gather", hidden, b.const(np.arange(1, schedule.tokens + 1), "int64"), axis=1)  # CLS has served
    embeds = tower.project(features)
    if feeds:
        tile_kept = steps.kept()
        outputs = _pictures(b, tower, embeds, tile_kept, feeds, contract)
    else:
        outputs = {"image_embeds": b.cast(embeds, tower.dtype, contract.outputs[0].dtype), "kept": steps.kept()}
    if trace:
        outputs |= {"features": b.op("Cast", features, to=ir.DataType.FLOAT), **steps.trace()}
        outputs |= {"tile_kept": tile_kept} if feeds else {}
        contract = traced_contract(contract, schedule, weights.config.vision)
    return b.model(contract, outputs, metadata, steps.functions())


def _pictures(
    b: GraphBuilder,
    tower: _Tower,
    embeds: ir.Value,
    tile_kept: ir.Value,
    feeds: Sequence[ir.Value],
    contract: GraphContract,
) -> dict[str, ir.Value]:
    """LLaVA-NeXT's outputs from the tiles' [tiles, T, text hidden] and the inputs that follow the pixels."""
    tile_places, image_tiles, newline_places = feeds
    with b.scope("packing"):
        order = b.op("GatherElements", tile_places, tile_kept, axis=1)
        tiles = Tiles(embeds, order, image_tiles, newline_places, tower.newline())
        embeds, kept, lengths = packed(b, tiles, contract)
    embeds = b.cast(embeds, tower.dtype, contract.outputs[0].dtype)
    return {"image_embeds": embeds, "kept": kept, "image_lengths": lengths}


def traced_contract(contract: GraphContract, schedule: Schedule, vision: VisionConfig) -> GraphContract:
    """The contract of a graph built with `trace`."""
    sizes = (schedule.patches, *schedule.counts)
    points = zip(schedule.points(vision.num_hidden_layers), pairwise(sizes), strict=False)
    seen = contract.inputs[0].dims[0]  # what the tower's batch is of
    specs = (
        TensorSpec("features", "float32", (seen, schedule.tokens, vision.hidden_size)),
        TensorSpec("counts", "int64", (seen, vision.num_hidden_layers + 1)),
        *(TensorSpec(f"kept.{i}", "int64", (seen, after)) for i, (n, after) in points if n > schedule.tokens),
        *([TensorSpec("tile_kept", "int64", (seen, schedule.tokens))] if seen != "images" else []),
    )
    return replace(contract, outputs=(*contract.outputs, *specs))


class _Tower:
    """CLIP's layers and LLaVA's projector as nodes; method by method what flowcut/vision.py does in torch."""

    def __init__(self, b: GraphBuilder, weights: Weights, precision: str, ranges: Ranges | None) -> None:
        self._b, self._weights, self._precision = b, weights, precision
        self._linear = Linear(b, weights, precision, ranges)
        self._config = weights.config.vision
        self.dtype = NUMPY_DTYPE[precision]

    def embed(self, pixel_values: ir.Value) -> ir.Value:
        """[images, 3, S, S] -> [images, N+1, hidden]."""
        b, c = self._b, self._config
        with b.scope("embeddings"):
            kernel = self._weight(TOWER + "embeddings.patch_embedding.weight")
            x = b.op("Conv", pixel_values, kernel, strides=[c.patch_size] * 2, kernel_shape=[c.patch_size] * 2)
            x = b.op("Transpose", b.op("Reshape", x, b.const([0, c.hidden_size, c.patches], "int64")), perm=[0, 2, 1])
            # A zero row for CLS; its embedding is in row 0 of the positions, so no Expand over images is needed.
            x = b.op("Pad", x, b.const([0, 1, 0, 0, 0, 0], "int64"))
            positions = b.computed_weight(
                TOWER + "embeddings.position_embedding+class",
                (c.patches + 1, c.hidden_size),
                self._precision,
                self._positions,
            )
            return self._layer_norm(b.op("Add", x, positions), TOWER + "pre_layrnorm")

    def heads(self, i: int, hidden: ir.Value) -> list[ir.Value]:
        """q, k, v of layer i as [images, H, N+1, d]."""
        b, c, layer = self._b, self._config, f"{TOWER}encoder.layers.{i}."
        x = self._layer_norm(hidden, layer + "layer_norm1")
        split = b.const([0, -1, c.num_attention_heads, c.head_size], "int64")
        rows = (self._linear(x, f"{layer}self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj"))
        return [b.op("Transpose", b.op("Reshape", x, split), perm=[0, 2, 1, 3]) for x in rows]

    def finish_layer(self, i: int, hidden: ir.Value, attended: ir.Value) -> ir.Value:
        """Output projection and MLP with their residuals: [images, N+1, hidden]."""
        b, layer = self._b, f"{TOWER}encoder.layers.{i}."
        x = b.op("Transpose", attended, perm=[0, 2, 1, 3])
        x = b.op("Reshape", x, b.const([0, -1, self._config.hidden_size], "int64"))
        hidden = b.op("Add", hidden, self._linear(x, layer + "self_attn.out_proj"))
        x = self._linear(self._layer_norm(hidden, layer + "layer_norm2"), layer + "mlp.fc1")
        x = b.op("Mul", x, b.op("Sigmoid", b.op("Mul", x, b.const(1.702, NUMPY_DTYPE[self._precision]))))  # quick_gelu
        return b.op("Add", hidden, self._linear(x, layer + "mlp.fc2"))

    def project(self, features: ir.Value) -> ir.Value:
        """[images, T, hidden] -> [images, T, text hidden]."""
        with self._b.scope("projector"):
            x = self._linear(features, "multi_modal_projector.linear_1")
            return self._linear(self._b.op("Gelu", x), "multi_modal_projector.linear_2")

    def newline(self) -> ir.Value:
        """LLaVA-NeXT's image_newline, [1, text hidden]."""
        row = (1, self._weights.config.text.hidden_size)
        return self._b.computed_weight(NEWLINE, row, self._precision, lambda: self._weights.load(NEWLINE).reshape(row))

    def _positions(self) -> np.ndarray:
        positions = self._weights.load(TOWER + "embeddings.position_embedding.weight").astype(np.float32)
        positions[0] += self._weights.load(TOWER + "embeddings.class_embedding").astype(np.float32)
        return positions

    def _layer_norm(self, x: ir.Value, name: str) -> ir.Value:
        gain, bias = self._weight(name + ".weight"), self._weight(name + ".bias")
        return self._b.op("LayerNormalization", x, gain, bias, axis=-1, epsilon=self._config.layer_norm_eps)

    def _weight(self, name: str) -> ir.Value:
        return self._b.weight(self._weights, name, self._precision)
