"""What vision, a prefill and one decode step ask for, counted from graphs in memory or from an engine directory's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.flops import named_dims
from engines.plan.costs import PAST, Cost, count_cost, together
from engines.widen import load_model
from flowcut.artifacts import Manifest
from flowcut.budget import PRUNE_LAYER
from flowcut.errors import ConfigError

if TYPE_CHECKING:
    import onnx_ir as ir

STAGES = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class Lengths:
    """What is run: `batch` prompts of `prompt` tokens each, with `images` pictures of `tiles` tiles in all of them.

    Attributes:
        prompt: tokens of each prompt, its visual tokens among them.
        pruned: the same behind the decoder's second layer; None where nothing is dropped there.
        tiles: images that the tower sees; `images` for LLaVA-1.5.
    """

    batch: int
    images: int
    tiles: int
    prompt: int
    pruned: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}.")

    def prefill(self) -> dict[str, int]:
        """Sizes of the graphs' named dimensions."""
        later = self.prompt if self.pruned is None else self.pruned
        return {"batch": self.batch, "images": self.images, "sequence": self.prompt, "pruned_sequence": later}

    def decode(self) -> dict[str, int]:
        """The same of a decode step, which takes one picture that no token refers to."""
        return {"batch": self.batch, "images": 1, "sequence": 1, "pruned_sequence": 1}

    def rows(self, cache: str) -> int:
        """Rows of a cache input in use once the prompt is read."""
        layer = int(cache.split(".")[1])
        return self.prompt if self.pruned is None or layer <= PRUNE_LAYER else self.pruned


def graph_costs(vision: ir.Model, decoder: Sequence[ir.Model], lengths: Lengths) -> dict[str, Cost]:
    """Of STAGES: `first_token_costs`, and the decoder's graphs at the decode step that follows."""
    steps = [count_cost(graph, _named(graph, lengths.decode()), _past(graph, lengths)) for graph in decoder]
    return {**first_token_costs(vision, decoder, lengths), "decode": together(steps)}


def first_token_costs(vision: ir.Model, decoder: Sequence[ir.Model], lengths: Lengths) -> dict[str, Cost]:
    """Of "vision", once, and of "prefill"."""
    seen = {"images": lengths.images, "tiles": lengths.tiles}
    prefill = [count_cost(graph, _named(graph, lengths.prefill())) for graph in decoder]
    return {"vision": count_cost(vision, _named(vision, seen)), "prefill": together(prefill)}


def directory_costs(
    directory: Path,
    manifest: Manifest,
    batch: int,
    images: int,
    prompt_tokens: int,
    pruned_tokens: int | None = None,
    tiles: int | None = None,
) -> dict[str, Cost]:
    """`graph_costs` of an engine directory's ONNX files, a decoder in stages summed; their weights are not read.

    Args:
        batch: prompts at once; images: their pictures, all together.
        prompt_tokens: of each prompt, its visual tokens among them; the decode step is the first behind it.
        pruned_tokens: the same behind the decoder's second layer.
        tiles: of all pictures; None: as many as they can have.

    Raises:
        ConfigError: a number below 1, or no pruned_tokens where visual tokens are dropped inside the decoder.
        EngineError: a file that is not such a graph.
    """
    if manifest.llm_tokens is not None and pruned_tokens is None:
        raise ConfigError(
            "pruned_tokens must be given where visual tokens are dropped inside the language model, got none. It is "
            "the prompt's length behind the second layer."
        )
    pruned = None if manifest.llm_tokens is None else pruned_tokens
    seen = images * manifest.geometry.max_tiles if tiles is None else tiles
    vision, *decoder = (load_model(directory / f"{name}.onnx") for name in manifest.graphs)
    return graph_costs(vision, decoder, Lengths(batch, images, seen, prompt_tokens, pruned))


def _named(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, int]:
    """Of the sizes, those that the graph has."""
    has = named_dims(model)
    return {name: size for name, size in sizes.items() if name in has}


def _past(model: ir.Model, lengths: Lengths) -> dict[str, int]:
    names = (str(value.name) for value in model.graph.inputs)
    return {name: lengths.rows(name) for name in names if name.startswith(PAST)}
