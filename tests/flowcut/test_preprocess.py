from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from flowcut.config import PINPOINTS as DEFAULT_PINPOINTS
from flowcut.config import LlavaConfig
from flowcut.errors import ConfigError, InputError
from flowcut.image_settings import NEXT_PROCESSOR
from flowcut.preprocess import ImageSettings, open_image, pixel_values, undo
from flowcut.tiles import tiled_pixels

ASSETS = Path(importlib.util.find_spec("flowcut").submodule_search_locations[0]) / "assets"  # type: ignore[union-attr,index]
CLIP = ImageSettings(image_size=56, shortest_edge=56)


def reference(image: Any, kind: str = "CLIP", **fields: Any) -> np.ndarray:
    """[3, S, S] by transformers' own processor of the Pillow backend."""
    if kind == "CLIP":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    else:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor
    return np.asarray(Processor(**fields)(image)["pixel_values"][0])


def clip(image: Any, size: int = 56) -> np.ndarray:
    return reference(image, size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    return image.convert("RGB").quantize(64) if mode == "P" else image if mode == "RGBA" else image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(directory: Path, name: str, content: Any) -> Path:
    (directory / name).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_photograph_equals_transformers(name: str) -> None:
    image = Image.fromarray(getattr(data, name)())
    got = pixel_values([image], ImageSettings(image_size=336, shortest_edge=336))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[0], clip(image, 336))


@pytest.mark.parametrize("size", [(3, 5), (640, 2), (2, 640), (1, 1), (57, 56), (56, 56), (4096, 31)])
def test_odd_size_equals_transformers(size: tuple[int, int]) -> None:
    image = noise(*size)
    np.testing.assert_array_equal(pixel_values([image], CLIP)[0], clip(image))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    edge=st.integers(1, 40),
    crop=st.integers(1, 40),
    resample=st.sampled_from(list(Image.Resampling)),
)
def test_any_shape_edge_crop_and_filter_equal_transformers(
    width: int, height: int, edge: int, crop: int, resample: Image.Resampling
) -> None:
    image = noise(width, height)
    got = pixel_values([image], ImageSettings(crop, edge, resample=int(resample)))[0]
    fields = {"size": {"shortest_edge": edge}, "crop_size": {"height": crop, "width": crop}}
    np.testing.assert_array_equal(got, reference(image, resample=resample, **fields))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_mode_equals_transformers(mode: str) -> None:
    image = noise(70, 60, mode)
    np.testing.assert_array_equal(pixel_values([open_image(image)], CLIP)[0], clip(image))


def test_picture_is_the_same_alone_and_in_a_batch() -> None:
    images = [noise(90, 60), noise(31, 200), noise(56, 56)]
    together = pixel_values(images, CLIP)
    for image, row in zip(images, together, strict=True):
        np.testing.assert_array_equal(pixel_values([image], CLIP)[0], row)


def test_no_picture_is_an_empty_batch() -> None:
    assert pixel_values([], CLIP).shape == (0, 3, 56, 56)


