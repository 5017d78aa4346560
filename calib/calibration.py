"""What calibration measured of a checkpoint, as one file, and a checkpoint with its scales folded in.

A safetensors file: `scales.<group>` as tensors, all else as sorted JSON under one metadata key, because the library
writes several keys in any order. Same content, same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from calib.groups import Group, groups, linear_layers
from flowcut.atomic import write_file
from flowcut.checkpoint import Weights
from flowcut.config import LlavaConfig
from flowcut.deps import require
from flowcut.errors import ConfigError
from flowcut.tensors import Array

FORMAT = 1
_KEY = "flowcut"
_SCALES = "scales."
_FIELDS = {"format", "geometry", "source_sha256", "ranges", "info"}
_SHOWN = 3
_AGAIN = "`flowcut calibrate quantize` makes another."


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        source_sha256: Weights.sha256 of the checkpoint.
        ranges: the largest absolute input of every linear layer, by its name in the checkpoint without ".weight"; for
            fp8. Empty if they were not asked for.
        scales: float32 [inputs] by group (calib.groups), what AWQ multiplies columns by; for int4. May be empty too.
        info: how it came about: pictures, prompts, schedule, versions, errors.
        sha256: of the file.
    """

    source_sha256: str
    ranges: Mapping[str, float]
    scales: Mapping[str, Array]
    info: Mapping[str, Any]
    sha256: str


def write_calibration(
    path: Path, weights: Weights, ranges: Mapping[str, float], scales: Mapping[str, Array], info: Mapping[str, Any]
) -> Calibration:
    """Write the file, whole or not at all.

    Raises:
        EngineError: the disk refuses.
    """
    header = {
        "format": FORMAT,
        "geometry": _geometry(weights.config),
        "source_sha256": weights.sha256,
        "ranges": dict(ranges),
        "info": dict(info),
    }
    tensors = {_SCALES + name: np.ascontiguousarray(scale, np.float32) for name, scale in scales.items()}
    metadata = {_KEY: json.dumps(header, sort_keys=True, allow_nan=False)}
    content = require("safetensors.numpy", extra="torch").save(tensors, metadata)
    write_file(path, content)
    return Calibration(weights.sha256, dict(ranges), dict(scales), dict(info), hashlib.sha256(content).hexdigest())


def load_calibration(path: Path, weights: Weights) -> Calibration:
    """Read a file made for `weights`; their content is hashed.

    Raises:
        ConfigError: unreadable, damaged or of another kind, or for another geometry or checkpoint.
    """
    header, tensors, sha256 = _read(path)
    _check_origin(path, header, weights)
    scales = {name.removeprefix(_SCALES): tensor for name, tensor in tensors.items()}
    _check_scales(path, scales, weights.config)
    _check_ranges(path, header["ranges"], weights.config)
    return Calibration(header["source_sha256"], header["ranges"], scales, header["info"], sha256)


def is_calibration(path: Path) -> bool:
    """Whether a file is one of these, of whatever checkpoint."""
    with suppress(ConfigError):
        return bool(_read(path))
    return False


def smoothed(weights: Weights, calibration: Calibration, parts: Collection[str]) -> Weights:
    """The same function with int4-friendlier weights: a group's columns times its scale, what makes its input divided.

    Tensors are computed when asked for, in float32, those that no scale touches are as stored. FlowScore, which reads
    q, k and v, and every group's output stay what they were but for the rounding of float32.

    Args:
        parts: of "vision" and "language", those whose weights are int4.
    """
    columns, rows = dict[str, Array](), dict[str, Array]()
    for group in groups(weights.config):
        if group.part in parts and group.name in calibration.scales:
            scale = np.asarray(calibration.scales[group.name], np.float32)
            columns |= {f"{layer}.weight": scale for layer in group.layers}
            rows |= dict.fromkeys(group.makers, scale)
    return _Smoothed(weights, columns, rows, f"{calibration.sha256} {' '.join(sorted(parts))}")


@dataclass(frozen=True)
class _Smoothed:
    """Weights with `columns` multiplied and `rows` divided, by tensor name."""

    weights: Weights
    columns: Mapping[str, Array]
    rows: Mapping[str, Array]
    how: str

    @property
    def config(self) -> LlavaConfig:
        return self.weights.config

    @property
    def random(self) -> bool:
        return self.weights.random

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.weights.sha256} {self.how}".encode()).hexdigest()

    def load(self, name: str) -> Array:
        array = self.weights.load(name)
        if name not in self.columns and name not in self.rows:
            return array
        wide = array.astype(np.float32)  # float16 might overflow
        if name in self.columns:
            wide *= self.columns[name]
        if name in self.rows:
            wide /= self.rows[name].reshape(-1, *[1] * (wide.ndim - 1))
        return wide


