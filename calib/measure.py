"""A checkpoint in float32, picture by picture through the tower and then layer by layer through the decoder.

The tower is a gigabyte of a 7B checkpoint's 28, so it is held whole. Of the decoder one layer is in memory at a time,
with the hidden states of all samples. Each picture's and each layer's result is kept in case of an interruption.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from calib.awq import search
from calib.dataset import Picture, read_picture, tower_pixels
from calib.groups import DECODER, Group, decoder_groups, vision_groups
from calib.inputs import Inputs, Pick
from calib.partial import Partial
from flowcut.anyres import choose_tiling
from flowcut.budget import PRUNE_LAYER
from flowcut.checkpoint import Weights
from flowcut.config import TextConfig
from flowcut.errors import CheckpointError
from flowcut.language import DecoderLayer, Step
from flowcut.language_pruning import best_tokens, without_dropped
from flowcut.loading import load_module
from flowcut.preprocess import ImageSettings
from flowcut.prompt import Encoded
from flowcut.schedule import Schedule
from flowcut.tensors import Array, check_finite, narrowed
from flowcut.vision import VisionModel

SAMPLED = 512
"""Tokens on which a group's outputs are compared."""
EMBEDDING = "language_model.model.embed_tokens.weight"


@dataclass(frozen=True)
class Sample:
    """A picture and the prompt about it, in which one token stands for the picture."""

    picture: Picture
    prompt: Encoded

    @property
    def around(self) -> tuple[Array, Array]:
        """Token ids before the picture and after it."""
        place = int(self.prompt.spans[0, 0])
        return self.prompt.input_ids[:place], self.prompt.input_ids[place + 1 :]

    def pick(self, count: int) -> Pick:
        """Chooses `count` tokens of this sample, the same for the same picture."""

        def chosen(tokens: int) -> Array:
            random = np.random.Generator(np.random.PCG64(int(self.picture.sha256[:16], 16)))
            return np.sort(random.permutation(tokens)[:count])

        return chosen


