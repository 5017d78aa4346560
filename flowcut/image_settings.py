"""How a checkpoint wants its pictures prepared, read from its processor's file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from flowcut.config import PINPOINTS, is_integer
from flowcut.errors import ConfigError

Pinpoints = Sequence[Sequence[int]]

PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
NEXT_PROCESSOR = "LlavaNextImageProcessor"

_FLAGS = ("do_pad", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
_NUMBERS = ("resample", "rescale_factor")


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes [3, image_size, image_size]: pad, resize, crop, rescale, normalise, in this order.

    `stretch` resizes both edges to `shortest_edge`, giving up the aspect ratio. `do_pad` first pads to a square with
    the mean colour. `resample` is Pillow's number of the filter. Of LLaVA-NeXT's tiles, which are stretched or cut to
    image_size x image_size (flowcut/tiles.py), the filter and the colours are read only.
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
            _check(is_integer(getattr(self, name)) and getattr(self, name) > 0, name, "a positive integer", self)
        for name in ("stretch", *_FLAGS):
            _check(isinstance(getattr(self, name), bool), name, "true or false", self)
        filters = ", ".join(f"{f.value} ({f.name.lower()})" for f in Image.Resampling)
        known = is_integer(self.resample) and self.resample in set(Image.Resampling)
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
    def from_directory(directory: Path, image_size: int, grid_pinpoints: Pinpoints | None = None) -> ImageSettings:
        """Read a checkpoint's processor_config.json or preprocessor_config.json; without either, CLIP's defaults.

        Args:
            grid_pinpoints: LlavaConfig.grid_pinpoints: LLaVA-NeXT's, None for LLaVA-1.5.

        Raises:
            ConfigError: unreadable, of another processor, or of another `image_size` or pinpoints than config.json's.
        """
        nested = _read_json(directory / "processor_config.json").get("image_processor")
        data = nested if isinstance(nested, Mapping) else _read_json(directory / "preprocessor_config.json")
        if not data:
            return ImageSettings(image_size=image_size, shortest_edge=image_size)
        given = {key: value for key, value in data.items() if value is not None}
        try:
            if grid_pinpoints is None:
                settings = _from_processor(given, image_size)
            else:
                settings = _from_next_processor(given, image_size, grid_pinpoints)
            _check_edge("crop_size", settings.image_size, image_size)
        except _OtherModel as error:
            raise ConfigError(f"{error} The image processor's file in {directory} is of another model.") from None
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


class _OtherModel(Exception):
    """What does not fit config.json; the message lacks the remedy."""


def _from_processor(data: Mapping[str, Any], image_size: int) -> ImageSettings:
    """Settings from a Hugging Face image processor's fields; absent ones take that class's defaults."""
    kind, base = _kind(data, "LlavaImageProcessor")
    if base == NEXT_PROCESSOR:
        raise _OtherModel(f"image_processor_type must be LLaVA-1.5's as config.json is, got {kind!r}.")
    if base not in PROCESSORS:
        raise ConfigError(f"image_processor_type must be one of {', '.join(PROCESSORS)}, got {kind!r}.")
    if data.get("do_pad") and base != "LlavaImageProcessor":
        raise ConfigError(f"do_pad must be false with {kind}, got {data['do_pad']!r}. LlavaImageProcessor pads.")
    edge, stretch = _edge(data.get("size", {"shortest_edge": 224}), bool(data.get("default_to_square", False)))
    crops = data.get("do_center_crop", True)
    same = {name: data[name] for name in (*_FLAGS, *_NUMBERS) if name in data}
    side = _edge(data.get("crop_size", 224), True, "crop_size")[0] if crops else image_size
    return ImageSettings(image_size=side, shortest_edge=edge, stretch=stretch, **same, **_colours(data))


def _from_next_processor(data: Mapping[str, Any], image_size: int, grid_pinpoints: Pinpoints) -> ImageSettings:
    """The same of LlavaNextImageProcessor. Its do_pad fills up batches, and no tile is ever resized or cropped."""
    kind, base = _kind(data, NEXT_PROCESSOR)
    if base != NEXT_PROCESSOR:
        raise _OtherModel(
            f"image_processor_type must be {NEXT_PROCESSOR} as config.json is LLaVA-NeXT's, got {kind!r}."
        )
    if (setting := data.get("aspect_ratio_setting", "anyres")) != "anyres":
        raise ConfigError(f"aspect_ratio_setting must be 'anyres', got {setting!r}. No other is supported.")
    wanted = [list(pinpoint) for pinpoint in grid_pinpoints]
    if (got := data.get("image_grid_pinpoints", PINPOINTS)) != wanted:
        raise _OtherModel(f"image_grid_pinpoints must be {wanted} (config.json), got {got!r}.")
    _check_edge("size", _edge(data.get("size", {"shortest_edge": 224}), False)[0], image_size)
    side = _edge(data.get("crop_size", 224), True, "crop_size")[0]
    same = {name: data[name] for name in ("do_rescale", "do_normalize", *_NUMBERS) if name in data}
    return ImageSettings(image_size=side, shortest_edge=image_size, **same, **_colours(data))


def _kind(data: Mapping[str, Any], default: str) -> tuple[Any, str]:
    """The processor's name as the file has it, and without what says which library it uses."""
    kind = data.get("image_processor_type", data.get("feature_extractor_type", default))
    return kind, str(kind).removesuffix("Fast").removesuffix("Pil")


def _colours(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _colour(data[f"image_{name}"]) for name in ("mean", "std") if f"image_{name}" in data}


def _check_edge(name: str, edge: int, image_size: int) -> None:
    if edge != image_size:
        raise _OtherModel(f"{name} must be {image_size} (vision_config.image_size), got {edge}.")


def _edge(value: Any, square: bool, name: str = "size") -> tuple[int, bool]:
    """One edge in pixels and whether it stands for both, from any spelling transformers accepts."""
    if is_integer(value):
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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_colour(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(_is_number(channel) for channel in value)
