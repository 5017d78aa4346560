"""From what a user sends to what the graphs take, on the host alone: nothing here waits for the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.runtime.control import Control
from engines.runtime.pictures import Geometry
from engines.runtime.sampling import Sampling
from flowcut.anyres import Tiling, choose_tiling, image_slots
from flowcut.artifacts import Manifest
from flowcut.budget import Budget
from flowcut.config import LlavaConfig
from flowcut.contract import Limits, pruned_limit
from flowcut.errors import InputError, TooLarge
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.prompt import Batch, Encoded, Pruning, Tokenizer, batch
from flowcut.tiles import image_tiles

_NONE = np.empty((0, 3, 1, 1), np.float32)


class Opened:
    """A picture: in RGB, until it is prepared for the tower."""

    def __init__(self, image: Image.Image, config: LlavaConfig, settings: ImageSettings) -> None:
        self._settings, self._image, self._pixels = settings, image, _NONE
        self.size = image.size
        self.tiling: Tiling | None = choose_tiling(config, *image.size) if config.anyres else None
        digest = hashlib.sha256(repr(image.size).encode())
        digest.update(np.ascontiguousarray(image).data)
        self.key = digest.hexdigest()
        """What is in it: equal for equal pixels, however they came."""

    def prepare(self) -> None:
        """Compute `pixels`, and let go of the picture, which may be large.

        Raises:
            InputError: a picture so long and narrow that resizing it would take too much memory.
        """
        if not len(self._pixels):
            one, settings = self._image, self._settings
            self._pixels = (
                pixel_values([one], settings) if self.tiling is None else image_tiles(one, settings, self.tiling)
            )
            self._image = Image.new("RGB", (1, 1))

    @property
    def pixels(self) -> NDArray[np.float32]:
        """[tiles, 3, S, S]"""
        self.prepare()
        return self._pixels


Picture = Path | str | bytes | Image.Image | NDArray[np.uint8] | Opened
"""Whatever flowcut.preprocess.open_image takes, or what Reader.open returned."""
Pictures = Picture | Sequence[Picture]
"""Of one prompt."""


@dataclass(frozen=True)
class Request:
    """One prompt with its pictures, ready for the device."""

    encoded: Encoded
    pictures: tuple[Opened, ...]
    sampling: Sampling
    control: Control


class Reader:
    """Opens, measures and tokenizes for one engine. May be used from several threads."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, settings: ImageSettings) -> None:
        self._manifest, self.settings = manifest, settings
        self.tokenizer, self.geometry = tokenizer, Geometry(manifest.geometry, manifest.tokens)
        self._pruning = pruning(manifest.geometry, manifest.budget, manifest.limits)

    def open(self, picture: Picture) -> Opened:
        """One picture, which may then be sent again and again, whatever becomes of the file it was read from.

        Raises:
            InputError: one that cannot be used.
        """
        if isinstance(picture, Opened):
            return picture
        return Opened(open_image(picture), self._manifest.geometry, self.settings)

    def read(self, images: Pictures, prompt: str, sampling: Sampling, control: Control) -> Request:
        """One prompt, checked against the engine's limits.

        Raises:
            InputError: a picture or prompt that cannot be used, more pictures or tokens than the engine was built for.
        """
        return self.read_all([images], [prompt], sampling, control)[0]

    def read_all(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: str | Sequence[str],
        sampling: Sampling | Sequence[Sampling],
        control: Control,
    ) -> list[Request]:
        """Prompts of one call, see engines.runtime.engine.LlavaEngine.prefill."""
        entries, texts = self._entries(images, prompts)
        samplings = [sampling] * len(texts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(texts):
            raise InputError(f"sampling must be one, or one for each of {len(texts)} prompts, got {len(samplings)}.")
        samplings = [each.within(self._manifest.limits.max_new_tokens) for each in samplings]
        requests = [self._read(*each, control) for each in zip(entries, texts, samplings, strict=True)]
        self.batch(requests)
        return requests

    def batch(self, requests: Sequence[Request]) -> Batch:
        """Prompts side by side.

        Raises:
            InputError: one that is too long.
        """
        return batch([request.encoded for request in requests], self._manifest.limits.max_prompt, self._pruning)

    def _read(self, pictures: list[Picture], prompt: str, sampling: Sampling, control: Control) -> Request:
        config, tokens = self._manifest.geometry, self._manifest.tokens
        opened = tuple(map(self.open, pictures))
        encoded = self.tokenizer.encode(prompt, self.geometry.rows(opened), image_slots(config, tokens))
        return Request(encoded, opened, sampling, control)

    def _entries(
        self, images: Pictures | Sequence[Pictures], prompts: str | Sequence[str]
    ) -> tuple[list[list[Picture]], list[str]]:
        """Pictures per prompt, and prompts, both counted against the limits."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        entries: Any = [images] if isinstance(prompts, str) else images
        if not isinstance(entries, list | tuple) or len(entries) != len(texts):
            got = f"{len(entries)} entries" if isinstance(entries, list | tuple) else type(entries).__name__
            raise InputError(
                f"images must be a list with one entry for each of {len(texts)} prompts, got {got}. "
                "An entry is a picture or a list of pictures, [] for none."
            )
        pictures = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in entries]
        limits = self._manifest.limits
        _check_count("prompts", len(texts), limits.max_batch, "batch")
        _check_count("images", sum(map(len, pictures)), limits.max_images, "images")
        return pictures, texts


def pruning(config: LlavaConfig, budget: Budget, limits: Limits) -> Pruning | None:
    """What flowcut.prompt.batch has to know of the pruning inside the decoder."""
    if budget.llm_tokens is None:
        return None
    return Pruning(budget.llm_tokens, pruned_limit(config, budget.tokens, budget.llm_tokens, limits))


def _check_count(field: str, got: int, limit: int, option: str) -> None:
    if got > limit:
        raise TooLarge(
            f"{field} must be at most {limit} at once (the engine's max_{option}), got {got}. "
            f"Send fewer, or rebuild the engine with --max-{option} {got}."
        )
