"""`flowcut prune` in eager PyTorch, float32, with any schedule: the tower, and the language model as far as it drops.

Of the language model that is the first layer, and of the second what its scores are made of. A tensor is read when it
is needed, and of the token embeddings only the prompt's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engines.prune_question import Asked
from engines.prune_result import Floats, Integers, Pruned
from flowcut.aliases import Model
from flowcut.anyres import Tiling, kept_patches, patch_places
from flowcut.budget import PRUNE_LAYER
from flowcut.checkpoint import Weights
from flowcut.language import DecoderLayer, KVCache, LanguageModel, Step
from flowcut.language_pruning import Span, best_tokens
from flowcut.loading import load_module
from flowcut.packing import pack
from flowcut.schedule import Schedule
from flowcut.tensors import check_finite
from flowcut.vision import VisionModel, VisionOutput

PREFIX = "language_model."
EMBEDDINGS = f"{PREFIX}model.embed_tokens.weight"
Seen = tuple[Tensor, Integers]
"""A picture's visual tokens [n, D], and the patch of each: its number, or of LLaVA-NeXT its place."""


@torch.inference_mode()
def prune_torch(
    model: Model, schedule: Schedule, pixels: Floats, tilings: Sequence[Tiling] = (), asked: Asked | None = None
) -> Pruned:
    """See engines.prune. `tilings`: of LLaVA-NeXT's pictures, whose tiles `pixels` are."""
    output, seen = _see(model, schedule, pixels, tilings, asked is not None)
    kept = output.kept.numpy()
    left = None if asked is None else _left(model.weights, seen, asked)
    return Pruned(
        kept,
        output.counts.numpy(),
        output.features.numpy(),
        [(layer, [numbers.numpy() for numbers in each]) for layer, each in output.trace],
        tilings,
        merge(kept, tilings),
        [kept_patches(places) for places in left] if left is not None and tilings else left,
    )


def merge(kept: Integers, tilings: Sequence[Tiling]) -> list[Integers]:
    """What is kept of each picture, its tiles put together, from what is kept [tiles, K] of each tile."""
    pictures, first = [], 0
    for tiling in tilings:
        places = np.take_along_axis(patch_places(tiling), kept[first : first + tiling.tiles], 1)
        pictures.append(kept_patches(np.sort(places, axis=None)))
        first += tiling.tiles
    return pictures


def _see(
    model: Model, schedule: Schedule, pixels: Floats, tilings: Sequence[Tiling], projected: bool
) -> tuple[VisionOutput, list[Seen]]:
    """What the tower returns and, if wanted, each picture's visual tokens."""
    vision = VisionModel.from_weights(model.weights)
    output = vision.features(torch.from_numpy(pixels), schedule)
    if not projected:
        return output, []
    embeds = vision.multi_modal_projector(output.features)
    if not tilings:
        return output, [(tokens, kept.numpy()) for tokens, kept in zip(embeds, output.kept, strict=True)]
    counts = [tiling.tiles for tiling in tilings]
    parts = zip(torch.split(embeds, counts), torch.split(output.kept, counts), tilings, strict=True)
    packed = (pack(tokens, kept, tiling, vision.image_newline) for tokens, kept, tiling in parts)
    return output, [(tokens, places.numpy()) for tokens, places in packed]


def _left(weights: Weights, pictures: Sequence[Seen], asked: Asked) -> list[Integers]:
    """Of each picture's patches those that the language model leaves."""
    language, table = _first_layers(weights), weights.load(EMBEDDINGS)
    left = []
    for tokens, numbers in pictures:
        encoded = asked.encode(len(tokens), len(tokens))
        text = table[encoded.input_ids[encoded.image_rows < 0]]
        check_finite(EMBEDDINGS, text)
        start, count = (int(n) for n in encoded.spans[0])
        words = torch.from_numpy(text.astype(np.float32))
        prompt = torch.cat([words[:start], tokens, words[start:]])[None]
        left.append(numbers[_chosen(language, prompt, (start, count), asked.llm_tokens)])
    return left


def _first_layers(weights: Weights) -> LanguageModel:
    """With weights in all that comes before the scores, and in nothing else."""
    with torch.device("meta"):
        language = LanguageModel(replace(weights.config.text, num_hidden_layers=PRUNE_LAYER + 1))
    scoring = f"model.layers.{PRUNE_LAYER}."
    whole = [f"model.layers.{i}" for i in range(PRUNE_LAYER)]
    for name in (*whole, f"{scoring}input_layernorm", f"{scoring}self_attn"):
        load_module(language.get_submodule(name), weights, f"{PREFIX}{name}.", torch.float32, "cpu")
    return language


def _chosen(language: LanguageModel, prompt: Tensor, span: Span, tokens: int) -> Integers:
    """Numbers of the span's tokens that stay, counted from its first. prompt: [1, S, D]."""
    length, config = prompt.shape[1], language.config
    positions = torch.arange(length)[None]
    entering = language.through(range(PRUNE_LAYER), prompt, positions, KVCache.allocate(config, 1, length))
    layer = language.model.layers[PRUNE_LAYER]
    assert isinstance(layer, DecoderLayer)
    step = Step.at(positions, config, entering.dtype)
    _, keys, values = layer.self_attn.project(layer.input_layernorm(entering), step)
    chosen: Integers = best_tokens(layer, config, entering, (keys, values), span, tokens).numpy()
    return chosen
