"""LLaVA-NeXT's geometry against transformers' functions, docs/algorithm.md's text and small cases by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowcut.anyres import (
    NO_TOKEN,
    Tiling,
    best_pinpoint,
    choose_tiling,
    image_slots,
    kept_patches,
    newline_places,
    newline_slots,
    patch_places,
    vision_feeds,
)
from flowcut.config import PINPOINTS, LlavaConfig, TextConfig, VisionConfig
from flowcut.errors import ConfigError

SIDE, PATCH = 28, 14  # 2 x 2 patches a tile
GRID, PATCHES = SIDE // PATCH, (SIDE // PATCH) ** 2
sizes = st.one_of(st.integers(1, 60), st.integers(1, 5000))
pinpoint = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda edges: [n * SIDE for n in edges])
pinpoint_lists = st.lists(pinpoint, min_size=1, max_size=6)


def geometry(pinpoints: list[list[int]], side: int = SIDE) -> LlavaConfig:
    vision = VisionConfig(32, 64, 4, 2, image_size=side, patch_size=PATCH)
    return LlavaConfig(vision, TextConfig(64, 64, 2, 2, 2, 32064), grid_pinpoints=tuple(map(tuple, pinpoints)))


@settings(max_examples=400, deadline=None)
@given(width=sizes, height=sizes, pinpoints=pinpoint_lists)
@example(width=3000, height=1, pinpoints=PINPOINTS)  # no pinpoint shows a single pixel: the smallest is taken
@example(width=1, height=1, pinpoints=PINPOINTS)
def test_pinpoint_and_grid_are_those_of_transformers(width: int, height: int, pinpoints: list[list[int]]) -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
    )

    assert tuple(best_pinpoint(pinpoints, width, height)) == select_best_resolution((height, width), pinpoints)
    got = choose_tiling(geometry(pinpoints), width, height)
    assert (got.rows, got.columns) == get_anyres_image_grid_shape((height, width), pinpoints, SIDE)
    assert got.tiles == image_size_to_num_patches((height, width), pinpoints, SIDE)


@settings(max_examples=400, deadline=None)
@given(width=sizes, height=sizes, rows=st.integers(1, 4), columns=st.integers(1, 4), side=st.integers(1, 24))
@example(width=3000, height=1, rows=1, columns=2, side=24)
@example(width=1, height=3000, rows=1, columns=2, side=24)
@example(width=336, height=672, rows=2, columns=1, side=24)
def test_padding_is_that_of_transformers_and_of_the_algorithm(
    width: int, height: int, rows: int, columns: int, side: int
) -> None:
    import torch
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    gh, gw = rows * side, columns * side
    numbers = torch.arange(gh * gw).reshape(1, gh, gw)
    got_rows, got_columns = Tiling(width, height, rows, columns, side).seen
    seen = numbers[0, got_rows.start : got_rows.stop, got_columns.start : got_columns.stop]
    theirs = unpad_image(numbers, (height, width))[0]
    assert seen.shape == theirs.shape
    assert (seen == theirs).all()
    top, left = 0, 0  # docs/algorithm.md 5, in exact fractions
    if Fraction(width, height) > Fraction(gw, gh):
        top = (gh - int(Fraction(height * gw, width))) // 2
    else:
        left = (gw - int(Fraction(width * gh, height))) // 2
    assert (got_rows, got_columns) == (range(top, gh - top), range(left, gw - left))


@settings(max_examples=150, deadline=None)
@given(width=sizes, height=sizes, pinpoints=pinpoint_lists)
def test_unpruned_reading_order_is_the_packing_of_transformers(
    width: int, height: int, pinpoints: list[list[int]]
) -> None:
    """Every patch carries its number as its only feature, newlines carry -1; transformers packs, we sort by place."""
    import torch
    from transformers import LlavaNextConfig
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    config, tiling = geometry(pinpoints), choose_tiling(geometry(pinpoints), width, height)
    features = torch.arange(tiling.tiles * PATCHES, dtype=torch.float32).reshape(tiling.tiles, PATCHES, 1)
    holder = type("Holder", (), {})()
    holder.config = LlavaNextConfig(
        vision_config={"image_size": SIDE, "patch_size": PATCH}, image_grid_pinpoints=pinpoints
    )
    [packed], [length] = LlavaNextModel.pack_image_features(
        holder, [features], [(height, width)], "default", torch.tensor([-1.0])
    )
    patches, newlines = patch_places(tiling).ravel(), newline_places(tiling, pruned=False)
    places = np.concatenate([patches, newlines])
    values = np.concatenate([np.arange(len(patches)), np.full(len(newlines), -1)])[places < NO_TOKEN]
    ours = values[np.argsort(places[places < NO_TOKEN], kind="stable")]
    assert ours.tolist() == packed[:, 0].int().tolist()
    assert vision_feeds(config, PATCHES, [tiling]).rows == (length,)


@settings(max_examples=200, deadline=None)
@given(width=sizes, height=sizes, pinpoints=pinpoint_lists)
def test_every_token_has_a_place_of_its_own(width: int, height: int, pinpoints: list[list[int]]) -> None:
    tiling = choose_tiling(geometry(pinpoints), width, height)
    for pruned in (True, False):
        places = np.concatenate([patch_places(tiling).ravel(), newline_places(tiling, pruned)])
        real = places[places < NO_TOKEN]
        assert len(set(real.tolist())) == len(real)
        assert real.min() >= 0
        assert (places[places >= NO_TOKEN] == NO_TOKEN).all()
        assert len(real) <= image_slots(geometry(pinpoints), PATCHES)


@settings(max_examples=200, deadline=None)
@given(width=sizes, height=sizes, pinpoints=pinpoint_lists, data=st.data())
def test_kept_patches_read_as_the_algorithm_says(
    width: int, height: int, pinpoints: list[list[int]], data: st.DataObject
) -> None:
    """Base first, the tiles put back on the grid, padding cut off, row by row."""
    tiling = choose_tiling(geometry(pinpoints), width, height)
    kept = [data.draw(st.sets(st.integers(0, PATCHES - 1), min_size=2, max_size=2)) for _ in range(tiling.tiles)]
    grid = np.zeros((tiling.rows * GRID, tiling.columns * GRID), bool)
    for i, numbers in enumerate(kept[1:]):
        for n in numbers:
            grid[i // tiling.columns * GRID + n // GRID, i % tiling.columns * GRID + n % GRID] = True
    rows, columns = tiling.seen
    expected = [*sorted(kept[0]), *(PATCHES + r * grid.shape[1] + c for r in rows for c in columns if grid[r, c])]
    places = np.concatenate([patch_places(tiling)[i, sorted(numbers)] for i, numbers in enumerate(kept)])
    assert kept_patches(np.sort(places)).tolist() == expected


X = NO_TOKEN


def test_places_of_a_lone_tile() -> None:
    tiling = choose_tiling(geometry([]), 100, 50)
    assert (tiling.tiles, tiling.grid, tiling.seen) == (1, (0, 0), (range(0), range(0)))
    assert patch_places(tiling).tolist() == [[0, 2, 4, 6]]
    assert newline_places(tiling, pruned=True).tolist() == newline_places(tiling, pruned=False).tolist() == [7]


def test_places_of_a_grid_of_one_tile() -> None:
    tiling = choose_tiling(geometry([[SIDE, SIDE]]), 28, 28)
    assert patch_places(tiling).tolist() == [[0, 2, 4, 6], [8, 10, 12, 14]]
    assert newline_places(tiling, pruned=True).tolist() == []
    assert newline_places(tiling, pruned=False).tolist() == [11, 15]


def test_places_of_a_wide_picture_in_two_tiles() -> None:
    tiling = choose_tiling(geometry([[SIDE, 2 * SIDE]]), 40, 20)
    assert patch_places(tiling).tolist() == [[0, 2, 4, 6], [8, 10, 16, 18], [12, 14, 20, 22]]
    assert newline_places(tiling, pruned=False).tolist() == [15, 23]


def test_places_of_a_tall_picture_padded_at_left_and_right() -> None:
    tiling = choose_tiling(
        geometry([[2 * SIDE, 2 * SIDE]]), 20, 40
    )  # 4 x 4 patches, of which the two middle columns show it
    assert tiling.seen == (range(4), range(1, 3))
    assert patch_places(tiling).tolist() == [
        [0, 2, 4, 6],
        [X, 10, X, 18],
        [12, X, 20, X],
        [X, 26, X, 34],
        [28, X, 36, X],
    ]
    assert newline_places(tiling, pruned=False).tolist() == [15, 23, 31, 39]


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000)])
def test_picture_whose_grid_is_all_padding_keeps_its_base(size: tuple[int, int]) -> None:
    tiling = choose_tiling(geometry([[SIDE, 2 * SIDE]]), *size)
    places = patch_places(tiling)
    assert places[0].tolist() == [0, 2, 4, 6]
    assert (places[1:] == X).all()
    # as transformers has it: rows without a patch end in newlines, no rows in none
    assert newline_places(tiling, pruned=False).tolist() == ([] if size[0] > size[1] else [15, 23])


def test_feeds_of_pictures_of_three_and_five_tiles() -> None:
    config = geometry([[SIDE, 2 * SIDE], [2 * SIDE, 2 * SIDE]])
    pictures = [choose_tiling(config, 40, 20), choose_tiling(config, 50, 50)]
    feeds = vision_feeds(config, 2, pictures)
    assert feeds.image_tiles.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]]
    assert feeds.newline_places.tolist() == [[X], [X]]
    np.testing.assert_array_equal(feeds.tile_places, np.concatenate([patch_places(tiling) for tiling in pictures]))
    assert feeds.rows == (3 * 2, 5 * 2)
    assert (newline_slots(config, 2), image_slots(config, 2)) == (1, 5 * 2 + 1)
    assert {array.dtype for array in (feeds.tile_places, feeds.image_tiles, feeds.newline_places)} == {
        np.dtype("int64")
    }


def test_feeds_of_the_same_pictures_with_nothing_pruned() -> None:
    config = geometry([[SIDE, 2 * SIDE], [2 * SIDE, 2 * SIDE]])
    feeds = vision_feeds(config, 4, [choose_tiling(config, 40, 20), choose_tiling(config, 50, 50)])
    assert feeds.newline_places.tolist() == [[15, 23, X, X], [15, 23, 31, 39]]
    assert feeds.rows == (4 + 8 + 2, 4 + 16 + 4)
    assert (newline_slots(config, 4), image_slots(config, 4)) == (4, 5 * 4 + 4)


@pytest.mark.parametrize("tokens", [2, 4])
def test_feeds_of_lone_tiles(tokens: int) -> None:
    config = geometry([])
    feeds = vision_feeds(config, tokens, [choose_tiling(config, 9, 70), choose_tiling(config, 70, 9)])
    assert feeds.image_tiles.tolist() == [[1], [2]]
    assert feeds.newline_places.tolist() == [[7], [7]]
    assert feeds.rows == (tokens + 1, tokens + 1)
    assert image_slots(config, tokens) == tokens + 1


def test_feeds_of_a_grid_of_one_tile() -> None:
    config = geometry([[SIDE, SIDE]])
    feeds = vision_feeds(config, 3, [choose_tiling(config, 28, 28)])
    assert feeds.image_tiles.tolist() == [[1, 2]]
    assert feeds.newline_places.tolist() == [[X]]
    assert feeds.rows == (6,)


def test_published_model_has_2880_visual_tokens_before_newlines() -> None:
    config = LlavaConfig(VisionConfig(), TextConfig(vocab_size=32064), grid_pinpoints=tuple(map(tuple, PINPOINTS)))
    square = choose_tiling(config, 672, 672)
    assert (square.tiles, square.grid) == (5, (48, 48))
    assert vision_feeds(config, 576, [square]).rows == (2880 + 48,)
    assert vision_feeds(config, 80, [square]).rows == (400,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 5, 1, 1, 2), "tiling's width must be at least 1, got 0"),
        ((5, -1, 1, 1, 2), "tiling's height must be at least 1, got -1"),
        ((5, 5, -1, 2, 2), "tiling's rows must be at least 0, got -1"),
        ((5, 5, 1, -2, 2), "tiling's columns must be at least 0, got -2"),
        ((5, 5, 1, 1, 0), "tiling's side must be at least 1, got 0"),
        ((5, 5, 0, 2, 2), "tiling's rows and columns must both be 0 or neither, got 0, 2"),
        ((5, 5, 2, 0, 2), "tiling's rows and columns must both be 0 or neither, got 2, 0"),
    ],
)
def test_no_picture_is_cut_into_nonsense(values: tuple[int, int, int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tiling(*values)
