"""Geometry of a LLaVA-1.5 or LLaVA-NeXT checkpoint, read from its config.json.

Only what changes the mathematics is kept. Fields this project implements with one value only
(activation, feature layer, rotary scaling) are checked rather than stored, so that a config of
another model is refused with the field that differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeGuard

from flowcut.errors import ConfigError

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8"]
# What transformers' CLIPVisionConfig assumes for a field that vision_config leaves out. VisionConfig's own defaults are
# LLaVA-1.5's, as a hand-written geometry wants them.
_CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
NEXT = "llava_next"
"""model_type of LLaVA-NeXT, also called LLaVA-1.6."""
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""What transformers assumes for image_grid_pinpoints, in config.json and in the image processor's file."""
NUMPY_DTYPE: dict[str, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float16",
    "int4": "float16",
    "fp8": "float16",
}
"""What a graph of each precision computes in. int8, int4 and fp8 are how its linear layers keep their weights."""
QUANTIZED: tuple[Precision, ...] = ("int8", "int4", "fp8")


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision tower. Sizes in elements, image and patch in pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _positive("vision_config", self)
        _divides("vision_config.hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"vision_config.image_size must be at least patch_size ({self.patch_size}), got {self.image_size}."
            )
        if self.num_hidden_layers < 3:
            raise ConfigError(
                "vision_config.num_hidden_layers must be at least 3 (LLaVA reads hidden state -2), "
                f"got {self.num_hidden_layers}."
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one image, CLS not counted."""
        return self.grid * self.grid

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def select(self) -> int:
        """Index after the last layer that feeds hidden state -2, less one: `select` = L - 2 of docs/algorithm.md 2."""
        return self.num_hidden_layers - 2


@dataclass(frozen=True)
class TextConfig:
    """Llama decoder. The defaults are those of transformers' LlamaConfig, which sparse configs rely on."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _positive("text_config", self)
        _divides("text_config.hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _divides(
            "text_config.num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        if self.head_size % 2:
            raise ConfigError(f"text_config head size must be even for rotary embeddings, got {self.head_size}.")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LlavaConfig:
    """A checkpoint's geometry and special tokens.

    grid_pinpoints: None for LLaVA-1.5. For LLaVA-NeXT the (height, width) in pixels that a picture may be resized to
    and cut into tiles of the tower's size, beside the tile of the whole picture; () for that tile alone.
    """

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 32000
    eos_token_ids: tuple[int, ...] = (2,)
    grid_pinpoints: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for pinpoint in self.grid_pinpoints or ():
            _check_pinpoint(pinpoint, self.vision.image_size)
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ConfigError(
                f"image_token_index must be in 0..{self.text.vocab_size - 1} (text_config.vocab_size), "
                f"got {self.image_token_id}."
            )

    @property
    def anyres(self) -> bool:
        """Whether pictures are cut into tiles: LLaVA-NeXT."""
        return self.grid_pinpoints is not None

    @property
    def family(self) -> str:
        """The model's family, for messages."""
        return "LLaVA-NeXT" if self.anyres else "LLaVA-1.5"

    @property
    def max_tiles(self) -> int:
        """Most images that the tower sees of one picture: 1, and for LLaVA-NeXT the tiles of the largest pinpoint."""
        side = self.vision.image_size
        return 1 + max((h // side * (w // side) for h, w in self.grid_pinpoints or ()), default=0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; what LLaVA-1.5 has not is left out, so that its checkpoints keep their identity."""
        data = asdict(self)
        if not self.anyres:
            del data["grid_pinpoints"]
        return data

    @staticmethod
    def from_file(path: Path) -> LlavaConfig:
        """Read a config.json.

        Raises:
            ConfigError: unreadable, not JSON, or a field that this project does not implement.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist. A checkpoint directory holds config.json, *.safetensors and tokenizer.json."
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} must be a JSON object, got: {error}.") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path} must be a JSON object, got {type(data).__name__}.")
        ends = _generation_eos(path.with_name("generation_config.json"))
        config = LlavaConfig.from_dict(data)
        return replace(config, eos_token_ids=ends) if ends else config

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> LlavaConfig:
        """Read the content of a Hugging Face `LlavaConfig` or `LlavaNextConfig`; absent fields take the class's
        defaults."""
        anyres = data.get("model_type") == NEXT
        if not anyres:
            kind = data.get("model_type")
            if kind not in (None, "llava"):
                raise ConfigError(
                    f"model_type must be 'llava' or {NEXT!r}, got {kind!r}. Take one such as llava-hf/llava-1.5-7b-hf "
                    "or llava-hf/llava-v1.6-vicuna-7b-hf."
                )
        _only(data, "use_image_newline_parameter", True)
        _only(data, "vision_feature_layer", -2)
        _only(data, "vision_feature_select_strategy", "default")
        _only(data, "projector_hidden_act", "gelu")
        _only(data, "multimodal_projector_bias", True)
        vision = {**_CLIP_DEFAULTS, **_section(data, "vision_config")}
        text = _section(data, "text_config")
        _only(vision, "model_type", "clip_vision_model", prefix="vision_config.")
        _only(vision, "hidden_act", "quick_gelu", prefix="vision_config.")
        remedy = "Other decoders, such as Mistral, are not supported; the vicuna checkpoints have it."
        _only(text, "model_type", "llama", remedy, prefix="text_config.")
        _only(text, "hidden_act", "silu", prefix="text_config.")
        _only(text, "attention_bias", False, prefix="text_config.")
        _only(text, "mlp_bias", False, prefix="text_config.")
        _only(vision, "num_channels", 3, prefix="vision_config.")
        image_token = "image_token_id" if data.get("image_token_index") is None else "image_token_index"
        return LlavaConfig(
            vision=VisionConfig(**_fields(vision, VisionConfig, "vision_config.")),
            text=TextConfig(**_text_fields(text, _boolean(data, "tie_word_embeddings"))),
            image_token_id=_integer(image_token, data.get(image_token, 32000)),
            eos_token_ids=_eos(text),
            grid_pinpoints=_pinpoints(data.get("image_grid_pinpoints")) if anyres else None,
        )


def _pinpoints(value: object) -> tuple[tuple[int, ...], ...]:
    """image_grid_pinpoints; absent or null means transformers' own."""
    pairs = PINPOINTS if value is None else value
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and all(map(is_integer, pair)) for pair in pairs):
        raise ConfigError(f"image_grid_pinpoints must be a list of [height, width] in whole pixels, got {value!r}.")
    return tuple(map(tuple, pairs))


def _check_pinpoint(pinpoint: tuple[int, ...], side: int) -> None:
    if len(pinpoint) != 2 or any(edge < side or edge % side for edge in pinpoint):
        raise ConfigError(
            f"image_grid_pinpoints must be pairs of multiples of {side} (vision_config.image_size), "
            f"got {list(pinpoint)}."
        )


def _text_fields(text: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"text_config.rope_parameters must be an object, got {rope!r}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(
            f"text_config.rope_parameters.rope_type must be 'default', got {kind!r}. Scaled rotary is not supported."
        )
    fields = _fields(text, TextConfig, "text_config.")
    fields.setdefault("num_key_value_heads", fields.get("num_attention_heads", TextConfig.num_attention_heads))
    fields.setdefault("rope_theta", _number("text_config.rope_theta", rope.get("rope_theta", TextConfig.rope_theta)))
    # transformers takes the tie from either place
    fields["tie_word_embeddings"] = tied or _boolean(text, "tie_word_embeddings", "text_config.")
    _only(text, "head_dim", TextConfig(**fields).head_size, prefix="text_config.")
    return fields


def _eos(text: Mapping[str, Any]) -> tuple[int, ...]:
    return _tokens("text_config.eos_token_id", text.get("eos_token_id")) or (2,)


def _generation_eos(path: Path) -> tuple[int, ...]:
    """End tokens of a generation_config.json, which come before config.json's, as in transformers; () without."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a JSON object, got: {error}.") from None
    return _tokens(f"{path.name}: eos_token_id", data.get("eos_token_id") if isinstance(data, dict) else None)


def _tokens(name: str, value: object) -> tuple[int, ...]:
    """One token number or a list of them; () for null."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_integer(name, v) for v in values)


def _fields(data: Mapping[str, Any], cls: type, prefix: str) -> dict[str, Any]:
    """The fields of `cls` present in `data`, with numbers checked to be numbers."""
    out: dict[str, Any] = {}
    for name, field in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
        value = data.get(name)
        if value is None or name == "tie_word_embeddings":
            continue
        check = _integer if field.type == "int" else _number
        out[name] = check(f"{prefix}{name}", value)
    return out


def _section(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, got {value!r}. config.json of a LLaVA checkpoint has one.")
    return value


def _only(data: Mapping[str, Any], name: str, allowed: object, remedy: str = "", prefix: str = "") -> None:
    """Check a field that has one supported value; absent or null means that value."""
    value = data.get(name)
    if value is not None and value != allowed:
        raise ConfigError(f"{prefix}{name} must be {allowed!r}, got {value!r}. {remedy}".rstrip())


def _integer(field: str, value: object) -> int:
    if not is_integer(value):
        raise ConfigError(f"{field} must be an integer, got {value!r}.")
    return value


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number that a float has room for: finite, of numpy's too, and not True."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of 10**400
        return False


def _number(field: str, value: object) -> float:
    if not is_number(value):
        raise ConfigError(f"{field} must be a number, got {value!r}.")
    return float(value)


def _boolean(data: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    value = data.get(name)
    if not isinstance(value, bool | None):
        raise ConfigError(f"{prefix}{name} must be true or false, got {value!r}.")
    return bool(value)


def _positive(section: str, config: object) -> None:
    for name, value in vars(config).items():
        if not isinstance(value, bool) and value <= 0:
            raise ConfigError(f"{section}.{name} must be positive, got {value!r}.")


def _divides(field: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(f"{field} must be a multiple of {divisor_name} ({divisor}), got {value}.")
