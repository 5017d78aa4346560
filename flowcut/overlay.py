"""A picture of which patches survive, pruning point by pruning point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flowcut.errors import InputError

PANEL = 288  # pixels along a panel, about: a whole number of pixels per patch
GAP = 18
CAPTION = 26
PAPER, INK, OUTLINE = (255, 255, 255), (32, 36, 44), (255, 196, 64)
CONTRAST, LIFT = 0.30, 40  # of a dropped patch; the lift tells it from a kept patch that is black


def draw(
    image: Image.Image,
    kept_per_layer: Sequence[tuple[int, NDArray[np.integer]]],
    grid: int,
    image_size: int,
) -> Image.Image:
    """The input and one panel per pruning point: kept patches clear and outlined, dropped ones dark and grey.

    Args:
        image: The picture as the tower sees it, image_size x image_size (`preprocess.undo`); patches of
            image_size // grid pixels are counted from its top left corner.
        kept_per_layer: Layer number and the original numbers of the patches that leave it.
    """
    if image.size != (image_size, image_size):
        raise InputError(f"image must be {image_size} x {image_size}, got {image.width} x {image.height}.")
    cell = max(4, round(PANEL / grid))
    covered = image_size // grid * grid
    picture = image.convert("RGB").crop((0, 0, covered, covered)).resize((cell * grid,) * 2, Image.Resampling.BICUBIC)
    panels = [(f"input: {grid * grid} patches", picture)]
    for layer, kept in kept_per_layer:
        mask = _mask(kept, grid)
        panels.append((f"layer {layer}: {mask.sum()} of {grid * grid}", _panel(picture, mask, cell)))
    return _page(panels, cell * grid)


def _mask(kept: NDArray[np.integer], grid: int) -> NDArray[np.bool_]:
    """[grid, grid], true where a patch is kept."""
    numbers = np.asarray(kept)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < grid * grid:
        raise InputError(f"kept must be patch numbers 0..{grid * grid - 1}, got {numbers.min()}..{numbers.max()}.")
    mask = np.zeros(grid * grid, dtype=np.bool_)
    mask[numbers] = True
    return mask.reshape(grid, grid)


def _panel(picture: Image.Image, mask: NDArray[np.bool_], cell: int) -> Image.Image:
    colours = np.asarray(picture)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] * CONTRAST + LIFT
    clear = mask.repeat(cell, 0).repeat(cell, 1)[..., None]
    panel = Image.fromarray(np.where(clear, colours, grey).astype(np.uint8))
    _outline(ImageDraw.Draw(panel), mask, cell)
    return panel


def _outline(pen: ImageDraw.ImageDraw, mask: NDArray[np.bool_], cell: int) -> None:
    """A line around each region of kept patches, inside it: boxes around single patches would drown the picture."""
    last = cell - 1
    edges = {
        (-1, 0): (0, 0, last, 0),
        (1, 0): (0, last, last, last),
        (0, -1): (0, 0, 0, last),
        (0, 1): (last, 0, last, last),
    }
    framed = np.pad(mask, 1)
    for (down, right), (x0, y0, x1, y1) in edges.items():
        neighbour = framed[1 + down : 1 + down + len(mask), 1 + right : 1 + right + len(mask)]
        for row, column in np.argwhere(mask & ~neighbour).tolist():
            x, y = column * cell, row * cell
            pen.line((x + x0, y + y0, x + x1, y + y1), fill=OUTLINE)


def _page(panels: Sequence[tuple[str, Image.Image]], side: int) -> Image.Image:
    columns = _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    step_x, step_y = side + GAP, side + CAPTION + GAP
    page = Image.new("RGB", (GAP + columns * step_x, GAP + rows * step_y), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for index, (caption, panel) in enumerate(panels):
        x, y = GAP + index % columns * step_x, GAP + index // columns * step_y
        pen.text((x, y + CAPTION - 8), caption, fill=INK, font=font, anchor="ls")
        page.paste(panel, (x, y + CAPTION))
    return page


def _columns(panels: int) -> int:
    """Columns of a page about 3:2 with as few empty places as possible."""
    wish = math.sqrt(1.5 * panels)
    choices = range(max(1, math.floor(wish - 0.5)), min(panels, math.ceil(wish + 0.5)) + 1)
    return min(choices, key=lambda columns: (-panels % columns, abs(columns - wish)))
