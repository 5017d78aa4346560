"""Every graph's inputs and outputs: name, dtype, named dimensions and their ranges.

One name per tensor, everywhere: the exporter writes these names, the builder makes its optimization
profile from these ranges, the runtime feeds these arrays, verify compares these outputs.

`vision` runs once per batch of pictures, `language` once per prefill (sequence = padded prompt length) and once
per decode step (sequence = 1). A sequence is right-padded; `position_ids` count 0, 1, 2, .. from its own start, so a
cached key takes part in attention exactly where its cache row is at most the query's position.

Where visual tokens are dropped inside the decoder, layers from index 2 on have a sequence of their own,
`pruned_sequence`, with its own positions and a smaller cache. Which rows it takes is computed in the graph; how many of
them mean something is returned as `pruned_lengths`, since LLaVA-NeXT's visual tokens are only counted on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from flowcut.anyres import image_slots, newline_slots
from flowcut.budget import PRUNE_LAYER
from flowcut.config import NUMPY_DTYPE, LlavaConfig
from flowcut.errors import ConfigError

Dim = int | str


@dataclass(frozen=True)
class Range:
    """Least, typical and greatest value of a named dimension: an optimization profile's min, opt and max."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(f"range must satisfy 1 <= min <= opt <= max, got {self.min}, {self.opt}, {self.max}.")


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output. `dtype` is a numpy dtype name; a str dimension is dynamic."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete shape once the named dimensions are known."""
        return tuple(d if isinstance(d, int) else sizes[d] for d in self.dims)


@dataclass(frozen=True)
class GraphContract:
    """A graph's name, inputs, outputs and the ranges of its named dimensions."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, Range] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """What an engine is built for. Lengths in tokens; a prompt's length counts its visual tokens."""

    max_batch: int = 4
    max_images: int = 4
    max_prompt: int = 256
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")

    @property
    def cache_rows(self) -> int:
        """Rows of the KV cache of one sequence."""
        return self.max_prompt + self.max_new_tokens


def exchange_dtype(precision: str) -> str:
    """What a graph of this precision takes and returns, its cache aside. numpy, on the host, knows no bfloat16."""
    return "float32" if precision == "bf16" else NUMPY_DTYPE[precision]