@dataclass
class Measured:
    """Results so far: see calib.calibration.Calibration, and errors by group as in calib.awq.Found."""

    ranges: dict[str, float] = field(default_factory=dict)
    scales: dict[str, Array] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, inputs: Inputs, groups: Iterable[Group], module: nn.Module, prefix: str) -> None:
        """Take ranges, and find a scale for each group, whose layers are in `module`."""
        self.ranges |= inputs.largest
        for group in groups:
            weights = [module.get_parameter(f"{layer.removeprefix(prefix)}.weight").numpy() for layer in group.layers]
            for layer, weight in zip(group.layers, weights, strict=True):
                narrowed(f"{layer}.weight", weight, np.float16, "int4")
            found = search(weights, inputs.sample(group.name), inputs.mean(group.name))
            self.scales[group.name] = found.scale
            self.errors[group.name] = {"before": _short(found.before), "after": _short(found.after)}

    def saved(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Tensors and JSON that `restored` takes."""
        tensors = {f"scales.{name}": scale for name, scale in self.scales.items()}
        return tensors, {"ranges": self.ranges, "errors": self.errors}

    @staticmethod
    def restored(tensors: dict[str, Array], info: dict[str, Any]) -> Measured:
        """Inverse of `saved`."""
        scales = {name.removeprefix("scales."): t for name, t in tensors.items() if name.startswith("scales.")}
        return Measured(info["ranges"], scales, info["errors"])


@dataclass(frozen=True)
class Bench:
    """What both passes share. `scaled`: whether scales are searched for; llm_tokens: see flowcut.budget.Budget."""

    weights: Weights
    samples: Sequence[Sample]
    scaled: bool
    llm_tokens: int | None
    partial: Partial
    progress: Progress

    def groups(self, groups: Iterable[Group]) -> tuple[Group, ...]:
        return tuple(groups) if self.scaled else ()

    @property
    def tokens_each(self) -> int:
        return -(-SAMPLED // len(self.samples))


def measure_vision(bench: Bench, schedule: Schedule, settings: ImageSettings) -> tuple[Measured, list[Array]]:
    """Ranges and scales of the tower and the projector, and visual tokens [n, D] of every sample.

    Raises:
        CheckpointError: a tensor or an input of a layer that is not finite.
        InputError: a picture that is no longer as it was found.
    """
    config = bench.weights.config
    groups = bench.groups(g for i in range(config.vision.num_hidden_layers - 1) for g in vision_groups(config, i))
    if (saved := bench.partial.get("vision")) is not None:
        tensors, info = saved
        return Measured.restored(tensors, info), [tensors[f"embeds.{i}"] for i in range(len(bench.samples))]
    model = VisionModel.from_weights(bench.weights)
    total, embeds = Inputs(groups), list[Array]()
    for sample in bench.progress.track(bench.samples, description="vision"):
        inputs, embedded = _see(bench, model, groups, sample, schedule, settings)
        total.merge(inputs)
        embeds.append(embedded)
    measured = Measured()
    measured.add(total, bench.progress.track(groups, description="vision: scales"), model, "")
    tensors, info = measured.saved()
    bench.partial.put("vision", tensors | {f"embeds.{i}": e for i, e in enumerate(embeds)}, info)
    return measured, embeds


def measure_language(bench: Bench, measured: Measured, embeds: Sequence[Array]) -> Measured:
    """`measured` with the decoder's ranges and scales.

    Args:
        embeds: [n, D] of every sample.

    Raises:
        CheckpointError: a tensor, or a layer's input or output, that is not finite.
    """
    config, done = bench.weights.config, 0
    if (saved := bench.partial.get("language")) is not None:
        tensors, info = saved
        measured, done = Measured.restored(tensors, info), int(info["layers"])
        hidden = [torch.from_numpy(tensors[f"hidden.{i}"]) for i in range(len(bench.samples))]
    else:
        hidden = _embedded(bench, embeds)
    task = bench.progress.add_task("language", total=config.text.num_hidden_layers, completed=done)
    for i in range(done, config.text.num_hidden_layers):
        hidden = _run_layer(bench, i, hidden, measured)
        tensors, info = measured.saved()
        tensors |= {f"hidden.{n}": state.numpy() for n, state in enumerate(hidden)}
        bench.partial.put("language", tensors, {**info, "layers": i + 1})
        bench.progress.advance(task)
    return measured


def _see(
    bench: Bench,
    model: VisionModel,
    groups: Sequence[Group],
    sample: Sample,
    schedule: Schedule,
    settings: ImageSettings,
) -> tuple[Inputs, Array]:
    """One picture's statistics and visual tokens [n, D]."""
    key = f"vision-{sample.picture.sha256}"
    if (saved := bench.partial.get(key)) is not None:
        return Inputs.restored(groups, *saved), saved[0]["embeds"]
    inputs, image = Inputs(groups), read_picture(sample.picture)
    pixels = torch.from_numpy(tower_pixels(image, settings, model.config))
    with torch.inference_mode(), inputs.watching(model, "", sample.pick(bench.tokens_each)):
        if model.config.anyres:
            embeds = model.see(pixels, choose_tiling(model.config, *image.size), schedule)[0].numpy()
        else:
            embeds = model(pixels, schedule)[0][0].numpy()
    check_finite("image embeddings", embeds)
    tensors, info = inputs.saved()
    bench.partial.put(key, {**tensors, "embeds": embeds}, info)
    return inputs, embeds


def _embedded(bench: Bench, embeds: Sequence[Array]) -> list[Tensor]:
    """Of every sample [1, S, D]: token embeddings, and visual tokens in the picture's place."""
    table, hidden = bench.weights.load(EMBEDDING), []
    for sample, images in zip(bench.samples, embeds, strict=True):
        before, after = (table[ids].astype(np.float32) for ids in sample.around)
        for text in (before, after):
            check_finite(EMBEDDING, text)
        hidden.append(torch.from_numpy(np.concatenate([before, images, after]))[None])
    return hidden


def _run_layer(bench: Bench, index: int, hidden: Sequence[Tensor], measured: Measured) -> list[Tensor]:
    """Every sample's hidden state after layer `index`, whose results are added to `measured`.

    Where visual tokens are dropped inside the decoder, the layers behind see those that the engine's would see.
    """
    text, prefix = bench.weights.config.text, f"{DECODER}{index}."
    with torch.device("meta"):
        layer = DecoderLayer(text)
    layer = load_module(layer, bench.weights, prefix, torch.float32, "cpu")
    groups = bench.groups(decoder_groups(bench.weights.config, index))
    inputs, out = Inputs(groups), []
    for sample, state in zip(bench.samples, hidden, strict=True):
        length = state.shape[1]
        step = Step.at(torch.arange(length)[None], text, torch.float32)
        cache = torch.zeros(2, 1, text.num_key_value_heads, length, text.head_size)
        with torch.inference_mode(), inputs.watching(layer, prefix, sample.pick(bench.tokens_each)):
            out.append(layer(state, step, *cache))
        if index == PRUNE_LAYER and bench.llm_tokens is not None:
            out[-1] = _pruned(layer, text, sample, state, cache, out[-1], bench.llm_tokens)
        if not torch.isfinite(out[-1]).all():
            raise CheckpointError(
                f"output of {prefix.rstrip('.')} must be finite in float32, got NaN or infinity. Mend the checkpoint."
            )
    measured.add(inputs, groups, layer, prefix)
    return out


def _pruned(
    layer: DecoderLayer, text: TextConfig, sample: Sample, entering: Tensor, cache: Tensor, leaving: Tensor, tokens: int
) -> Tensor:
    """`leaving` [1, S, D] without the visual tokens that are dropped."""
    before, after = (len(ids) for ids in sample.around)
    span = (before, entering.shape[1] - before - after)
    with torch.inference_mode():
        kept = best_tokens(layer, text, entering, (cache[0], cache[1]), span, tokens)
        return without_dropped(leaving, [span], [kept])


def _short(error: float) -> float:
    return float(f"{error:.6g}")
