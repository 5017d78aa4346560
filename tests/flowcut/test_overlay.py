from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flowcut.errors import InputError
from flowcut.overlay import CAPTION, GAP, OUTLINE, PANEL, draw

RED = Image.new("RGB", (56, 56), (220, 30, 30))


def panel(page: Image.Image, column: int, grid: int = 8) -> np.ndarray:
    """Pixels of a panel in the first row."""
    side = round(PANEL / grid) * grid
    left = GAP + column * (side + GAP)
    return np.asarray(page.crop((left, GAP + CAPTION, left + side, GAP + CAPTION + side)))


def test_kept_patches_keep_their_colours_and_dropped_ones_lose_them() -> None:
    kept = np.array([0, 9, 63])
    got = panel(draw(RED, [(1, kept)], grid=8, image_size=56), 1)
    cell = len(got) // 8
    for patch in range(64):
        middle = got[patch // 8 * cell + cell // 2, patch % 8 * cell + cell // 2]
        if patch in kept:
            assert tuple(middle) == (220, 30, 30)
        else:
            assert len(set(middle)) == 1
            assert middle[0] < 110


def test_outline_runs_around_a_region_and_not_through_it() -> None:
    got = panel(draw(RED, [(1, np.array([27, 28]))], grid=8, image_size=56), 1)
    cell = len(got) // 8
    top, left = 3 * cell, 3 * cell
    region = (got[top : top + cell, left : left + 2 * cell] == OUTLINE).all(-1)
    assert region[0].all()
    assert region[-1].all()
    assert region[:, 0].all()
    assert region[:, -1].all()
    assert not region[1:-1, 1:-1].any()


def test_input_panel_is_the_picture() -> None:
    got = panel(draw(RED, [(1, np.arange(4))], grid=8, image_size=56), 0)
    assert (got == (220, 30, 30)).all()


def test_patch_numbers_read_row_by_row_on_the_picture() -> None:
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[14:21, 35:42] = 255  # row 2, column 5 of 7 x 7 patches
    got = panel(draw(Image.fromarray(pixels), [(1, np.array([21]))], grid=8, image_size=56), 1)
    cell = len(got) // 8
    assert got[2 * cell + cell // 2, 5 * cell + cell // 2].min() > 240


def test_pixels_beyond_the_last_whole_patch_are_left_out() -> None:
    pixels = np.full((59, 59, 3), 200, np.uint8)
    pixels[56:] = pixels[:, 56:] = 0
    got = panel(draw(Image.fromarray(pixels), [], grid=8, image_size=59), 0)
    assert (got == 200).all()


@pytest.mark.parametrize("grid", [1, 8, 12, 24, 37])
@pytest.mark.parametrize("points", [0, 1, 2, 5, 11, 16])
def test_page_holds_every_panel_without_an_empty_row(grid: int, points: int) -> None:
    size = grid * 3
    page = draw(Image.new("RGB", (size, size)), [(i, np.array([0])) for i in range(points)], grid, size)
    side = round(PANEL / grid) * grid
    columns, rows = page.width // (side + GAP), page.height // (side + CAPTION + GAP)
    assert (rows - 1) * columns < points + 1 <= rows * columns
    assert columns >= rows or points < 2


@pytest.mark.parametrize("kept", [[-1], [64]])
def test_patch_number_outside_the_grid_is_refused(kept: list[int]) -> None:
    with pytest.raises(InputError, match=r"0\.\.63"):
        draw(RED, [(1, np.array(kept))], grid=8, image_size=56)


def test_picture_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match="70 x 70, got 56 x 56"):
        draw(RED, [], grid=10, image_size=70)
