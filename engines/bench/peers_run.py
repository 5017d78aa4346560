"""How a model in PyTorch is timed: the same stages as an engine's, by the same clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from calib.tower import torch_threads
from engines.bench.subjects import Output, Work
from engines.runtime.clock import Clock
from engines.runtime.pictures import Geometry, Tokens
from engines.runtime.reading import Opened, Reader
from flowcut.anyres import image_slots, kept_patches, patch_places
from flowcut.config import LlavaConfig
from flowcut.prompt import Encoded


@dataclass(frozen=True)
class Seen:
    """One picture's visual tokens.

    Attributes:
        tokens: [n, text hidden].
        places: [n], the patch of each; of LLaVA-NeXT its place (flowcut.anyres). None where nothing is pruned.
    """

    tokens: Tensor
    places: Tensor | None = None


class Answering(Protocol):
    """B prompts that were read, and are being answered.

    Attributes:
        logits: [B, vocab] float32, of the token that follows each prompt.
        lengths, pruned_lengths: tokens of each prompt, before and behind the pruning inside the decoder.
        chosen: per prompt which of its visual tokens are left behind that; None where all are.
    """

    logits: Tensor
    lengths: Sequence[int]
    pruned_lengths: Sequence[int]
    chosen: Sequence[Tensor | None]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, vocab] behind one more token of each prompt, [B]."""
        ...


class TorchModel(Protocol):
    """A model in PyTorch."""

    def see(self, pictures: Sequence[Opened]) -> list[Seen]:
        """Encoder and projector."""
        ...

    def read(self, prompts: Sequence[Encoded], seen: Sequence[Seen], room: int) -> Answering:
        """The decoder over the prompts, with a cache for `room` more tokens. `prompts` have a place for each visual
        token that there can be; of LLaVA-NeXT's there may be fewer."""
        ...


class TorchPeer:
    """A Subject (engines.bench.subjects) in PyTorch.

    Args:
        reader: the engine's, so that pixels and token ids are equal.
        tokens: patches that the model keeps of each image that its tower sees.
        threads: of PyTorch while it runs; None leaves the choice to torch.
    """

    def __init__(
        self,
        name: str,
        title: str,
        model: TorchModel,
        reader: Reader,
        config: LlavaConfig,
        tokens: int,
        threads: int | None,
    ) -> None:
        self.name, self.title, self.model = name, title, model
        self._reader, self._config, self._threads = reader, config, threads
        self._geometry, self._slots = Geometry(config, tokens), image_slots(config, tokens)

    def prepare(self, work: Work) -> None:
        """Nothing: the model is loaded."""

    @torch.inference_mode()
    def run(self, work: Work, clock: Clock, steps: int) -> Output:
        """See Subject."""
        with torch_threads(self._threads):
            pictures, prompts = self._preprocess(work)
            clock.stop("preprocess")
            seen = self.model.see(pictures)
            clock.stop("vision")
            answering = self.model.read(prompts, seen, steps)
            clock.stop("prefill")
            logits = answering.logits
            for _ in range(steps):
                logits = answering.step(logits.argmax(-1))
            if steps:
                clock.stop("decode")
        return self._output(pictures, seen, answering)

    def _preprocess(self, work: Work) -> tuple[list[Opened], list[Encoded]]:
        pictures = [self._reader.open(picture) for picture in work.pictures]
        for picture in pictures:
            picture.prepare()
        rows = self._geometry.rows(pictures)
        encode = self._reader.tokenizer.encode
        return pictures, [encode(text, [n], self._slots) for text, n in zip(work.prompts, rows, strict=True)]

    def _output(self, pictures: Sequence[Opened], seen: Sequence[Seen], answering: Answering) -> Output:
        each = zip(pictures, seen, answering.chosen, strict=True)
        return Output(
            logits=answering.logits.cpu().numpy(),
            kept=[self._numbers(picture, one.places, chosen) for picture, one, chosen in each],
            visual_tokens=[len(one.tokens) for one in seen],
            prompt_tokens=list(answering.lengths),
            pruned_prompt_tokens=list(answering.pruned_lengths),
        )

    def _numbers(self, picture: Opened, places: Tensor | None, chosen: Tensor | None) -> Tokens:
        """Numbers of a picture's patches that are left at the end, as an engine gives them."""
        if places is None:
            if picture.tiling is None:
                return np.arange(self._config.vision.patches, dtype=np.int64)
            return kept_patches(np.sort(patch_places(picture.tiling), axis=None))
        left = places if chosen is None else places[chosen]
        numbers: Tokens = left.cpu().numpy()
        return numbers if picture.tiling is None else kept_patches(numbers)


class CompiledPeer(TorchPeer):
    """A TorchPeer whose model is compiled when it first meets a shape."""

    def prepare(self, work: Work) -> None:
        """Compile for these shapes, and for caches of any length: that takes two lengths."""
        for steps in (2, 3):
            self.run(work, Clock(), steps)


def nothing_dropped(prompts: Sequence[Encoded]) -> Sequence[Tensor | None]:
    """`Answering.chosen` of prompts whose visual tokens all stay."""
    return [None] * len(prompts)


def pixels_of(pictures: Sequence[Opened], dtype: torch.dtype, device: str) -> Tensor:
    """What the tower sees of all pictures, [images, 3, S, S]: each picture, or its tiles one after the other."""
    pixels = np.concatenate([picture.pixels for picture in pictures])
    return torch.from_numpy(pixels).to(device=device, dtype=dtype)