@pytest.mark.parametrize("size", [(90, 41), (40, 91), (64, 64)])
def test_padding_equals_llava_image_processor(size: tuple[int, int], tmp_path: Path) -> None:
    fields = {"do_pad": True, "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    write(tmp_path, "preprocessor_config.json", {"image_processor_type": "LlavaImageProcessorFast", **fields})
    image = noise(*size)
    got = pixel_values([image], ImageSettings.from_directory(tmp_path, 56))[0]
    np.testing.assert_array_equal(got, reference(image, "Llava", **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"size": {"height": 56, "width": 56}, "do_center_crop": False},
        {"size": {"height": 60, "width": 60}},
        {"size": 70},
        {"size": {"shortest_edge": 50}, "resample": 2},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_fields_mean_what_they_mean_in_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"size": {"shortest_edge": 56}, "crop_size": 56} | fields
    write(tmp_path, "preprocessor_config.json", fields)
    image = noise(90, 61)
    got = pixel_values([image], ImageSettings.from_directory(tmp_path, 56))[0]
    np.testing.assert_array_equal(got, reference(image, **fields))


def test_reads_what_transformers_saves(tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 70}, crop_size=56, resample=2, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    expected = ImageSettings(56, 70, resample=2, mean=(0.1, 0.2, 0.3))
    assert ImageSettings.from_directory(tmp_path, 56) == expected
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    write(tmp_path, "processor_config.json", {"image_processor": saved, "processor_class": "LlavaProcessor"})
    assert ImageSettings.from_directory(tmp_path, 56) == expected


def test_processor_config_goes_before_preprocessor_config(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"size": 30, "crop_size": 56})
    write(tmp_path, "processor_config.json", {"image_processor": {"size": 40, "crop_size": 56}})
    assert ImageSettings.from_directory(tmp_path, 56).shortest_edge == 40
    write(tmp_path, "processor_config.json", {"processor_class": "LlavaProcessor"})
    assert ImageSettings.from_directory(tmp_path, 56).shortest_edge == 30


@pytest.mark.parametrize("alias", ["llava-tiny", "llava-1.5-7b", "llava-1.5-13b"])
def test_bundled_settings_fit_their_geometry_and_equal_transformers(alias: str) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    directory = ASSETS / alias
    size = LlavaConfig.from_file(directory / "config.json").vision.image_size
    image = Image.fromarray(data.coffee())
    expected = CLIPImageProcessorPil.from_pretrained(directory)(image)["pixel_values"][0]
    got = pixel_values([image], ImageSettings.from_directory(directory, size))[0]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("alias", ["llava-v1.6-vicuna-7b", "llava-v1.6-vicuna-13b"])
def test_bundled_settings_of_llava_next_equal_transformers(alias: str) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    directory = ASSETS / alias
    config = LlavaConfig.from_file(directory / "config.json")
    image = Image.fromarray(data.coffee())
    expected = LlavaNextImageProcessorPil.from_pretrained(directory)(image)["pixel_values"][0]
    own = ImageSettings.from_directory(directory, config.vision.image_size, config.grid_pinpoints)
    np.testing.assert_array_equal(tiled_pixels([image], own, config)[0], expected)


def test_no_file_means_clip_defaults_at_the_towers_size(tmp_path: Path) -> None:
    assert ImageSettings.from_directory(tmp_path, 56) == CLIP


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"crop_size": 64}, r"crop_size must be 56 \(vision_config.image_size\), got 64"),
        ({"crop_size": {"height": 56, "width": 48}}, "crop_size must be one edge"),
        ({"size": {"longest_edge": 56}}, "size must be one edge"),
        ({"size": "56"}, "size must be one edge"),
        ({"size": 0}, "shortest_edge .*positive integer, got 0"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type must be one of"),
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, "do_pad must be false"),
        ({"resample": 9}, "resample .* got 9"),
        ({"resample": "bicubic"}, "resample .* got 'bicubic'"),
        ({"do_resize": "no"}, "do_resize .*true or false"),
        ({"image_mean": [0.5, 0.5]}, "mean .*three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "std .*other than 0"),
        ({"rescale_factor": -1}, "rescale_factor .*positive"),
        ({"do_center_crop": False}, "do_center_crop must be true"),
    ],
)
def test_refuses_settings_it_would_get_wrong(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"size": 56, "crop_size": 56} | fields)
    with pytest.raises(ConfigError, match=match):
        ImageSettings.from_directory(tmp_path, 56)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\ufffd"])
def test_refuses_a_file_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"preprocessor_config.json must be a JSON object"):
        ImageSettings.from_directory(tmp_path, 56)


