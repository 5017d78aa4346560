"""A picture of which patches survive, pruning point by pruning point; of LLaVA-NeXT the base tile and the grid's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flowcut.anyres import Tiling
from flowcut.errors import InputError

PANEL = 288  # pixels along a panel, about: a whole number of pixels per patch
GRID_PANEL = 432  # the same along the longer side of LLaVA-NeXT's grid
MOST_POINTS = 4  # pruning points shown of LLaVA-NeXT, the language model's among them
GAP = 18
CAPTION = 26
PAPER, INK, OUTLINE = (255, 255, 255), (32, 36, 44), (255, 196, 64)
PADDING = (52, 60, 92)
CONTRAST, LIFT = 0.30, 40  # of a dropped patch; the lift tells it from a kept patch that is black
LANGUAGE_MODEL = "language model"

Mask = NDArray[np.bool_]
Numbers = NDArray[np.integer]


class _Point(NamedTuple):
    """What is left behind a pruning point, and of what; [rows, columns], of the same size as `seen`."""

    title: str
    left: Mask
    of: Mask


def draw(
    image: Image.Image,
    kept_per_layer: Sequence[tuple[int, Numbers]],
    grid: int,
    image_size: int,
    left: Numbers | None = None,
) -> Image.Image:
    """The input and one panel per pruning point: kept patches clear and outlined, dropped ones dark and grey.

    Args:
        image: The picture as the tower sees it, image_size x image_size (`preprocess.undo`); patches of
            image_size // grid pixels are counted from its top left corner.
        kept_per_layer: Layer number and the original numbers of the patches that leave it.
        left: Those that the language model leaves, which are a panel more; None: it was not asked.
    """
    whole = np.ones((grid, grid), np.bool_)
    masks = [(layer, _mask(kept, grid)) for layer, kept in kept_per_layer]
    points = _points(masks, None if left is None else _mask(left, grid), whole)
    panels = _panels(_covered(image, grid, image_size), points, whole, _cell(PANEL, grid))
    return _page(panels, _columns(len(panels)))


def draw_tiles(
    tiles: Sequence[Image.Image],
    kept_per_layer: Sequence[tuple[int, Sequence[Numbers]]],
    tiling: Tiling,
    image_size: int,
    left: Numbers | None = None,
) -> Image.Image:
    """A LLaVA-NeXT picture: a row for its base tile, below it one for the grid's tiles put together.

    A row has the input and at most MOST_POINTS pruning points, the first and the last among them; where the language
    model was asked, its own is the last. What is in the padding of the grid is of a colour of its own and not counted,
    whether the tower keeps it or not.

    Args:
        tiles: The tiles as the tower sees them, image_size x image_size (`preprocess.undo`), the base tile first.
        kept_per_layer: Layer number and per tile the numbers of the patches that leave it.
        left: The patches of the picture that the language model leaves, as flowcut.anyres.kept_patches numbers them;
            None: it was not asked.
    """
    side = tiling.side
    shown = [kept_per_layer[i] for i in _spread(len(kept_per_layer), MOST_POINTS - (left is not None))]
    pictures = [_covered(tile, side, image_size) for tile in tiles]
    masks = [(layer, [_mask(numbers, side) for numbers in kept]) for layer, kept in shown]
    base, grid = (None, None) if left is None else _parts(left, tiling)
    whole = np.ones((side, side), np.bool_)
    points = _points([(layer, of[0]) for layer, of in masks], base, whole)
    panels = _panels(pictures[0], points, whole, _cell(PANEL, side), "base, ")
    columns = len(panels)
    if tiling.tiles > 1:
        sheet = Image.fromarray(_joined([np.asarray(picture) for picture in pictures[1:]], tiling))
        seen, cell = _seen(tiling), _cell(GRID_PANEL, max(tiling.grid))
        points = _points([(layer, _joined(of[1:], tiling)) for layer, of in masks], grid, seen)
        panels += _panels(sheet, points, seen, cell, f"{tiling.rows} x {tiling.columns} tiles, ")
    return _page(panels, columns)


def _points(masks: Sequence[tuple[int, Mask]], left: Mask | None, seen: Mask) -> list[_Point]:
    """The encoder's pruning points, counted of what is `seen`, and the language model's, of what it was given."""
    points = [_Point(f"layer {layer}", mask & seen, seen) for layer, mask in masks]
    if left is None:
        return points
    return [*points, _Point(LANGUAGE_MODEL, left, points[-1].left if points else seen)]


def _parts(left: Numbers, tiling: Tiling) -> tuple[Mask, Mask]:
    """What is left of the base tile and of the grid."""
    patches, (rows, columns) = tiling.side**2, tiling.grid
    mask = _numbered(np.asarray(left), patches + rows * columns)
    return mask[:patches].reshape(tiling.side, tiling.side), mask[patches:].reshape(rows, columns)


def _spread(points: int, most: int) -> list[int]:
    """Up to `most` of 0..points-1, evenly, with both ends."""
    return sorted({round(i) for i in np.linspace(0, points - 1, min(points, most)).tolist()})


def _cell(panel: int, patches: int) -> int:
    """Pixels along a patch where so many are side by side."""
    return max(4, round(panel / patches))


def _covered(image: Image.Image, grid: int, image_size: int) -> Image.Image:
    """Without the pixels beyond the last whole patch."""
    if image.size != (image_size, image_size):
        raise InputError(f"image must be {image_size} x {image_size}, got {image.width} x {image.height}.")
    covered = image_size // grid * grid
    return image.convert("RGB").crop((0, 0, covered, covered))


def _joined(tiles: Sequence[NDArray[Any]], tiling: Tiling) -> NDArray[Any]:
    """Square arrays of the grid's tiles as one: [rows * n, columns * n, ..]."""
    rows = [np.concatenate(tiles[i : i + tiling.columns], 1) for i in range(0, len(tiles), tiling.columns)]
    return np.concatenate(rows)


