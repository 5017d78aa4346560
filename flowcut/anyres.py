"""LLaVA-NeXT's tiles: how a picture is cut, and in which order its visual tokens are read.

A picture becomes the base tile, which shows all of it, and up to four tiles of a grid, which show it larger. Every
visual token has a place in the reading order, an integer that follows from the picture's size alone:

    2 * p                           patch p of the base tile, p = 0..P-1
    2 * (P + r * W + c)             patch of the grid's row r and column c; W patches are in a row of all tiles
    2 * (P + r * W + W - 1) + 1     the newline that ends row r
    2 * (P - 1) + 1                 the newline after a picture that is the base tile alone
    NO_TOKEN                        a patch in the padding of the picture's aspect ratio, or no token at all

The vision graph sorts what it keeps by place (export/packing.py), so that its shapes are constant whatever is kept.
Source of the geometry: docs/algorithm.md 5; where nothing is pruned, transformers' LlavaNextForConditionalGeneration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowcut.config import LlavaConfig
from flowcut.errors import ConfigError

Integers = NDArray[np.int64]
NO_TOKEN = 1 << 30


@dataclass(frozen=True)
class Tiling:
    """How a picture of width x height pixels is cut: `rows` x `columns` tiles beside the base tile, 0 x 0 for none.

    `side` is the number of patches along a tile's edge.
    """

    width: int
    height: int
    rows: int
    columns: int
    side: int

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("height", 1), ("rows", 0), ("columns", 0), ("side", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"tiling's {name} must be at least {least}, got {getattr(self, name)!r}.")
        if bool(self.rows) != bool(self.columns):
            raise ConfigError(f"tiling's rows and columns must both be 0 or neither, got {self.rows}, {self.columns}.")

    @property
    def tiles(self) -> int:
        """The base tile and those of the grid."""
        return 1 + self.rows * self.columns

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of all tiles of the grid together."""
        return self.rows * self.side, self.columns * self.side

    @property
    def seen(self) -> tuple[range, range]:
        """Rows and columns of the grid's patches that are not in the padding."""
        gh, gw = self.grid
        if self.width * gh > self.height * gw:
            cut = (gh - self.height * gw // self.width) // 2
            return range(cut, gh - cut), range(gw)
        cut = (gw - self.width * gh // self.height) // 2
        return range(gh), range(cut, gw - cut)


@dataclass(frozen=True)
class VisionFeeds:
    """What the vision graph takes beside the pixels of I pictures' tiles, one after the other.

    Attributes:
        tile_places: [tiles, P], the place of each patch.
        image_tiles: [I, max_tiles], numbers of each picture's tiles counted from 1; 0 for none.
        newline_places: [I, newlines], the places of its newlines, then NO_TOKEN.
        rows: per picture the visual tokens that it can have at most; exact where nothing is pruned.
    """

    tile_places: Integers
    image_tiles: Integers
    newline_places: Integers
    rows: tuple[int, ...]

    def arrays(self) -> dict[str, Integers]:
        """The inputs by name."""
        return {name: getattr(self, name) for name in ("tile_places", "image_tiles", "newline_places")}


def choose_tiling(config: LlavaConfig, width: int, height: int) -> Tiling:
    """How LLaVA-NeXT cuts a picture of this size."""
    side = config.vision.image_size
    if not config.grid_pinpoints:
        return Tiling(width, height, 0, 0, config.vision.grid)
    tall, wide = best_pinpoint(config.grid_pinpoints, width, height)
    return Tiling(width, height, tall // side, wide // side, config.vision.grid)


def best_pinpoint(pinpoints: Sequence[Sequence[int]], width: int, height: int) -> Sequence[int]:
    """The (height, width) that shows most of the picture's pixels; of equal ones that with the least padding, then the
    first."""

    def merit(pinpoint: Sequence[int]) -> tuple[int, int]:
        tall, wide = pinpoint
        scale = min(wide / width, tall / height)  # in floating point, as transformers has it
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - tall * wide

    return max(pinpoints, key=merit)


def newline_slots(config: LlavaConfig, tokens: int) -> int:
    """Most newlines of one picture: one for each row of the grid where nothing is pruned, else that of a lone tile."""
    if tokens < config.vision.patches:
        return 1
    side = config.vision.image_size
    return max([1, *(h // side * config.vision.grid for h, _ in config.grid_pinpoints or ())])


def image_slots(config: LlavaConfig, tokens: int) -> int:
    """Rows that the vision graph returns for one picture when it keeps `tokens` patches of each image it sees."""
    if not config.anyres:
        return tokens
    return config.max_tiles * tokens + newline_slots(config, tokens)


def vision_feeds(config: LlavaConfig, tokens: int, tilings: Sequence[Tiling]) -> VisionFeeds:
    """The vision graph's inputs for these pictures; `tokens` patches of each tile are kept."""
    pruned, slots = tokens < config.vision.patches, newline_slots(config, tokens)
    image_tiles = np.zeros((len(tilings), config.max_tiles), np.int64)
    newlines = np.full((len(tilings), slots), NO_TOKEN, np.int64)
    first = 1
    for i, tiling in enumerate(tilings):
        image_tiles[i, : tiling.tiles] = np.arange(first, first + tiling.tiles)
        first += tiling.tiles
        places = newline_places(tiling, pruned)
        newlines[i, : len(places)] = places
    patches = np.concatenate([patch_places(tiling) for tiling in tilings])
    rows = tuple(_rows(tiling, tokens, pruned) for tiling in tilings)
    return VisionFeeds(patches, image_tiles, newlines, rows)


def patch_places(tiling: Tiling) -> Integers:
    """[tiles, P]: the place of every patch, tiles row by row."""
    side, (gh, gw) = tiling.side, tiling.grid
    patches = side * side
    places = np.full((gh, gw), NO_TOKEN, np.int64)
    rows, columns = tiling.seen
    inside = np.ix_(rows, columns)
    places[inside] = 2 * (patches + np.arange(gh * gw).reshape(gh, gw)[inside])
    tiles = places.reshape(tiling.rows, side, tiling.columns, side).swapaxes(1, 2).reshape(-1, patches)
    return np.concatenate([2 * np.arange(patches)[None], tiles])


def newline_places(tiling: Tiling, pruned: bool) -> Integers:
    """The places of a picture's newlines. With pruning only a lone base tile has one (docs/algorithm.md 5)."""
    patches, (_, gw) = tiling.side * tiling.side, tiling.grid
    if tiling.tiles == 1:
        return np.array([2 * (patches - 1) + 1], np.int64)
    if pruned:
        return np.empty(0, np.int64)
    rows = np.array(tiling.seen[0], np.int64)
    return 2 * (patches + rows * gw + gw - 1) + 1


def kept_patches(places: Integers) -> Integers:
    """Numbers of the patches at these places, newlines and NO_TOKEN left out: 0..P-1 in the base tile, then P + r*W + c
    in the grid."""
    patches: Integers = places[(places < NO_TOKEN) & (places % 2 == 0)] // 2
    return patches


def _rows(tiling: Tiling, tokens: int, pruned: bool) -> int:
    newlines = len(newline_places(tiling, pruned))
    if pruned:
        return tiling.tiles * tokens + newlines
    rows, columns = tiling.seen
    return tokens + (len(rows) * len(columns) if tiling.tiles > 1 else 0) + newlines
