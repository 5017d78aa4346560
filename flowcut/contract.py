"""Every graph's inputs and outputs: name, dtype, named dimensions and their ranges.

One name per tensor, everywhere: the exporter writes these names, the builder makes its optimization
profile from these ranges, the runtime feeds these arrays, verify compares these outputs.

`vision` runs once per batch of pictures, `language` once per prefill (sequence = padded prompt length) and once
per decode step (sequence = 1). A sequence is right-padded; `position_ids` count 0, 1, 2, .. from its own start, so a
cached key takes part in attention exactly where its cache row is at most the query's position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

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

    language: the decoder's precision, whose type image_embeds have; None: the same.
    """
    size = config.vision.image_size
    embeds = exchange_dtype(language or precision)
    return GraphContract(
        name="vision",
        inputs=(TensorSpec("pixel_values", exchange_dtype(precision), ("images", 3, size, size)),),
        outputs=(
            TensorSpec("image_embeds", embeds, ("images", tokens, config.text.hidden_size)),
            TensorSpec("kept", "int64", ("images", tokens)),
        ),
        ranges={"images": Range(1, 1, limits.max_images)},
    )


def language_contract(config: LlavaConfig, tokens: int, precision: str, limits: Limits) -> GraphContract:
    """The whole decoder as one graph.

    image_rows holds, per position, the row of image_embeds seen as [images*tokens, hidden], or -1 for a text token.
    last_token holds, per sequence, the index along `sequence` whose logits are wanted.
    past.* and present.* are the same buffers: each step writes `sequence` rows at position_ids[:, 0].
    """
    return _stage(config, tokens, precision, limits, range(config.text.num_hidden_layers), "language")


def language_contracts(
    config: LlavaConfig, tokens: int, precision: str, limits: Limits, stages: int = 1
) -> tuple[GraphContract, ...]:
    """The decoder as `stages` graphs of consecutive layers, to be run one after the other; one stage is `language`.

    The first, `language.0`, takes what `language` takes but for last_token, and returns `hidden.<layer>`, which the
    next takes with position_ids; the last takes last_token too and returns logits. Each has its own layers' cache.

    Raises:
        ConfigError: fewer layers than stages.
    """
    layers = config.text.num_hidden_layers
    if not 1 <= stages <= layers:
        raise ConfigError(f"stages must be in 1..{layers} (the decoder's layers), got {stages}.")
    cuts = [round(layers * i / stages) for i in range(stages + 1)]
    parts = zip(stage_names(stages), pairwise(cuts), strict=True)
    return tuple(_stage(config, tokens, precision, limits, range(*cut), name) for name, cut in parts)


def stage_names(stages: int) -> tuple[str, ...]:
    """Names of the decoder's graphs."""
    return ("language",) if stages == 1 else tuple(f"language.{i}" for i in range(stages))


def _stage(config: LlavaConfig, tokens: int, precision: str, limits: Limits, layers: range, name: str) -> GraphContract:
    text, dtype = config.text, exchange_dtype(precision)
    first, last = layers.start == 0, layers.stop == text.num_hidden_layers
    cache = ("batch", text.num_key_value_heads, limits.cache_rows, text.head_size)
    per_token: tuple[Dim, ...] = ("batch", "sequence")
    entering, leaving = (
        TensorSpec(hidden_name(layer), dtype, (*per_token, text.hidden_size)) for layer in (layers.start, layers.stop)
    )
    position_ids, last_token = (
        TensorSpec("position_ids", "int64", per_token),
        TensorSpec("last_token", "int64", ("batch",)),
    )
    begin = (
        TensorSpec("input_ids", "int64", per_token),
        position_ids,
        TensorSpec("image_rows", "int64", per_token),
        *([last_token] if last else []),
        TensorSpec("image_embeds", dtype, ("images", tokens, text.hidden_size)),
    )
    go_on = (position_ids, *([last_token] if last else []), entering)
    ranges = {"batch": Range(1, 1, limits.max_batch), "images": Range(1, 1, limits.max_images)}
    return GraphContract(
        name=name,
        inputs=(
            *(begin if first else go_on),
            *(TensorSpec(n, NUMPY_DTYPE[precision], cache) for i in layers for n in past_names(i)),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", text.vocab_size)) if last else leaving,
            *(TensorSpec(n, NUMPY_DTYPE[precision], cache) for i in layers for n in present_names(i)),
        ),
        ranges={
            **(ranges if first else {"batch": ranges["batch"]}),
            "sequence": Range(1, limits.max_prompt, limits.max_prompt),
        },
    )


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
