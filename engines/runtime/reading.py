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
from flowcut.errors import ConfigError, InputError, TooLarge
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.prompt import Batch, Encoded, Pruning, Tokenizer, batch
from flowcut.tiles import image_tiles


class Opened:
    """A picture: in RGB, until it is prepared for the tower. May be used from several threads.

    Attributes:
        made_for: the geometry and the image settings of the engine that opened it.
    """

    def __init__(self, image: Image.Image, config: LlavaConfig, settings: ImageSettings) -> None:
        self.made_for, self.size = (config, settings), image.size
        self._content: Image.Image | NDArray[np.float32] = image
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
        _ = self.pixels

    @property
    def pixels(self) -> NDArray[np.float32]:
        """[tiles, 3, S, S]"""
        content = self._content  # read once: another thread may put the same pixels there meanwhile
        if isinstance(content, Image.Image):
            settings = self.made_for[1]
            content = self._content = (
                pixel_values([content], settings)
                if self.tiling is None
                else image_tiles(content, settings, self.tiling)
            )
        return content

    @property
    def large(self) -> bool:
        """Whether it takes more memory in RGB, at Pillow's 4 bytes for a pixel, than `pixels` would in float32."""
        tiles = 1 if self.tiling is None else self.tiling.tiles
        return self.size[0] * self.size[1] > tiles * 3 * self.made_for[1].image_size ** 2


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
            InputError: one that cannot be used, or that an engine of another kind opened.
        """
        if isinstance(picture, Opened):
            if picture.made_for != (self._manifest.geometry, self.settings):
                raise InputError(
                    "image must be opened by an engine of this geometry and these image settings, got one that another "
                    "opened. Give the picture itself."
                )
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
        limit = self._manifest.limits.max_new_tokens
        samplings = [each.within(limit) for each in _samplings(sampling, len(texts))]
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
        if not isinstance(prompts, str | list | tuple):
            raise InputError(f"prompts must be a text or a list of texts, got {type(prompts).__name__}.")
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


def _samplings(given: Sampling | Sequence[Sampling], count: int) -> list[Sampling]:
    """One for each prompt."""
    samplings: Any = [given] * count if isinstance(given, Sampling) else given
    if not isinstance(samplings, list | tuple) or not all(isinstance(each, Sampling) for each in samplings):
        raise ConfigError(f"sampling must be a Sampling, or a list of one for each prompt, got {given!r}.")
    if len(samplings) != count:
        raise InputError(f"sampling must be one, or one for each of {count} prompts, got {len(samplings)}.")
    return list(samplings)


def _check_count(field: str, got: int, limit: int, option: str) -> None:
    if got > limit:
        raise TooLarge(
            f"{field} must be at most {limit} at once (the engine's max_{option}), got {got}. "
            f"Send fewer, or rebuild the engine with --max-{option} {got}."
        )
