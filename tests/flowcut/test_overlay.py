from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flowcut.anyres import Tiling
from flowcut.errors import InputError
from flowcut.overlay import CAPTION, GAP, GRID_PANEL, MOST_POINTS, OUTLINE, PADDING, PANEL, draw, draw_tiles

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


TALL = Tiling(20, 40, 2, 2, 8)  # 16 x 16 patches in the grid, of which the columns 4..11 show the picture
COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30), (30, 220, 220)]
TILES = [Image.new("RGB", (56, 56), colour) for colour in COLOURS]


def grid_panel(page: Image.Image, column: int, patches: int = 16) -> np.ndarray:
    """[patches, patches, 3]: the middle of every patch of a panel in the second row."""
    cell, side = round(GRID_PANEL / patches), round(PANEL / 8) * 8
    left, top = GAP + column * (patches * cell + GAP), GAP + side + CAPTION + GAP + CAPTION
    area = np.asarray(page.crop((left, top, left + patches * cell, top + patches * cell)))
    return area[cell // 2 :: cell, cell // 2 :: cell]


def test_grid_is_the_tiles_row_by_row_with_the_padding_told_apart() -> None:
    page = draw_tiles(TILES, [(1, [np.arange(64)] * 5)], TALL, 56)
    for column in (0, 1):
        got = grid_panel(page, column)
        assert (got[:, :4] == PADDING).all()
        assert (got[:, 12:] == PADDING).all()
        for colour, part in zip(COLOURS[1:], (got[:8, 4:8], got[:8, 8:12], got[8:, 4:8], got[8:, 8:12]), strict=True):
            assert (part == colour).all()
    assert (panel(page, 0) == COLOURS[0]).all()


def test_kept_patches_of_a_tile_are_clear_in_the_grid() -> None:
    nothing = np.empty(0, np.int64)
    kept = [nothing, nothing, np.array([8 + 2]), nothing, np.array([7])]  # the last is in the padding
    got = grid_panel(draw_tiles(TILES, [(3, kept)], TALL, 56), 1)
    clear = [(r, c) for r in range(16) for c in range(4, 12) if len(set(got[r, c].tolist())) > 1]
    assert clear == [(1, 8 + 2)]
    assert tuple(got[1, 10]) == COLOURS[2]
    assert (got[:, 12:] == PADDING).all()


@pytest.mark.parametrize("points", [0, 1, 3, 4, 5, 11])
def test_row_has_the_first_and_the_last_pruning_point(points: int) -> None:
    none, every = np.empty(0, np.int64), np.arange(64)
    trace = [(i, [every if i == points - 1 else none] * 5) for i in range(points)]
    page = draw_tiles(TILES, trace, TALL, 56)
    columns = 1 + min(points, MOST_POINTS)
    assert page.width == GAP + columns * (round(GRID_PANEL / 16) * 16 + GAP)
    if points > 1:
        assert (grid_panel(page, columns - 1)[:8, 4:8] == COLOURS[1]).all()
        assert len(set(grid_panel(page, columns - 2)[0, 4].tolist())) == 1


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All text that is drawn from now on."""
    drawn: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: tuple[float, float], words: str, **options: Any) -> None:
        drawn.append(words)
        draw_text(self, place, words, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return drawn


def test_captions_count_what_is_no_padding(captions: list[str]) -> None:
    row = np.arange(8)  # its columns 0..3 are padding in the left tiles, 4..7 in the right ones
    kept = [np.arange(5), row, row[:4], row[:6], row[:0]]
    draw_tiles(TILES, [(1, [np.arange(64)] * 5), (3, kept)], TALL, 56)
    assert captions == [
        *("base, input: 64 patches", "base, layer 1: 64 of 64", "base, layer 3: 5 of 64"),
        *("2 x 2 tiles, input: 128 patches", "2 x 2 tiles, layer 1: 128 of 128", "2 x 2 tiles, layer 3: 10 of 128"),
    ]


def test_captions_count_the_patches_of_a_picture(captions: list[str]) -> None:
    draw(RED, [(1, np.arange(40)), (9, np.arange(7))], 8, 56, np.arange(3))
    assert captions == ["input: 64 patches", "layer 1: 40 of 64", "layer 9: 7 of 64", "language model: 3 of 7"]


def test_language_model_that_drops_of_all_patches_is_said(captions: list[str]) -> None:
    draw(RED, [], 8, 56, np.arange(3))
    assert captions == ["input: 64 patches", "language model: 3 of 64"]


def test_outline_runs_along_the_paddings_edge() -> None:
    """Whether or not the tower keeps patches of the padding: they are no part of a region."""
    kept = [np.empty(0, np.int64)] * 5
    kept[1] = np.array([3, 4])  # row 0; column 3 is padding
    page = draw_tiles(TILES, [(1, kept)], TALL, 56)
    cell, side = round(GRID_PANEL / 16), round(PANEL / 8) * 8
    left, top = GAP + (16 * cell + GAP) + 4 * cell, GAP + side + CAPTION + GAP + CAPTION
    region = (np.asarray(page.crop((left, top, left + cell, top + cell))) == OUTLINE).all(-1)
    for edge in (region[0], region[-1], region[:, 0], region[:, -1]):
        assert edge.all()
    assert not region[1:-1, 1:-1].any()
    assert not (np.asarray(page.crop((left - 4 * cell, top, left, top + 16 * cell))) == OUTLINE).all(-1).any()


def test_what_the_language_model_leaves_is_the_last_panel_of_a_picture() -> None:
    page = draw(RED, [(1, np.arange(64))], 8, 56, np.array([9]))
    middles = panel(page, 2)[18::36, 18::36].reshape(64, 3)
    assert [i for i, colour in enumerate(middles) if tuple(colour) == (220, 30, 30)] == [9]


def test_what_the_language_model_leaves_is_the_last_panel_of_base_and_grid(captions: list[str]) -> None:
    """Numbers of the grid count its rows of 16 patches from 64 on, the padding with them."""
    numbers = np.arange(64)
    trace = [(layer, [numbers[:40]] * 5) for layer in range(1, 12)]
    page = draw_tiles(TILES, trace, TALL, 56, np.array([1, 33, 64 + 2 * 16 + 5, 64 + 9 * 16 + 11]))
    assert len(captions) == 2 * (1 + MOST_POINTS)
    assert [text for text in captions if "language" in text] == [
        "base, language model: 2 of 40",
        "2 x 2 tiles, language model: 2 of 80",
    ]
    assert captions[1].startswith("base, layer 1:")
    assert captions[-2].startswith("2 x 2 tiles, layer 11:")
    left, top = GAP + MOST_POINTS * (GRID_PANEL + GAP), GAP + CAPTION
    middles = np.asarray(page.crop((left, top, left + PANEL, top + PANEL)))[18::36, 18::36].reshape(64, 3)
    assert [i for i, colour in enumerate(middles) if len(set(colour.tolist())) > 1] == [1, 33]
    got = grid_panel(page, MOST_POINTS)
    clear = [(r, c) for r in range(16) for c in range(4, 12) if len(set(got[r, c].tolist())) > 1]
    assert clear == [(2, 5), (9, 11)]


@pytest.mark.parametrize("number", [-1, 64 + 256])
def test_number_outside_the_picture_is_refused(number: int) -> None:
    with pytest.raises(InputError, match=r"0\.\.319"):
        draw_tiles(TILES, [], TALL, 56, np.array([number]))


def test_lone_tile_has_one_row() -> None:
    page = draw_tiles(TILES[:1], [(1, [np.arange(9)])], Tiling(9, 9, 0, 0, 8), 56)
    assert page.size == draw(TILES[0], [(1, np.arange(9))], 8, 56).size


def test_grid_that_is_all_padding_is_drawn() -> None:
    page = draw_tiles(TILES[:3], [(1, [np.arange(64)] * 3)], Tiling(3000, 1, 1, 2, 8), 56)
    assert (np.asarray(page)[-GAP - 20, GAP + 40 : GAP + 200] == PADDING).all()


def test_patch_number_outside_a_tile_is_refused() -> None:
    with pytest.raises(InputError, match=r"0\.\.63"):
        draw_tiles(TILES, [(1, [np.array([64])] * 5)], TALL, 56)