def itemsize(dtype: str) -> int:
    """Bytes of one element of a TensorSpec's dtype."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def vision_contract(
    config: LlavaConfig, tokens: int, precision: str, limits: Limits, language: str | None = None
) -> GraphContract:
    """pixel_values -> image_embeds, kept. `kept` are patch numbers 0..grid*grid-1 in ascending order.

    For LLaVA-NeXT `tokens` are of a tile, `images` are pictures, whose tiles are the rows of pixel_values, and further
    inputs say how they belong together (flowcut.anyres.VisionFeeds). Each picture's visual tokens come first in
    image_embeds, image_lengths of them; `kept` are their places in its reading order (flowcut.anyres), then NO_TOKEN.

    language: the decoder's precision, whose type image_embeds have; None: the same.
    """
    vision, slots = config.vision, image_slots(config, tokens)
    embeds = TensorSpec(
        "image_embeds", exchange_dtype(language or precision), ("images", slots, config.text.hidden_size)
    )
    kept, images = TensorSpec("kept", "int64", ("images", slots)), Range(1, 1, limits.max_images)
    pixels, dtype = (3, vision.image_size, vision.image_size), exchange_dtype(precision)
    if not config.anyres:
        inputs = (TensorSpec("pixel_values", dtype, ("images", *pixels)),)
        return GraphContract("vision", inputs, (embeds, kept), {"images": images})
    most = config.max_tiles
    return GraphContract(
        name="vision",
        inputs=(
            TensorSpec("pixel_values", dtype, ("tiles", *pixels)),
            TensorSpec("tile_places", "int64", ("tiles", vision.patches)),
            TensorSpec("image_tiles", "int64", ("images", most)),
            TensorSpec("newline_places", "int64", ("images", newline_slots(config, tokens))),
        ),
        outputs=(embeds, kept, TensorSpec("image_lengths", "int64", ("images",))),
        ranges={"tiles": Range(1, most, most * limits.max_images), "images": images},
    )


def language_contract(
    config: LlavaConfig, tokens: int, precision: str, limits: Limits, llm_tokens: int | None = None
) -> GraphContract:
    """The whole decoder as one graph.

    image_rows holds, per position, the row of image_embeds seen as [images*slots, hidden], or -1 for a text token.
    last_token holds, per sequence, the index along `sequence` whose logits are wanted.
    past.* and present.* are the same buffers: each step writes `sequence` rows at position_ids[:, 0].

    With llm_tokens, the visual tokens that each picture keeps after layer index 1:
        image_spans: per picture its sequence, the index along `sequence` of its first row, and how many rows it has
            there; a picture of no sequence (as in a decode step) has 0 rows.
        image_lengths (LLaVA-NeXT): how many of a picture's rows are visual tokens, as vision returns it. The graph
            closes the gaps: it moves what follows up, so positions 0, 1, 2, .. count real tokens only.
        pruned_position_ids: positions, and so cache rows, of layers from index 2 on. In a prefill as many as the
            longest sequence has once each picture has at most llm_tokens rows.
        lengths, pruned_lengths: the tokens of this run that are real, in the first two layers and in the others.
        kept_tokens: per picture the numbers of those that stay, counted from its first and ascending; only the first
            min(llm_tokens, its tokens) mean something.
    The source that scores them is the token at last_token: a prompt is its instruction.
    """
    return _stage(config, tokens, precision, limits, range(config.text.num_hidden_layers), "language", llm_tokens)


def language_contracts(
    config: LlavaConfig,
    tokens: int,
    precision: str,
    limits: Limits,
    stages: int = 1,
    llm_tokens: int | None = None,
) -> tuple[GraphContract, ...]:
    """The decoder as `stages` graphs of consecutive layers, to be run one after the other; one stage is `language`.

    The first, `language.0`, takes what `language` takes but for last_token, and returns `hidden.<layer>`, which the
    next takes with position_ids; the last takes last_token too and returns logits. Each has its own layers' cache.
    With llm_tokens the first has the two layers before the pruning and last_token; the others take
    pruned_position_ids, and the last pruned_lengths in place of last_token.

    Raises:
        ConfigError: fewer layers than stages.
    """
    layers, least = config.text.num_hidden_layers, 1 if llm_tokens is None else PRUNE_LAYER + 1
    most = layers - least + 1
    if not 1 <= stages <= most:
        which = "the decoder's layers" if least == 1 else f"the first has {least} of {layers} decoder layers"
        raise ConfigError(f"stages must be in 1..{most} ({which}), got {stages}.")
    cuts = [0, *(max(round(layers * i / stages), least + i - 1) for i in range(1, stages)), layers]
    parts = zip(stage_names(stages), pairwise(cuts), strict=True)
    return tuple(_stage(config, tokens, precision, limits, range(*cut), name, llm_tokens) for name, cut in parts)


def pruned_limit(config: LlavaConfig, tokens: int, llm_tokens: int, limits: Limits) -> int:
    """Longest prompt in the layers after the pruning: one of max_prompt tokens with one picture as large as can be.

    Raises:
        ConfigError: max_prompt has no room for such a picture and one token of text.
    """
    dropped = max(0, image_slots(config, tokens) - llm_tokens)
    if limits.max_prompt <= dropped:
        raise ConfigError(
            f"max_prompt must be at least {dropped + 1} where up to {dropped} visual tokens of a picture are dropped "
            f"inside the language model, got {limits.max_prompt}."
        )
    return limits.max_prompt - dropped


def stage_names(stages: int) -> tuple[str, ...]:
    """Names of the decoder's graphs."""
    return ("language",) if stages == 1 else tuple(f"language.{i}" for i in range(stages))