def _geometry(config: LlavaConfig) -> dict[str, Any]:
    """As JSON has it: lists for tuples."""
    return dict(json.loads(json.dumps(config.to_dict())))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Array], str]:
    """JSON, tensors and hash of a file; the JSON's fields are there and of the right types."""
    safetensors = require("safetensors", extra="torch")
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with safetensors.safe_open(path, "np") as opened:
            header = _header(path, (opened.metadata() or {}).get(_KEY))
            return header, {name: opened.get_tensor(name) for name in opened.keys()}, sha256  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"calibration {path} must be a readable safetensors file, got: {error}. {_AGAIN}") from None


def _header(path: Path, text: str | None) -> dict[str, Any]:
    try:
        header = json.loads(text or "null")
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ConfigError(f"calibration {path} must be a file of `flowcut calibrate quantize`, got another kind.")
    if header.get("format") != FORMAT:
        raise ConfigError(f"calibration {path} must have format {FORMAT}, got {header.get('format')!r}. {_AGAIN}")
    if header.keys() != _FIELDS:
        raise ConfigError(f"calibration {path} must have the keys {sorted(_FIELDS)}, got {sorted(header)}. {_AGAIN}")
    kinds = {"geometry": dict, "source_sha256": str, "ranges": dict, "info": dict}
    for name, kind in kinds.items():
        if not isinstance(header[name], kind):
            raise ConfigError(f"calibration {path}: {name} must be a {kind.__name__}, got {header[name]!r}. {_AGAIN}")
    return header


def _check_origin(path: Path, header: Mapping[str, Any], weights: Weights) -> None:
    wanted, got = (_flat(side) for side in (_geometry(weights.config), header["geometry"]))
    differing = [name for name in sorted(wanted.keys() | got.keys()) if wanted.get(name) != got.get(name)]
    if differing:
        ours, theirs = ({name: side.get(name) for name in differing[:_SHOWN]} for side in (wanted, got))
        raise ConfigError(f"calibration {path} must be made for {ours}, got {theirs}. Calibrate this checkpoint.")
    if header["source_sha256"] != weights.sha256:
        raise ConfigError(
            f"calibration {path} must be made for this checkpoint, whose sha256 is {weights.sha256[:12]}, got one for "
            f"{header['source_sha256'][:12]}. Calibrate this checkpoint, or name the one that it was calibrated on."
        )


def _flat(geometry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in geometry.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def _check_scales(path: Path, scales: Mapping[str, Array], config: LlavaConfig) -> None:
    """All groups or none; positive finite float32 of the right length."""
    known: dict[str, Group] = {group.name: group for group in groups(config)}
    _check_names(path, "scales", scales.keys(), known.keys())
    for name, scale in scales.items():
        fits = scale.dtype == np.float32 and scale.shape == (known[name].inputs,)
        if not fits or not np.isfinite(scale).all() or scale.min() <= 0:
            raise ConfigError(
                f"calibration {path}: {_SCALES}{name} must be {known[name].inputs} positive float32 numbers, got "
                f"{scale.dtype}{list(scale.shape)}{', some of them not' if fits else ''}. {_AGAIN}"
            )


def _check_ranges(path: Path, ranges: Mapping[str, Any], config: LlavaConfig) -> None:
    _check_names(path, "ranges", ranges.keys(), set(linear_layers(config)))
    for name, value in ranges.items():
        if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ConfigError(f"calibration {path}: the range of {name} must be 0 or more, got {value!r}. {_AGAIN}")


def _check_names(path: Path, what: str, got: Collection[str], wanted: Collection[str]) -> None:
    """None at all, or exactly those of the checkpoint."""
    differing = sorted(set(got) ^ set(wanted))
    if got and differing:
        kind = "unknown" if differing[0] in got else "no"
        raise ConfigError(
            f"calibration {path} must have {what} of all {len(wanted)} layers that take one, got {kind} {differing[0]}"
            f"{f' (+{len(differing) - 1} more)' if differing[1:] else ''}. {_AGAIN}"
        )