PINPOINTS = ((56, 112), (112, 56))
NEXT = {
    "image_processor_type": "LlavaNextImageProcessor",
    "image_grid_pinpoints": [list(pair) for pair in PINPOINTS],
    "aspect_ratio_setting": "anyres",
    "do_pad": True,
    "size": {"shortest_edge": 56},
    "crop_size": {"height": 56, "width": 56},
}


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_llava_next_processor_pads_batches_and_not_pictures(suffix: str, tmp_path: Path) -> None:
    fields = {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "do_rescale": False}
    write(tmp_path, "preprocessor_config.json", NEXT | fields | {"image_processor_type": NEXT_PROCESSOR + suffix})
    expected = ImageSettings(56, 56, resample=2, mean=(0.1, 0.2, 0.3), do_rescale=False)
    assert ImageSettings.from_directory(tmp_path, 56, PINPOINTS) == expected


def test_reads_what_transformers_saves_of_llava_next(tmp_path: Path) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    fields = {name: NEXT[name] for name in ("size", "crop_size", "image_grid_pinpoints")}
    LlavaNextImageProcessorPil(**fields).save_pretrained(tmp_path)
    assert ImageSettings.from_directory(tmp_path, 56, PINPOINTS) == CLIP


def test_no_file_means_clip_defaults_for_llava_next_too(tmp_path: Path) -> None:
    assert ImageSettings.from_directory(tmp_path, 56, PINPOINTS) == CLIP


def test_pinpoints_absent_from_the_file_are_those_of_transformers(tmp_path: Path) -> None:
    sizes = {"size": 336, "crop_size": 336}
    write(tmp_path, "preprocessor_config.json", {"image_processor_type": NEXT_PROCESSOR} | sizes)
    assert ImageSettings.from_directory(tmp_path, 336, DEFAULT_PINPOINTS) == ImageSettings(336, 336)
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints must be \[\[336, 672\]\] \(config.json\), got"):
        ImageSettings.from_directory(tmp_path, 336, DEFAULT_PINPOINTS[:1])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"image_grid_pinpoints": [[56, 112]]},
            r"image_grid_pinpoints must be \[\[56, 112\], \[112, 56\]\] \(config.json\), got \[\[56, 112\]\]\. .*other",
        ),
        (
            {"image_grid_pinpoints": [[112, 56], [56, 112]]},
            "image_grid_pinpoints must be",
        ),  # the first of equals is taken
        ({"image_grid_pinpoints": "anyres"}, "image_grid_pinpoints must be .* got 'anyres'"),
        ({"aspect_ratio_setting": "pad"}, "aspect_ratio_setting must be 'anyres', got 'pad'"),
        ({"size": {"shortest_edge": 48}}, r"size must be 56 \(vision_config.image_size\), got 48"),
        ({"crop_size": 48}, r"crop_size must be 56 \(vision_config.image_size\), got 48"),
        ({"image_std": [0, 1, 1]}, "std .*other than 0"),
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "must be LlavaNextImageProcessor as config.json is LLaVA-NeXT",
        ),
    ],
)
def test_refuses_settings_of_llava_next_it_would_get_wrong(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", NEXT | fields)
    with pytest.raises(ConfigError, match=match) as raised:
        ImageSettings.from_directory(tmp_path, 56, PINPOINTS)
    assert "\n" not in str(raised.value)


def test_llava_next_processor_beside_a_llava_config_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", NEXT)
    with pytest.raises(ConfigError, match=r"LLaVA-1\.5's as config.json is, got 'LlavaNextImageProcessor'"):
        ImageSettings.from_directory(tmp_path, 56)


def test_dict_round_trip_through_json() -> None:
    other = ImageSettings(56, 70, do_pad=True, resample=2, mean=(0.1, 0.2, 0.3))
    assert ImageSettings.from_dict(json.loads(json.dumps(other.to_dict()))) == other


@pytest.mark.parametrize("change", [{"extra": 1}, {"mean": "grey"}, {"image_size": 56.0}])
def test_dict_with_an_unknown_key_or_a_wrong_value_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ImageSettings.from_dict(CLIP.to_dict() | change)


def test_dict_without_a_key_is_refused() -> None:
    values = CLIP.to_dict()
    del values["mean"]
    with pytest.raises(ConfigError, match="missing \\['mean'\\]"):
        ImageSettings.from_dict(values)


def test_undo_gives_back_the_cropped_picture() -> None:
    image = noise(56, 56)
    np.testing.assert_array_equal(np.asarray(undo(pixel_values([image], CLIP)[0], CLIP)), np.asarray(image))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_file_bytes_and_array_give_the_same_picture(kind: str, tmp_path: Path) -> None:
    image = noise(40, 30)
    content = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "picture"
    path.write_bytes(content)
    for source in (path, str(path), content, np.asarray(image), image):
        opened = open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(image))


