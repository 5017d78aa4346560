"""Pictures to pixel_values, as the checkpoint's own image processor makes them, with numpy and Pillow only.

The reference is the Pillow backend of transformers' CLIPImageProcessor and LlavaImageProcessor, operation for
operation, so that the results are equal to the last bit.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flowcut.errors import ConfigError, InputError

PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
MAX_RESIZED_PIXELS = 1 << 26
"""Most pixels of an intermediate picture: 4 bytes each in Pillow, so 256 MiB."""

_FLAGS = ("do_pad", "do_resize", "do_center_crop", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes [3, image_size, image_size]: pad, resize, crop, rescale, normalise, in this order.

    `stretch` resizes both edges to `shortest_edge`, giving up the aspect ratio. `do_pad` first pads to a square with
    the mean colour. `resample` is Pillow's number of the filter.
    """

    image_size: int
    shortest_edge: int
    stretch: bool = False
    do_pad: bool = False
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        for name in ("image_size", "shortest_edge"):
            _check(_is_integer(getattr(self, name)) and getattr(self, name) > 0, name, "a positive integer", self)
        for name in ("stretch", *_FLAGS):
            _check(isinstance(getattr(self, name), bool), name, "true or false", self)
        filters = ", ".join(f"{f.value} ({f.name.lower()})" for f in Image.Resampling)
        known = _is_integer(self.resample) and self.resample in set(Image.Resampling)
        _check(known, "resample", f"one of {filters}", self)
        _check(_is_number(self.rescale_factor) and self.rescale_factor > 0, "rescale_factor", "positive", self)
        _check(_is_colour(self.mean), "mean", "three numbers", self)
        _check(_is_colour(self.std) and 0 not in self.std, "std", "three numbers other than 0", self)
        square = self.do_resize and (self.stretch or self.do_pad) and self.shortest_edge == self.image_size
        if not self.do_center_crop and not square:
            raise ConfigError(
                f"do_center_crop must be true unless resizing alone gives {self.image_size} x {self.image_size} pixels."
            )

    @staticmethod
    def from_directory(directory: Path, image_size: int) -> ImageSettings:
        """Read a checkpoint's processor_config.json or preprocessor_config.json; without either, CLIP's defaults.

        Raises:
            ConfigError: unreadable, of another processor, or of another `image_size` than the vision tower's.
        """
        nested = _read_json(directory / "processor_config.json").get("image_processor")
        data = nested if isinstance(nested, Mapping) else _read_json(directory / "preprocessor_config.json")
        if not data:
            return ImageSettings(image_size=image_size, shortest_edge=image_size)
        settings = _from_processor({key: value for key, value in data.items() if value is not None}, image_size)
        if settings.image_size != image_size:
            raise ConfigError(
                f"crop_size must be {image_size} (vision_config.image_size), got {settings.image_size}. "
                f"The image processor's file in {directory} is of another model."
            )
        return settings

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ImageSettings:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: a key that is unknown or missing, or a value that breaks its rule.
        """
        expected = {field.name for field in fields(ImageSettings)}
        if set(data) != expected:
            unknown, missing = sorted(set(data) - expected), sorted(expected - set(data))
            raise ConfigError(f"preprocessor settings must have exact keys, got unknown {unknown}, missing {missing}.")
        values: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in data.items()}
        return ImageSettings(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def open_image(source: Path | str | bytes | Image.Image | NDArray[np.uint8]) -> Image.Image:
    """A picture in RGB from a file, a file's bytes, a Pillow image or an array [height, width, 3] of uint8.

    As in transformers, the orientation that a camera stored (EXIF) is applied to files and bytes and not to Pillow
    images, transparency is laid over white, and other modes go through Pillow's `convert("RGB")`. Of an animation, the
    first frame is taken.

    Raises:
        InputError: missing, empty, damaged, not a picture, or larger than Pillow's `MAX_IMAGE_PIXELS`.
    """
    if isinstance(source, Image.Image):
        return _not_empty(_guarded(source, "image"), "image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _decode(source, "image")
    if isinstance(source, (str, Path)):
        return _decode(_read_bytes(Path(source)), str(source))
    raise InputError(f"image must be a file, bytes, a Pillow image or an array, got {type(source).__name__}.")


def pixel_values(images: Sequence[Image.Image], settings: ImageSettings) -> NDArray[np.float32]:
    """Pictures as [images, 3, image_size, image_size].

    Raises:
        InputError: a picture so long and narrow that resizing its short edge would take too much memory.
    """
    out = np.empty((len(images), 3, settings.image_size, settings.image_size), dtype=np.float32)
    for row, image in zip(out, images, strict=True):
        row[:] = _normalise(np.asarray(_fit(_rgb(image), settings)), settings).transpose(2, 0, 1)
    return out


def undo(pixels: NDArray[np.float32], settings: ImageSettings) -> Image.Image:
    """The picture that [3, image_size, image_size] of `pixel_values` shows, back in 0..255."""
    colours = pixels.astype(np.float64).transpose(1, 2, 0)
    if settings.do_normalize:
        colours = colours * np.array(settings.std) + np.array(settings.mean)
    if settings.do_rescale:
        colours = colours / settings.rescale_factor
    return Image.fromarray(np.clip(np.rint(colours), 0, 255).astype(np.uint8))


def _fit(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """Pad, resize and crop to image_size x image_size."""
    if settings.do_pad:
        image = _pad_to_square(image, settings.mean)
    if settings.do_resize:
        size = _resized(image.width, image.height, settings)
        _limit(image, *size)
        image = image.resize(size, Image.Resampling(settings.resample))
    if settings.do_center_crop:
        side = settings.image_size
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))  # black where the picture is smaller
    return image


def _resized(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    edge = settings.shortest_edge
    if settings.stretch:
        return edge, edge
    longest = int(edge * max(width, height) / min(width, height))
    return (edge, longest) if width <= height else (longest, edge)


def _pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    side = max(image.size)
    _limit(image, side, side)
    red, green, blue = (int(value * 255) for value in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _limit(image: Image.Image, width: int, height: int) -> None:
    # Resizing only what the crop keeps would avoid this, but Pillow's `box` is float32: other pixels than the reference
    if width * height > max(MAX_RESIZED_PIXELS, image.width * image.height):
        raise InputError(
            f"image must have at most {MAX_RESIZED_PIXELS} pixels once resized, got {image.width} x {image.height} "
            f"-> {width} x {height}. Cut it to a less narrow picture."
        )


def _normalise(image: NDArray[np.uint8], settings: ImageSettings) -> NDArray[np.float32]:
    """[..., 3] of 0..255 to the range of the checkpoint; the product in float64, the rest in float32."""
    values = image.astype(np.float32)
    if settings.do_rescale:
        values = (image.astype(np.float64) * settings.rescale_factor).astype(np.float32)
    if settings.do_normalize:
        values -= np.array(settings.mean, dtype=np.float32)
        values /= np.array(settings.std, dtype=np.float32)
    return values


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"image must be an existing file, got {str(path)!r}.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"image must be a readable file, got {str(path)!r}: {error.strerror}.") from None


def _decode(content: bytes, name: str) -> Image.Image:
    if not content:
        raise InputError(f"image must not be empty, got {name!r} of 0 bytes.")
    limit = Image.MAX_IMAGE_PIXELS
    too_large = InputError(f"image must have at most {limit} pixels, got {name!r}. Scale it down first.")
    try:
        image = Image.open(io.BytesIO(content))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_large from None
    except Exception as error:  # Image.open also lets parsers' own errors through
        raise InputError(f"image must be a picture that Pillow reads, got {name!r}.") from error
    # Pillow itself only warns up to twice the limit. Filters of warnings are the process's: not ours to change.
    if limit is not None and image.width * image.height > limit:
        raise too_large
    return _not_empty(_guarded(image, name, upright=True), name)


def _guarded(image: Image.Image, name: str, upright: bool = False) -> Image.Image:
    """Load the pixels. Damaged bytes make Pillow's decoders raise errors of many kinds, OSError the most usual."""
    try:
        return _rgb(ImageOps.exif_transpose(image) if upright else image)
    except Exception as error:
        raise InputError(f"image must be whole, got {name!r}, which is damaged or truncated ({error}).") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would cut at 255 and leave most pictures white
        deep = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _not_empty(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"image must have pixels, got {name!r} of {image.width} x {image.height}.")
    return image


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"image must be [height, width, 3] of uint8, got {list(array.shape)} of {array.dtype}.")
    return Image.fromarray(array)


