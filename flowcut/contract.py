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


def vision_contract(config: LlavaConfig, tokens: int, precision: str, limits: Limits) -> GraphContract:
    """pixel_values -> image_embeds, kept. `kept` are patch numbers 0..grid*grid-1 in ascending order."""
    size, dtype = config.vision.image_size, NUMPY_DTYPE[precision]
    return GraphContract(
        name="vision",
        inputs=(TensorSpec("pixel_values", dtype, ("images", 3, size, size)),),
        outputs=(
            TensorSpec("image_embeds", dtype, ("images", tokens, config.text.hidden_size)),
            TensorSpec("kept", "int64", ("images", tokens)),
        ),
        ranges={"images": Range(1, 1, limits.max_images)},
    )


def language_contract(config: LlavaConfig, tokens: int, precision: str, limits: Limits) -> GraphContract:
    """Prefill and decode in one graph.

    image_rows holds, per position, the row of image_embeds seen as [images*tokens, hidden], or -1 for a text token.
    last_token holds, per sequence, the index along `sequence` whose logits are wanted.
    past.* and present.* are the same buffers: each step writes `sequence` rows at position_ids[:, 0].
    """
    text, dtype = config.text, NUMPY_DTYPE[precision]
    cache = ("batch", text.num_key_value_heads, limits.cache_rows, text.head_size)
    layers = range(text.num_hidden_layers)
    return GraphContract(
        name="language",
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("position_ids", "int64", ("batch", "sequence")),
            TensorSpec("image_rows", "int64", ("batch", "sequence")),
            TensorSpec("last_token", "int64", ("batch",)),
            TensorSpec("image_embeds", dtype, ("images", tokens, text.hidden_size)),
            *(TensorSpec(n, dtype, cache) for i in layers for n in past_names(i)),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", text.vocab_size)),
            *(TensorSpec(n, dtype, cache) for i in layers for n in present_names(i)),
        ),
        ranges={
            "batch": Range(1, 1, limits.max_batch),
            "images": Range(1, 1, limits.max_images),
            "sequence": Range(1, limits.max_prompt, limits.max_prompt),
        },
    )


def past_names(layer: int) -> tuple[str, str]:
    """Cache inputs of a decoder layer: keys, values."""
    return f"past.{layer}.key", f"past.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Cache outputs of a decoder layer, bound to the buffers of `past_names`."""
    return f"present.{layer}.key", f"present.{layer}.value"
