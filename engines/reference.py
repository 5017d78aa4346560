"""The torch modules as Polygraphy runners: what `verify` compares ONNX Runtime with.

They compute in float32 from the weights as the graph holds them, rounded to its precision, so that what is left to
differ is arithmetic. Rounding to int8, int4 and FP8 is calib.rounding's, as in the graph: a wrong rule there shows in
its own tests, not here. Tensors come and go in the contract's types. Imported by verify only: needs torch, polygraphy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from torch import Tensor, nn

from calib.groups import linear_layers
from calib.rounding import fp8_scale, round_weight
from engines.comparison import Led
from engines.sessions.session import Array
from flowcut.checkpoint import Weights
from flowcut.config import NUMPY_DTYPE, QUANTIZED, LlavaConfig, TextConfig
from flowcut.contract import GraphContract, cached_layers, hidden_name, past_names, present_names
from flowcut.language import LanguageModel, Step
from flowcut.loading import load_module
from flowcut.schedule import Schedule, drop_count, layers_left
from flowcut.scoring import FlowScore, running_score
from flowcut.tensors import numpy_dtype
from flowcut.vision import VisionModel

_CLASS, _POSITIONS = (
    f"vision_tower.vision_model.embeddings.{name}" for name in ("class_embedding", "position_embedding.weight")
)
_PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_FP8_MAX = 448.0


@dataclass(frozen=True)
class ExportedWeights:
    """A checkpoint's tensors with the graph's rounding, in float32; AWQ's scales, if any, are in `source` already.

    Attributes:
        precision: the graph's.
        ranges: the largest input of each linear layer, for fp8.
    """

    source: Weights
    precision: str
    ranges: Mapping[str, float] = field(default_factory=dict)

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
        if self.precision in QUANTIZED and name.removesuffix(".weight") in self._linear:
            return self._quantized(name)
        array = self.source.load(name).astype(np.float32)
        if name == _CLASS:
            return np.zeros_like(array)
        if name == _POSITIONS:
            array[0] += self.source.load(_CLASS).astype(np.float32)
        return array.astype(numpy_dtype(NUMPY_DTYPE[self.precision])).astype(np.float32)

    def input_scale(self, layer: str) -> float | None:
        """What a linear layer's input is divided by before it is rounded to FP8; None where it is not."""
        if self.precision != "fp8" or layer not in self._linear:
            return None
        return fp8_scale(max(self.ranges[name] for name in product_of(layer)))

    @cached_property
    def _linear(self) -> frozenset[str]:
        return frozenset(linear_layers(self.config))

    def _quantized(self, name: str) -> Array:
        """Layers of one product share FP8's one scale; the scales of int8 and int4 are each output's own."""
        if self.precision != "fp8":
            return round_weight(self.source.load(name), self.precision).widened()
        weights = {part: self.source.load(f"{part}.weight") for part in product_of(name.removesuffix(".weight"))}
        together = round_weight(np.concatenate(list(weights.values())), "fp8").widened()
        rows = np.cumsum([len(weight) for weight in weights.values()])[:-1]
        return dict(zip(weights, np.split(together, rows), strict=True))[name.removesuffix(".weight")]


def product_of(layer: str) -> tuple[str, ...]:
    """The linear layers that are one product with `layer` in the graph: the decoder's q, k, v and its gate, up."""
    parent, _, leaf = layer.rpartition(".")
    for leaves in _PRODUCTS:
        if leaf in leaves and layer.startswith("language_model."):
            return tuple(f"{parent}.{name}" for name in leaves)
    return (layer,)


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """What both graphs share: the contract as Polygraphy's metadata."""

    def __init__(self, weights: ExportedWeights, contract: GraphContract) -> None:
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


class LedImage(NamedTuple):
    """One image of `TorchVision.lead`: embeds [1, T, D], the patches kept [T], and the gaps of Led."""

    embeds: Tensor
    kept: Tensor
    gaps: tuple[float, float, float]


