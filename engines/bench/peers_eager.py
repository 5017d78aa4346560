"""This project's eager PyTorch modules as peers, under any schedule, and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engines.bench.peers_run import Answering, Seen, nothing_dropped, pixels_of
from engines.runtime.reading import Opened
from flowcut.checkpoint import Weights
from flowcut.language import KVCache, LanguageModel
from flowcut.language_pruning import Reading, read, step
from flowcut.packing import pack
from flowcut.prompt import Encoded, batch
from flowcut.schedule import Schedule
from flowcut.vision import VisionModel

_ANY_LENGTH = 1 << 30
"""Of a prompt: what the engine was built for has been checked, and eager code has no limit of its own."""


@dataclass(frozen=True)
class Modules:
    """A checkpoint in PyTorch. All peers hold these very tensors."""

    vision: VisionModel
    language: LanguageModel
    device: str

    @staticmethod
    def load(weights: Weights, vision: torch.dtype, language: torch.dtype, device: str) -> Modules:
        """One tensor at a time."""
        return Modules(
            VisionModel.from_weights(weights, vision, device),
            LanguageModel.from_weights(weights, language, device),
            device,
        )

    def compiled(self, backend: str | Callable[..., Any] = "inductor") -> Modules:
        """The same tensors in modules that torch.compile takes: the tower whole, the decoder layer by layer, since what
        is around its layers waits for the device. Compilation itself happens in the first runs. Not yet run on a GPU.
        """
        vision, language = copy.copy(self.vision), copy.copy(self.language)
        # As one graph with the shapes that come: elsewhere dynamo breaks it at every pruning point.
        vision.compile(fullgraph=True, dynamic=False, backend=backend)
        layers = [copy.copy(layer) for layer in self.language.model.layers]
        for layer in layers:
            layer.compile(backend=backend)
        # A copy shares its original's dictionary of submodules until it has one of its own.
        decoder = copy.copy(self.language.model)
        decoder._modules = {**decoder._modules, "layers": nn.ModuleList(layers)}
        language._modules = {**language._modules, "model": decoder}
        return Modules(vision, language, self.device)


class EagerModel:
    """A TorchModel (engines.bench.peers_run).

    Args:
        llm_tokens: visual tokens that each picture keeps behind the decoder's second layer; None: all.
    """

    def __init__(self, modules: Modules, schedule: Schedule, llm_tokens: int | None = None) -> None:
        self._modules, self._schedule, self._llm_tokens = modules, schedule, llm_tokens

    @property
    def alone(self) -> bool:
        """Whether prompts are read one after the other: where their visual tokens differ in number or are chosen by the
        prompt."""
        return self._llm_tokens is not None or self._modules.vision.config.anyres

    def see(self, pictures: Sequence[Opened]) -> list[Seen]:
        """See TorchModel. The tower runs once, over all pictures or all their tiles; an adaptive schedule runs it image
        by image."""
        vision, device = self._modules.vision, self._modules.device
        dtype = vision.multi_modal_projector.linear_1.weight.dtype
        embeds, kept = vision(pixels_of(pictures, dtype, device), self._schedule)  # [images, K, D], [images, K]
        tilings = [picture.tiling for picture in pictures if picture.tiling is not None]
        if not tilings:
            return [Seen(*pair) for pair in zip(embeds, kept, strict=True)]
        counts = [tiling.tiles for tiling in tilings]
        parts = zip(embeds.split(counts), kept.split(counts), tilings, strict=True)
        return [Seen(*pack(*part, vision.image_newline)) for part in parts]

    def read(self, prompts: Sequence[Encoded], seen: Sequence[Seen], room: int) -> Answering:
        """See TorchModel."""
        if self.alone:
            return _OneByOne(self._modules, prompts, seen, self._llm_tokens, room)
        return _Together(self._modules, prompts, seen, room)


class _Together:
    """Prompts in one batch, right-padded."""

    def __init__(self, modules: Modules, prompts: Sequence[Encoded], seen: Sequence[Seen], room: int) -> None:
        self._language, padded = modules.language, batch(prompts, _ANY_LENGTH)
        arrays = padded.input_ids, padded.position_ids, padded.image_rows, padded.last_token, padded.lengths
        ids, positions, rows, last, self._next = (torch.from_numpy(array).to(modules.device) for array in arrays)
        embeds = torch.stack([one.tokens for one in seen])
        dtype = self._language.model.norm.weight.dtype
        count, length = ids.shape
        self._cache = KVCache.allocate(self._language.config, count, length + room, dtype, modules.device)
        hidden = self._language(ids, positions, rows, embeds, self._cache)
        self.logits: Tensor = self._language.logits(hidden, last)
        self.lengths: Sequence[int] = padded.lengths.tolist()
        self.pruned_lengths: Sequence[int] = self.lengths
        self.chosen = nothing_dropped(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        """See Answering."""
        ids = tokens[:, None]
        hidden = self._language(ids, self._next[:, None], torch.full_like(ids, -1), None, self._cache)
        self._next = self._next + 1
        logits: Tensor = self._language.logits(hidden)[:, 0]
        return logits


class _OneByOne:
    """Each prompt alone, with the visual tokens that its picture has."""

    def __init__(
        self, modules: Modules, prompts: Sequence[Encoded], seen: Sequence[Seen], llm_tokens: int | None, room: int
    ) -> None:
        self._language, self._device = modules.language, modules.device
        pairs = zip(prompts, seen, strict=True)
        self._readings = [self._read(prompt, one.tokens, llm_tokens, room) for prompt, one in pairs]
        self.logits = self._logits([reading.hidden for reading in self._readings])
        lengths = [reading.lengths for reading in self._readings]  # now, since they count on
        self.lengths: Sequence[int] = [first for first, _ in lengths]
        self.pruned_lengths: Sequence[int] = [second for _, second in lengths]
        self.chosen: Sequence[Tensor | None] = [reading.kept[0] for reading in self._readings]

    def step(self, tokens: Tensor) -> Tensor:
        """See Answering."""
        pairs = zip(tokens, self._readings, strict=True)
        return self._logits([step(self._language, token, reading) for token, reading in pairs])

    def _read(self, prompt: Encoded, tokens: Tensor, llm_tokens: int | None, room: int) -> Reading:
        count = len(tokens)
        there = prompt.image_rows < count  # text, and the places that a token was left for
        arrays = prompt.input_ids[there], prompt.image_rows[there]
        ids, rows = (torch.from_numpy(array)[None].to(self._device) for array in arrays)
        embeds = self._language.embed(ids, rows, tokens[None])
        span = int(prompt.spans[0, 0]), count
        return read(self._language, embeds, [span], count if llm_tokens is None else llm_tokens, room)

    def _logits(self, hidden: Sequence[Tensor]) -> Tensor:
        """[B, vocab] of hidden states [1, S, D], of the last token of each."""
        return torch.cat([self._language.logits(each[:, -1:])[:, 0] for each in hidden])
