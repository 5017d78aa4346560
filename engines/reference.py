"""The torch modules as Polygraphy runners: what `verify` compares ONNX Runtime with.

They compute in float32 from the weights as the graph holds them, rounded to its precision, so that what is left to
differ is arithmetic. Tensors come and go in the contract's types. Imported by verify only: needs torch and polygraphy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from torch import Tensor

from engines.comparison import Led
from engines.session import Array
from flowcut.checkpoint import Weights
from flowcut.config import NUMPY_DTYPE, LlavaConfig
from flowcut.contract import GraphContract, past_names, present_names
from flowcut.language import KVCache, LanguageModel
from flowcut.schedule import Schedule, drop_count, layers_left
from flowcut.scoring import FlowScore, running_score
from flowcut.vision import VisionModel

_CLASS, _POSITIONS = (
    f"vision_tower.vision_model.embeddings.{name}" for name in ("class_embedding", "position_embedding.weight")
)


@dataclass(frozen=True)
class ExportedWeights:
    """A checkpoint's tensors with the graph's rounding, in float32."""

    source: Weights
    precision: str

    @property
    def config(self) -> LlavaConfig:
        return self.source.config

    @property
    def random(self) -> bool:
        return self.source.random

    @property
    def sha256(self) -> str:
        return self.source.sha256

    def load(self, name: str) -> Array:
        """The graph adds the class embedding to row 0 of the positions before it rounds; so does this."""
        array = self.source.load(name).astype(np.float32)
        if name == _CLASS:
            return np.zeros_like(array)
        if name == _POSITIONS:
            array[0] += self.source.load(_CLASS).astype(np.float32)
        return array.astype(NUMPY_DTYPE[self.precision]).astype(np.float32)


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """What both graphs share: the contract as Polygraphy's metadata."""

    def __init__(self, weights: Weights, contract: GraphContract) -> None:
        super().__init__(name="torch")
        self.weights, self.contract = weights, contract
        self.model: Any = None

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for spec in self.contract.inputs:
            metadata.add(spec.name, np.dtype(spec.dtype), spec.dims)
        return metadata

    def deactivate_impl(self) -> None:
        self.model = None

    def typed(self, outputs: Mapping[str, Tensor]) -> dict[str, Array]:
        """In the contract's types."""
        return {s.name: outputs[s.name].numpy().astype(s.dtype) for s in self.contract.outputs}


class TorchVision(TorchRunner):
    """Tower and projector."""

    def __init__(self, weights: Weights, contract: GraphContract, schedule: Schedule) -> None:
        super().__init__(weights, contract)
        self.schedule = schedule

    def activate_impl(self) -> None:
        self.model = VisionModel.from_weights(self.weights)

    @torch.inference_mode()
    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        pixels = torch.from_numpy(feed_dict["pixel_values"]).float()
        image_embeds, kept = self.model(pixels, self.schedule)
        return self.typed({"image_embeds": image_embeds, "kept": kept})

    @torch.inference_mode()
    def lead(self, pixel_values: Array, kept: Array) -> Led:
        """image_embeds had these patches been kept, and the score gaps that tell whether they might have been.

        Wherever something is dropped, `kept` [images, T] stay and the best of the others fill up. Following another
        runner's choices keeps one flipped rank from changing every score after it.
        """
        pixels = torch.from_numpy(pixel_values).float()
        images = [self._lead(p[None], torch.from_numpy(k)) for p, k in zip(pixels, kept, strict=True)]
        embeds, widest, closest = zip(*images, strict=True)
        return Led(torch.cat(embeds).numpy(), max(widest), min(closest))

    def _lead(self, pixels: Tensor, wanted: Tensor) -> tuple[Tensor, float, float]:
        """One image; see Led."""
        tower = self.model.vision_tower["vision_model"]
        points = self.schedule.points(tower.config.num_hidden_layers)
        scored_layers = self.schedule.scored_layers(tower.config.num_hidden_layers)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        numbers, running = torch.arange(self.schedule.patches), None
        widest, closest = 0.0, float("inf")
        for i, layer in enumerate(tower.encoder["layers"]):
            q, k, v = layer.project(hidden)
            hidden = layer(hidden, q, k, v, None)
            if len(numbers) == self.schedule.tokens or i not in scored_layers:
                continue
            scored = running_score(self.schedule, running, q, k, v)
            running = scored.score
            if i in points:
                keep = self._keep(points, i, len(numbers), scored)
                rows, gap, call = choose(running[0], torch.isin(numbers, wanted), keep)
                widest, closest = max(widest, gap), min(closest, call)
                numbers, running = numbers[rows], running[:, rows]
                hidden = torch.cat([hidden[:, :1], hidden[:, 1:][:, rows]], 1)
        return self.model.multi_modal_projector(hidden[:, 1:]), widest, closest

    def _keep(self, points: list[int], layer: int, patches: int, scored: FlowScore) -> int:
        capacity = self.schedule.counts[points.index(layer)]
        if self.schedule.kind == "static":
            return capacity
        left = layers_left(len(self.model.vision_tower["vision_model"].encoder["layers"]) + 1, layer)
        return min(capacity, patches - drop_count(patches, self.schedule.tokens, left, float(scored.entropy_ratio[0])))


class TorchLanguage(TorchRunner):
    """Decoder and head; the cache comes and goes as past.* and present.*."""

    def activate_impl(self) -> None:
        self.model = LanguageModel.from_weights(self.weights)

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: torch.from_numpy(array) for name, array in feed_dict.items()}
        past = [past_names(i) for i in range(self.weights.config.text.num_hidden_layers)]
        cache = KVCache(*([feeds[pair[which]].to(torch.float32, copy=True) for pair in past] for which in (0, 1)))
        embeds = feeds["image_embeds"].float()
        hidden = self.model(feeds["input_ids"], feeds["position_ids"], feeds["image_rows"], embeds, cache)
        outputs = {"logits": self.model.logits(hidden, feeds["last_token"])}
        for i, pair in enumerate(zip(cache.keys, cache.values, strict=True)):
            outputs |= dict(zip(present_names(i), pair, strict=True))
        return self.typed(outputs)


def choose(scores: Tensor, wanted: Tensor, keep: int) -> tuple[Tensor, float, float]:
    """Rows to keep: those wanted, then the best others; ascending.

    Args:
        scores: [N] float32, 0 or more; wanted: [N] bool, at most `keep` of them.

    Returns:
        Rows [keep], and of this one point Led's widest_gap and closest_call.
    """
    order = scores.sort(descending=True, stable=True).indices
    best, scale = order[:keep], max(float(scores[order[keep - 1]]), torch.finfo(torch.float32).tiny)
    rows = scores.masked_fill(wanted, torch.inf).sort(descending=True, stable=True).indices[:keep]
    call = float(scores[order[keep - 1]] - scores[order[keep]]) / scale if keep < len(order) else float("inf")
    out, into = best[~torch.isin(best, rows)], rows[~torch.isin(rows, best)]
    gap = float(scores[out].max() - scores[into].min()) / scale if len(out) else 0.0
    return rows.sort().values, gap, call
