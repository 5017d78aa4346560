"""Pictures to the tiles that LLaVA-NeXT's tower sees, as the checkpoint's own image processor makes them.

The reference is the Pillow backend of transformers' LlavaNextImageProcessor, operation for operation, so that the
results are equal to the last bit; but batches are not filled up with tiles of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowcut.anyres import Tiling, choose_tiling
from flowcut.config import LlavaConfig
from flowcut.image_settings import ImageSettings
from flowcut.preprocess import normalised, resize, rgb


def tiled_pixels(
    images: Sequence[Image.Image], settings: ImageSettings, config: LlavaConfig
) -> tuple[NDArray[np.float32], list[Tiling]]:
    """Tiles of all pictures, one after the other, [tiles, 3, S, S], and how each picture was cut.

    Raises:
        InputError: see `image_tiles`.
    """
    tilings = [choose_tiling(config, image.width, image.height) for image in images]
    tiles = [image_tiles(image, settings, tiling) for image, tiling in zip(images, tilings, strict=True)]
    nothing = np.empty((0, 3, settings.image_size, settings.image_size), np.float32)
    return np.concatenate([nothing, *tiles]), tilings


def image_tiles(image: Image.Image, settings: ImageSettings, tiling: Tiling) -> NDArray[np.float32]:
    """[tiles, 3, S, S]: the whole picture stretched to a tile, then the grid's tiles row by row.

    Args:
        tiling: flowcut.anyres.choose_tiling of this picture's size.

    Raises:
        InputError: a picture so long and narrow that resizing it would take too much memory.
    """
    picture, side = rgb(image), settings.image_size
    base = resize(picture, side, side, settings)
    return normalised([base, *_grid(picture, settings, tiling)], settings)


def _grid(picture: Image.Image, settings: ImageSettings, tiling: Tiling) -> Iterator[Image.Image]:
    """Tiles of the picture, as large as its aspect ratio allows, in the middle of a black sheet."""
    if tiling.tiles == 1:
        return
    side = settings.image_size
    sheet = Image.new("RGB", (tiling.columns * side, tiling.rows * side))
    width, height = _fitted(picture.width, picture.height, sheet.width, sheet.height)
    sheet.paste(resize(picture, width, height, settings), ((sheet.width - width) // 2, (sheet.height - height) // 2))
    for top in range(0, sheet.height, side):
        for left in range(0, sheet.width, side):
            yield sheet.crop((left, top, left + side, top + side))


def _fitted(width: int, height: int, most_wide: int, most_high: int) -> tuple[int, int]:
    """Width and height at which a picture fills a sheet, at least a pixel each; in floating point, as transformers."""
    scale_x, scale_y = most_wide / width, most_high / height
    if scale_x < scale_y:
        return most_wide, min(math.ceil(height * scale_x), most_high)
    return min(math.ceil(width * scale_y), most_wide), most_high
