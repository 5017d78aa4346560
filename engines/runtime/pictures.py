"""What pictures become: tiles and their order for `vision`, places in a prompt, and the patches that are left.

LLaVA-1.5's vision sees each picture once. LLaVA-NeXT's sees its tiles, those of all pictures of a request in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.sessions.session import Array
from flowcut.anyres import NO_TOKEN, Tiling, choose_tiling, kept_patches, vision_feeds
from flowcut.config import LlavaConfig
from flowcut.contract import GraphContract

Tokens = NDArray[np.int64]


class Sized(Protocol):
    """A picture as far as it is measured."""

    @property
    def size(self) -> tuple[int, int]: ...


class Prepared(Protocol):
    """A picture as the tower takes it."""

    @property
    def pixels(self) -> NDArray[np.float32]: ...

    @property
    def tiling(self) -> Tiling | None: ...


@dataclass(frozen=True)
class Geometry:
    """What the tower sees, how much of it is kept, and how a picture is prepared."""

    config: LlavaConfig
    tokens: int

    def rows(self, images: Sequence[Sized]) -> list[int]:
        """Places that each picture has in a prompt: as many as it can have visual tokens."""
        if not self.config.anyres or not images:
            return [self.tokens] * len(images)
        tilings = [choose_tiling(self.config, *image.size) for image in images]
        return list(vision_feeds(self.config, self.tokens, tilings).rows)

    def feeds(self, images: Sequence[Prepared], contract: GraphContract) -> dict[str, Array]:
        """All that the vision graph takes for at least one picture."""
        pixels = np.concatenate([image.pixels for image in images]).astype(contract.inputs[0].dtype, copy=False)
        tilings = [image.tiling for image in images if image.tiling is not None]
        others = vision_feeds(self.config, self.tokens, tilings).arrays() if self.config.anyres else {}
        return {"pixel_values": pixels, **others}

    def left(self, kept: Tokens, results: Mapping[str, Array]) -> list[Tokens]:
        """Numbers of the patches of each picture that are left at the end.

        Args:
            kept: [images, slots], vision's: patch numbers, or places in LLaVA-NeXT's reading order.
            results: the prefill's, with kept_tokens where visual tokens are dropped inside the decoder.
        """
        real = [row[row < NO_TOKEN] for row in kept]
        if "kept_tokens" in results:
            chosen = zip(real, results["kept_tokens"], strict=False)  # a prompt without pictures has a stand-in for one
            real = [row[numbers[: len(row)]] for row, numbers in chosen]
        return [kept_patches(row) for row in real] if self.config.anyres else real