def _seen(tiling: Tiling) -> Mask:
    """[grid], true where a patch is not in the padding."""
    seen = np.zeros(tiling.grid, np.bool_)
    seen[np.ix_(*tiling.seen)] = True
    return seen


def _panels(
    image: Image.Image,
    points: Sequence[_Point],
    seen: Mask,
    cell: int,
    name: str = "",
) -> list[tuple[str, Image.Image]]:
    """The input and a panel per pruning point, each with its caption. `seen`: [rows, columns], what is no padding."""
    rows, columns = seen.shape
    picture = _pad(image.resize((cell * columns, cell * rows), Image.Resampling.BICUBIC), seen, cell)
    panels = [(f"{name}input: {seen.sum()} patches", picture)]
    for title, left, of in points:
        panel = _pad(_panel(picture, left, cell), seen, cell)
        panels.append((f"{name}{title}: {left.sum()} of {of.sum()}", panel))
    return panels


def _pad(panel: Image.Image, seen: Mask, cell: int) -> Image.Image:
    clear = _enlarged(seen, cell)
    return Image.fromarray(np.where(clear, np.asarray(panel), PADDING).astype(np.uint8))


def _enlarged(mask: Mask, cell: int) -> Mask:
    """[rows * cell, columns * cell, 1]."""
    return mask.repeat(cell, 0).repeat(cell, 1)[..., None]


def _mask(kept: Numbers, grid: int) -> Mask:
    """[grid, grid], true where a patch is kept."""
    return _numbered(np.asarray(kept), grid * grid).reshape(grid, grid)


def _numbered(numbers: Numbers, patches: int) -> Mask:
    """[patches], true at these numbers."""
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < patches:
        raise InputError(f"kept must be patch numbers 0..{patches - 1}, got {numbers.min()}..{numbers.max()}.")
    mask = np.zeros(patches, dtype=np.bool_)
    mask[numbers] = True
    return mask


def _panel(picture: Image.Image, mask: Mask, cell: int) -> Image.Image:
    colours = np.asarray(picture)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] * CONTRAST + LIFT
    panel = Image.fromarray(np.where(_enlarged(mask, cell), colours, grey).astype(np.uint8))
    _outline(ImageDraw.Draw(panel), mask, cell)
    return panel


def _outline(pen: ImageDraw.ImageDraw, mask: Mask, cell: int) -> None:
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
        neighbour = framed[1 + down : 1 + down + mask.shape[0], 1 + right : 1 + right + mask.shape[1]]
        for row, column in np.argwhere(mask & ~neighbour).tolist():
            x, y = column * cell, row * cell
            pen.line((x + x0, y + y0, x + x1, y + y1), fill=OUTLINE)


def _page(panels: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    step_x = max(panel.width for _, panel in panels) + GAP
    steps_y = [max(panel.height for _, panel in row) + CAPTION + GAP for row in rows]
    page = Image.new("RGB", (GAP + columns * step_x, GAP + sum(steps_y)), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for y, row in zip(accumulate(steps_y, initial=GAP), rows, strict=False):
        for x, (caption, panel) in enumerate(row):
            pen.text((GAP + x * step_x, y + CAPTION - 8), caption, fill=INK, font=font, anchor="ls")
            page.paste(panel, (GAP + x * step_x, y + CAPTION))
    return page


def _columns(panels: int) -> int:
    """Columns of a page about 3:2 with as few empty places as possible."""
    wish = math.sqrt(1.5 * panels)
    choices = range(max(1, math.floor(wish - 0.5)), min(panels, math.ceil(wish + 0.5)) + 1)
    return min(choices, key=lambda columns: (-panels % columns, abs(columns - wish)))