def _from_processor(data: Mapping[str, Any], image_size: int) -> ImageSettings:
    """Settings from a Hugging Face image processor's fields; absent ones take that class's defaults."""
    kind = data.get("image_processor_type", data.get("feature_extractor_type", "LlavaImageProcessor"))
    base = str(kind).removesuffix("Fast").removesuffix("Pil")
    if base not in PROCESSORS:
        raise ConfigError(f"image_processor_type must be one of {', '.join(PROCESSORS)}, got {kind!r}.")
    if data.get("do_pad") and base != "LlavaImageProcessor":
        raise ConfigError(f"do_pad must be false with {kind}, got {data['do_pad']!r}. LlavaImageProcessor pads.")
    edge, stretch = _edge(data.get("size", {"shortest_edge": 224}), bool(data.get("default_to_square", False)))
    crops = data.get("do_center_crop", True)
    same = {name: data[name] for name in (*_FLAGS, "resample", "rescale_factor") if name in data}
    colours = {name: _colour(data[f"image_{name}"]) for name in ("mean", "std") if f"image_{name}" in data}
    side = _edge(data.get("crop_size", 224), True, "crop_size")[0] if crops else image_size
    return ImageSettings(image_size=side, shortest_edge=edge, stretch=stretch, **same, **colours)


def _edge(value: Any, square: bool, name: str = "size") -> tuple[int, bool]:
    """One edge in pixels and whether it stands for both, from any spelling transformers accepts."""
    if _is_integer(value):
        return value, square
    if isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if isinstance(value, Mapping):
        given = {key: edge for key, edge in value.items() if edge is not None}
        if given.keys() == {"shortest_edge"} and name == "size":
            return given["shortest_edge"], False
        if given.keys() == {"height", "width"} and given["height"] == given["width"]:
            return given["height"], True
    raise ConfigError(f"{name} must be one edge or equal height and width, got {value!r}.")


def _colour(value: Any) -> Any:
    """A number for all three channels, or one each; checked on construction."""
    return (value,) * 3 if _is_number(value) else tuple(value) if isinstance(value, list) else value


def _read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; nothing if the file does not exist."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a JSON object, got: {error}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a JSON object, got {type(data).__name__}.")
    return data


def _check(holds: bool, name: str, rule: str, settings: ImageSettings) -> None:
    if not holds:
        raise ConfigError(f"{name} of the image processor must be {rule}, got {getattr(settings, name)!r}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_colour(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(_is_number(channel) for channel in value)
