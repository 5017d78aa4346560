"""LLaVA-NeXT's tiles, bit for bit those of transformers' own processor."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from flowcut import preprocess
from flowcut.anyres import Tiling, choose_tiling
from flowcut.config import PINPOINTS, LlavaConfig, TextConfig, VisionConfig
from flowcut.errors import InputError
from flowcut.image_settings import ImageSettings
from flowcut.tiles import image_tiles, tiled_pixels

SIDE = 28
SMALL = [[1 * SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]


def geometry(pinpoints: list[list[int]], side: int = SIDE) -> LlavaConfig:
    vision = VisionConfig(32, 64, 4, 2, image_size=side, patch_size=14)
    return LlavaConfig(vision, TextConfig(64, 64, 2, 2, 2, 32064), grid_pinpoints=tuple(map(tuple, pinpoints)))


def reference(image: Image.Image, pinpoints: list[list[int]], side: int = SIDE, **fields: Any) -> np.ndarray:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=pinpoints,
        do_pad=False,
        **fields,
    )
    return np.asarray(processor(image)["pixel_values"][0])


def ours(image: Image.Image, pinpoints: list[list[int]], side: int = SIDE, **fields: Any) -> np.ndarray:
    tiling = choose_tiling(geometry(pinpoints, side), image.width, image.height)
    return image_tiles(image, ImageSettings(side, side, **fields), tiling)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("cut", [(0, 0, 512, 512), (0, 100, 512, 300), (150, 0, 260, 512), (40, 40, 41, 512)])
def test_photograph_equals_transformers_at_the_size_of_the_published_model(cut: tuple[int, int, int, int]) -> None:
    image = Image.fromarray(data.astronaut()).crop(cut)
    got = ours(image, PINPOINTS, 336)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, reference(image, PINPOINTS, 336))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2999), (28, 28), (56, 56), (57, 29), (1200, 900)])
def test_extreme_picture_equals_transformers(size: tuple[int, int]) -> None:
    np.testing.assert_array_equal(ours(noise(*size), SMALL), reference(noise(*size), SMALL))


pinpoint = st.lists(st.integers(1, 4).map(lambda n: n * SIDE), min_size=2, max_size=2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.lists(pinpoint, min_size=1, max_size=6))
def test_any_picture_and_pinpoints_equal_transformers(width: int, height: int, pinpoints: list[list[int]]) -> None:
    image = noise(width, height)
    np.testing.assert_array_equal(ours(image, pinpoints), reference(image, pinpoints))


@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        ({"resample": 2}, {"resample": 2}),
        ({"do_rescale": False}, {"do_rescale": False}),
        ({"do_normalize": False}, {"do_normalize": False}),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, {"mean": (0.5,) * 3, "std": (0.25,) * 3}),
    ],
    ids=["bilinear", "not-rescaled", "not-normalised", "colours"],
)
def test_fields_mean_what_they_mean_in_transformers(theirs: dict[str, Any], own: dict[str, Any]) -> None:
    image = noise(90, 61)
    np.testing.assert_array_equal(ours(image, SMALL, **own), reference(image, SMALL, **theirs))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_picture_of_another_mode_is_its_rgb(mode: str) -> None:
    image = noise(60, 31).quantize(64) if mode == "P" else noise(60, 31).convert(mode)
    np.testing.assert_array_equal(ours(image, SMALL), ours(image.convert("RGB"), SMALL))


def test_lone_tile_is_the_whole_picture_stretched() -> None:
    image = Image.new("RGB", (100, 10), (10, 20, 30))
    image.paste((200, 100, 50), (50, 0, 100, 10))
    plain = {"do_rescale": False, "do_normalize": False, "resample": 0}
    got = image_tiles(image, ImageSettings(SIDE, SIDE, **plain), Tiling(100, 10, 0, 0, 2))  # type: ignore[arg-type]
    expected = np.zeros((1, 3, SIDE, SIDE), np.float32)
    expected[..., : SIDE // 2] = np.array([10, 20, 30])[:, None, None]
    expected[..., SIDE // 2 :] = np.array([200, 100, 50])[:, None, None]
    np.testing.assert_array_equal(got, expected)


def test_grid_of_one_tile_is_padded_with_black_where_the_base_is_stretched() -> None:
    plain = ImageSettings(SIDE, SIDE, do_rescale=False, do_normalize=False)
    base, tile = image_tiles(Image.new("RGB", (56, 28), (9, 9, 9)), plain, Tiling(56, 28, 1, 1, 2))
    assert (base == 9).all()
    assert (tile[:, 7:21] == 9).all()
    assert (tile[:, :7] == 0).all()
    assert (tile[:, 21:] == 0).all()


def test_tiles_of_several_pictures_follow_each_other() -> None:
    images, own = [noise(60, 30), noise(50, 50), noise(20, 70)], ImageSettings(SIDE, SIDE)
    pixels, tilings = tiled_pixels(images, own, geometry(SMALL))
    assert [tiling.tiles for tiling in tilings] == [3, 5, 4]
    np.testing.assert_array_equal(pixels, np.concatenate([ours(image, SMALL) for image in images]))


def test_no_picture_is_an_empty_batch() -> None:
    pixels, tilings = tiled_pixels([], ImageSettings(SIDE, SIDE), geometry(SMALL))
    assert pixels.shape == (0, 3, SIDE, SIDE)
    assert tilings == []


@pytest.mark.parametrize("size", [(1, 4_000_000), (3, 3_000_000), (9_000_000, 1)])
def test_picture_too_narrow_to_resize_is_an_input_error_before_memory_is_taken(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        InputError, match=rf"at most {preprocess.MAX_RESIZED_PIXELS} pixels .* for {size[0]} x {size[1]}"
    ):
        ours(image, SMALL)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