def _stage(
    config: LlavaConfig,
    tokens: int,
    precision: str,
    limits: Limits,
    layers: range,
    name: str,
    llm_tokens: int | None,
) -> GraphContract:
    text, dtype, pruned = config.text, exchange_dtype(precision), llm_tokens is not None
    first, last = layers.start == 0, layers.stop == text.num_hidden_layers
    prunes = first and pruned
    in_dim, out_dim = (
        "sequence" if first or not pruned else "pruned_sequence",
        "pruned_sequence" if pruned else "sequence",
    )
    images, slots = "images", image_slots(config, tokens)
    position_ids = TensorSpec("position_ids", "int64", ("batch", "sequence"))
    pruned_position_ids = TensorSpec("pruned_position_ids", "int64", ("batch", "pruned_sequence"))
    per_sequence = {n: TensorSpec(n, "int64", ("batch",)) for n in ("last_token", "lengths", "pruned_lengths")}
    lengths = TensorSpec("image_lengths", "int64", (images,))
    begin = (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        position_ids,
        TensorSpec("image_rows", "int64", ("batch", "sequence")),
        *([per_sequence["last_token"]] if last or prunes else []),
        TensorSpec("image_embeds", dtype, (images, slots, text.hidden_size)),
        *([TensorSpec("image_spans", "int64", (images, 3))] if prunes else []),
        *([lengths] if prunes and config.anyres else []),
        *([pruned_position_ids] if prunes else []),
    )
    ending = [per_sequence["pruned_lengths" if pruned else "last_token"]] if last else []
    go_on = (
        pruned_position_ids if pruned else position_ids,
        *ending,
        TensorSpec(hidden_name(layers.start), dtype, ("batch", in_dim, text.hidden_size)),
    )
    leaving = TensorSpec(hidden_name(layers.stop), dtype, ("batch", out_dim, text.hidden_size))
    found = (per_sequence["lengths"], per_sequence["pruned_lengths"]) if prunes else ()
    kept = (TensorSpec("kept_tokens", "int64", (images, min(llm_tokens or 0, slots))),) if prunes else ()
    early, late = Range(1, limits.max_prompt, limits.max_prompt), Range(1, 1, 1)
    if llm_tokens is not None:
        most = pruned_limit(config, tokens, llm_tokens, limits)
        late = Range(1, most, most)
    cache = {i: _cache(config, limits, late.max if pruned and i > PRUNE_LAYER else early.max) for i in layers}
    return GraphContract(
        name=name,
        inputs=(
            *(begin if first else go_on),
            *(TensorSpec(n, NUMPY_DTYPE[precision], cache[i]) for i in layers for n in past_names(i)),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", text.vocab_size)) if last else leaving,
            *found,
            *kept,
            *(TensorSpec(n, NUMPY_DTYPE[precision], cache[i]) for i in layers for n in present_names(i)),
        ),
        ranges={
            "batch": Range(1, 1, limits.max_batch),
            **({"images": Range(1, 1, limits.max_images)} if first else {}),
            **({"sequence": early} if in_dim == "sequence" else {}),
            **({"pruned_sequence": late} if pruned else {}),
        },
    )


def _cache(config: LlavaConfig, limits: Limits, longest_prompt: int) -> tuple[Dim, ...]:
    text = config.text
    return ("batch", text.num_key_value_heads, longest_prompt + limits.max_new_tokens, text.head_size)


def cached_layers(contract: GraphContract) -> list[int]:
    """Decoder layers whose cache a graph holds, in order."""
    return [int(s.name.split(".")[1]) for s in contract.inputs if s.name.startswith("past.") and s.name.endswith("key")]


def hidden_name(layer: int) -> str:
    """What passes from one stage to the next: the hidden states [B, S, D] that enter a decoder layer."""
    return f"hidden.{layer}"


def past_names(layer: int) -> tuple[str, str]:
    """Cache inputs of a decoder layer: keys, values."""
    return f"past.{layer}.key", f"past.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Cache outputs of a decoder layer, bound to the buffers of `past_names`."""
    return f"present.{layer}.key", f"present.{layer}.value"