def test_camera_orientation_is_applied_as_transformers_does(tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    noise(40, 30).save(path, exif=exif)
    assert open_image(path).size == (30, 40)
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(load_image(str(path))))


def test_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(content).getpixel((4, 4)) == (255, 0, 0)


def test_transparency_is_laid_over_white() -> None:
    assert open_image(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = noise(2, 2, "P")
    clear = palette.getpixel((0, 0))
    assert open_image(encoded(palette, "PNG", transparency=clear)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_truncated_file_is_an_input_error_that_names_it(kind: str, tmp_path: Path) -> None:
    content = encoded(noise(64, 64), kind)
    path = tmp_path / "half.img"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"half\.img"):
        open_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the TIFF decoder's about damaged tags
@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), data=st.data())
def test_damaged_bytes_give_a_picture_or_an_input_error(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(noise(16, 16), kind))
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, min_size=1, max_size=8)):
        content[place] = value
    with contextlib.suppress(InputError):
        assert open_image(bytes(content)).mode == "RGB"


def test_missing_file_directory_empty_file_and_text_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    for name, rule in [("none.png", "existing"), (".", "existing"), ("empty.png", "empty"), ("text.png", "picture")]:
        with pytest.raises(InputError, match=rule) as raised:
            open_image(tmp_path / name)
        assert Path(name).name in str(raised.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("times", [3000 / 2999, 1.5, 3])
def test_decompression_bomb_is_an_input_error(times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(noise(60, 50), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", round(3000 / times))
    with pytest.raises(InputError, match=rf"at most {round(3000 / times)} pixels"):
        open_image(content)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_an_input_error_where_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(noise(60, 50), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(InputError, match="at most 2000 pixels"):
        open_image(content)


@pytest.mark.parametrize("limit", [3000, None])
def test_picture_within_pillows_limit_is_opened_without_touching_warning_filters(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(noise(60, 50), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with monkeypatch.context() as patch:
        patch.setattr(warnings, "catch_warnings", None)  # not safe between threads
        assert open_image(content).size == (60, 50)


@pytest.mark.parametrize(
    "source",
    [
        Image.new("RGB", (0, 5)),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float32),
        17,
    ],
    ids=["no-pixels", "no-rows", "grey", "four-channels", "float", "number"],
)
def test_source_that_is_no_colour_picture_is_an_input_error(source: Any) -> None:
    with pytest.raises(InputError, match="image must"):
        open_image(source)


def test_picture_too_narrow_to_resize_is_an_input_error() -> None:
    with pytest.raises(
        InputError, match=r"at most \d+ pixels while it is resized, got \d+ for 1 x 30000 -> 56 x 1680000"
    ):
        pixel_values([Image.new("RGB", (1, 30000))], CLIP)


def test_sixteen_bits_are_the_same_picture_as_eight() -> None:
    """transformers cuts them at 255, which leaves most such pictures white: the one departure from it."""
    grey = np.asarray(noise(20, 30, "L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode.startswith("I;16")
    assert np.array_equal(np.asarray(open_image(deep)), np.asarray(open_image(Image.fromarray(grey))))