class TorchVision(TorchRunner):
    """Tower and projector."""

    def __init__(self, weights: ExportedWeights, contract: GraphContract, schedule: Schedule) -> None:
        super().__init__(weights, contract)
        self.schedule = schedule

    def activate_impl(self) -> None:
        self.model = VisionModel.from_weights(self.weights)
        round_inputs(self.model, "", self.weights)

    @torch.inference_mode()
    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        pixels = torch.from_numpy(feed_dict["pixel_values"]).float()
        image_embeds, kept = self.model(pixels, self.schedule)
        return self.typed({"image_embeds": image_embeds, "kept": kept})

    @torch.inference_mode()
    def lead(self, pixel_values: Array, kept: Sequence[Array], score_gap: float) -> Led:
        """image_embeds had these patches been kept, and the score gaps that tell whether they might have been.

        Wherever something is dropped, `kept` [T] of each image stay and the best of the others fill up. Following
        another runner's choices keeps one flipped rank from changing every score after it.
        """
        pixels = torch.from_numpy(pixel_values).float()
        images = [self.lead_one(p[None], torch.from_numpy(k), score_gap) for p, k in zip(pixels, kept, strict=True)]
        widest, firm, closest = zip(*(image.gaps for image in images), strict=True)
        return Led([image.embeds[0].numpy() for image in images], max(widest), max(firm), min(closest))

    def lead_one(self, pixels: Tensor, wanted: Tensor, score_gap: float, free: Tensor | None = None) -> LedImage:
        """One image [1, 3, S, S]. `free` are patches of which nobody can see whether they were kept: at the last point
        the best of them fill up what `wanted` leaves."""
        tower = self.model.vision_tower["vision_model"]
        points = self.schedule.points(tower.config.num_hidden_layers)
        scored_layers = self.schedule.scored_layers(tower.config.num_hidden_layers)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        numbers, running = torch.arange(self.schedule.patches), None
        widest, firm, closest = 0.0, 0.0, float("inf")
        for i, layer in enumerate(tower.encoder["layers"]):
            q, k, v = layer.project(hidden)
            hidden = layer(hidden, q, k, v, None)
            if len(numbers) == self.schedule.tokens or i not in scored_layers:
                continue
            scored = running_score(self.schedule, running, q, k, v)
            running = scored.score
            if i in points:
                keep = self._keep(points, i, len(numbers), scored)
                if free is not None and keep == self.schedule.tokens:
                    wanted = _filled(running[0], numbers, wanted, free, keep)
                rows, gap, call = choose(running[0], torch.isin(numbers, wanted), keep)
                widest, firm = max(widest, gap), max(firm, gap) if closest > score_gap else firm
                closest = min(closest, call)
                numbers, running = numbers[rows], running[:, rows]
                hidden = torch.cat([hidden[:, :1], hidden[:, 1:][:, rows]], 1)
        return LedImage(self.model.multi_modal_projector(hidden[:, 1:]), numbers, (widest, firm, closest))

    def _keep(self, points: list[int], layer: int, patches: int, scored: FlowScore) -> int:
        capacity = self.schedule.counts[points.index(layer)]
        if self.schedule.kind == "static":
            return capacity
        left = layers_left(len(self.model.vision_tower["vision_model"].encoder["layers"]) + 1, layer)
        return min(capacity, patches - drop_count(patches, self.schedule.tokens, left, float(scored.entropy_ratio[0])))


class TorchLanguage(TorchRunner):
    """The decoder's layers whose cache the contract has, with what is before the first and after the last of all.

    The cache comes and goes as past.* and present.*. Rotary tables are rounded as the graph's are.
    """

    def activate_impl(self) -> None:
        with torch.device("meta"):
            self.model = self.build()
        for name in self._modules():
            part = self.model.get_submodule(name)
            load_module(part, self.weights, f"language_model.{name}.", torch.float32, "cpu")
        round_inputs(self.model, "language_model.", self.weights)

    def build(self) -> LanguageModel:
        """Without its weights."""
        return LanguageModel(self.weights.config.text)

    def _modules(self) -> list[str]:
        names = {s.name for s in (*self.contract.inputs, *self.contract.outputs)}
        head = "model.embed_tokens" if self.weights.config.text.tie_word_embeddings else "lm_head"
        first = ["model.embed_tokens"] if "input_ids" in names else []
        last = ["model.norm", head] if "logits" in names else []
        return [*first, *(f"model.layers.{i}" for i in cached_layers(self.contract)), *last]

    @torch.inference_mode()
    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: torch.from_numpy(array) for name, array in feed_dict.items()}
        layers, outputs = cached_layers(self.contract), dict[str, Tensor]()
        positions = feeds["pruned_position_ids" if "pruned_position_ids" in feeds else "position_ids"]
        step = rounded_step(positions, self.weights.config.text, self.weights.precision)
        given = feeds.get(hidden_name(layers[0]))
        hidden = self._embed(feeds) if given is None else given.float()
        for i in layers:
            cache = [feeds[name].to(torch.float32, copy=True) for name in past_names(i)]
            hidden = self.model.model.layers[i](hidden, step, *cache)
            outputs |= dict(zip(present_names(i), cache, strict=True))
        last = feeds["pruned_lengths"] - 1 if "pruned_lengths" in feeds else feeds.get("last_token")
        if last is not None:
            return self.typed(outputs | {"logits": self.model.logits(hidden, last)})
        return self.typed(outputs | {hidden_name(layers[-1] + 1): hidden})

    def _embed(self, feeds: Mapping[str, Tensor]) -> Tensor:
        embedded: Tensor = self.model.embed(feeds["input_ids"], feeds["image_rows"], feeds["image_embeds"].float())
        return embedded


def rounded_step(position_ids: Tensor, config: TextConfig, precision: str) -> Step:
    """The step for tokens at these positions, its rotary tables float32 but rounded as a graph's of this precision."""
    step = Step.at(position_ids, config, getattr(torch, NUMPY_DTYPE[precision]))
    return replace(step, cos=step.cos.float(), sin=step.sin.float())


def round_inputs(model: nn.Module, prefix: str, weights: ExportedWeights) -> None:
    """Make linear layers round their input to FP8 where the graph does; `prefix` + a module's name is the layer's."""
    for name, module in model.named_modules():
        if (scale := weights.input_scale(prefix + name)) is not None:
            module.register_forward_pre_hook(partial(_rounded_input, scale))


def _rounded_input(scale: float, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """QuantizeLinear, which divides in the graph's float16 and saturates, and DequantizeLinear."""
    scaled = (inputs[0].half() / torch.tensor(scale, dtype=torch.float16)).float()
    # Saturation first: torch's conversion would make NaN of what is too large.
    return scaled.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def _filled(scores: Tensor, numbers: Tensor, wanted: Tensor, free: Tensor, keep: int) -> Tensor:
    """`wanted`, with the best of `free` up to `keep` patches. scores, numbers: [N], of the patches still there."""
    missing = max(0, keep - int(torch.isin(numbers, wanted).sum()))
    order = numbers[scores.sort(descending=True, stable=True).indices]
    return torch.cat([wanted, order[torch.isin(order, free)][:missing]])


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
