"""The engine directory: its manifest, the hashes of its files, and what may be replaced by a new build."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import flowcut
from flowcut.atomic import replacing
from flowcut.budget import Budget, check_budget
from flowcut.config import LlavaConfig, Precision
from flowcut.contract import Limits, stage_names
from flowcut.errors import ConfigError, EngineError
from flowcut.integrity import (
    MANIFEST,
    NOT_LISTED,
    FileRecord,
    NotPlain,
    check_name,
    differences,
    files_in,
    open_plain,
    record_files,
)
from flowcut.printable import printable
from flowcut.schedule import Schedule

SCHEMA = 4
MOST_BYTES = 1 << 20
"""Of a manifest, which has a few thousand."""
MOST_NAMED = 5
"""Differences in one message."""
_BEYOND = "a number or a depth that no build writes"
_CALIBRATION = {"sha256": str, "pictures": int}
_DISTRIBUTIONS = (
    *("numpy", "tokenizers", "onnx", "onnx_ir", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt-rtx-cu13", "tensorrt-cu13", "torch"),
)


@dataclass(frozen=True)
class Manifest:
    """What an engine directory is, what it was made from, and every file in it but manifest.json itself.

    source is the alias or directory of the checkpoint: a hint, to be checked by source_sha256.
    tokens are kept of each image that the tower sees, a picture or a tile of LLaVA-NeXT's; llm_tokens of each picture
    inside the language model, null where nothing is dropped there.
    precision is the decoder's, stages the number of graphs it is split into; calibration says which one int4 or fp8 was
    given (its copy is in the directory) and is empty where none was used.
    source_sha256 identifies the weights, seed is that of random ones; note is for people; schedule is the pruning
    schedule as data; compute_capabilities are what the engines were compiled for ("sm86"), none for `ort`; created is
    UTC in ISO 8601; command is what to type to build the directory again, empty where nobody knows; files maps a path
    relative to the directory, with `/`, to its record; sha256 is `digest`, empty until `write_manifest` fills it in.
    """

    model: str
    source: str
    weights: Literal["checkpoint", "random"]
    note: str
    source_sha256: str
    geometry: LlavaConfig
    tokens: int
    llm_tokens: int | None
    schedule: Mapping[str, Any]
    precision: Precision
    vision_precision: Precision
    stages: int
    calibration: Mapping[str, Any]
    backend: Literal["rtx", "trt", "ort"]
    limits: Limits
    versions: Mapping[str, str]
    compute_capabilities: tuple[str, ...]
    created: str
    build_seconds: Mapping[str, float]
    seed: int = 0
    command: str = ""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    sha256: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ConfigError(f"schema must be {SCHEMA}, got {self.schema}.")
        if not 1 <= self.tokens <= self.geometry.vision.patches:
            raise ConfigError(f"tokens must be in 1..{self.geometry.vision.patches}, got {self.tokens}.")
        if self.llm_tokens is not None and self.llm_tokens < 1:
            raise ConfigError(f"llm_tokens must be at least 1 or null, got {self.llm_tokens}.")
        check_budget(self.geometry, self.budget)
        Schedule.from_dict(self.schedule)
        if self.calibration and {k: type(v) for k, v in self.calibration.items()} != _CALIBRATION:
            raise ConfigError(
                f"calibration must be empty or have {' and '.join(_CALIBRATION)}, got {dict(self.calibration)!r}."
            )
        if not 1 <= self.stages <= self.geometry.text.num_hidden_layers:
            raise ConfigError(f"stages must be in 1..{self.geometry.text.num_hidden_layers}, got {self.stages}.")
        if (self.backend == "ort") == bool(self.compute_capabilities):
            rule = "empty for ort" if self.backend == "ort" else f"what the engines were compiled for ({self.backend})"
            raise ConfigError(f"compute_capabilities must be {rule}, got {list(self.compute_capabilities)}.")
        for name in self.files:
            check_name(name)

    @property
    def budget(self) -> Budget:
        """Visual tokens kept."""
        return Budget(self.tokens, self.llm_tokens)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs, which are those of their files, in the order they run."""
        return ("vision", *stage_names(self.stages))

    @property
    def remedy(self) -> str:
        """What to do with a directory that cannot be used, for the end of a message."""
        if not self.command:
            return "Build it again."
        return f"Build it again: {self.command if self.command.isprintable() else f'{MANIFEST} has the command'}"

    def remedy_in(self, directory: Path) -> str:
        """The same, where it is known where the directory is to be: it may have been moved since it was built."""
        with suppress(ValueError):  # quotes that do not close: no build wrote it
            words = shlex.split(self.command)
            if words and "--out" not in words:
                if "--out-root" in words:  # which is where it was
                    at = words.index("--out-root")
                    del words[at : at + 2]
                return replace(self, command=shlex.join([*words, "--out", str(directory)])).remedy
        return self.remedy

    def to_json(self) -> str:
        """The one canonical text of this manifest: ASCII, keys sorted, two spaces, newline at the end."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def digest(self) -> str:
        """SHA-256 of the canonical text with an empty `sha256`, in hex: it covers the hashes of all files."""
        return hashlib.sha256(replace(self, sha256="").to_json().encode("ascii")).hexdigest()

    def sealed(self) -> Manifest:
        """With its own hash."""
        return replace(self, sha256=self.digest())

    @staticmethod
    def from_json(text: str) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            EngineError: not JSON, another schema version, or keys and values that do not fit (all keys are named).
        """
        data = _load(text)
        if "schema" in data and data["schema"] != SCHEMA:
            raise EngineError(
                f"schema must be {SCHEMA}, got {data['schema']!r}: the directory was built by another version of "
                "flowcut-trt. Build it again with this one."
            )
        try:
            manifest: Manifest = _decode(Manifest, data, "")
        except ConfigError as error:
            raise EngineError(str(error)) from None
        except (ArithmeticError, ValueError, RecursionError):
            raise _not_as_written(_BEYOND) from None
        return manifest


def timestamp() -> str:
    """Now, for `Manifest.created`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def installed_versions() -> dict[str, str]:
    """Versions of Python, this project and whatever of its engine libraries is installed."""
    found = {"python": platform.python_version(), "flowcut-trt": flowcut.__version__}
    for name in _DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an engine directory.

    Raises:
        EngineError: no such directory, no manifest in it, or one that this version cannot use.
    """
    if not directory.is_dir():
        raise EngineError(f"{directory} must be an engine directory, got none. `flowcut engine MODEL` builds one.")
    path = directory / MANIFEST
    try:
        content = _content(path)
        manifest = Manifest.from_json(content.decode("utf-8"))
        _check_seal(manifest, content)
    except FileNotFoundError:
        raise EngineError(
            f"{directory} must be an engine directory, got one without {MANIFEST}. `flowcut engine MODEL` builds one."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise EngineError(f"{path} must be readable UTF-8 text, got: {reason}. Build it again.") from None
    except EngineError as error:
        raise EngineError(f"{path}: {error}") from None
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write `manifest` with a record of every file now in `directory` and its own hash, and return it."""
    sealed = replace(manifest, files=record_files(directory)).sealed()
    (directory / MANIFEST).write_bytes(sealed.to_json().encode("ascii"))
    return sealed


def check_files(directory: Path, manifest: Manifest, hashes: bool = True) -> list[str]:
    """How the files of `directory` differ from `manifest`, one line each; empty where all is well.

    hashes: false compares names, kinds and sizes only, which takes no time.
    """
    return differences(directory, manifest.files, hashes)


def what_differs(directory: Path, manifest: Manifest, lines: Sequence[str]) -> str:
    """Differences as one message, which names no more of them than can be read."""
    named, rest = lines[:MOST_NAMED], len(lines) - MOST_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    foreign = all(f": {NOT_LISTED}" in line for line in lines)
    remedy = "Move what was added out of it." if foreign else manifest.remedy_in(directory)
    return f"{directory} must hold what was built there, got {'; '.join(named)}{more}. {remedy}"


def publish(target: Path) -> AbstractContextManager[Path]:
    """Yield an empty directory that replaces `target` when the block ends well, and vanishes when it does not.

    Raises:
        EngineError: `target` holds files that no build wrote, or the disk refuses (space, permission, ...).
    """
    return replacing(target, check_replaceable)


def check_replaceable(target: Path) -> None:
    """Raise EngineError unless `target` is absent, empty, or holds exactly what a build wrote."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    remedy = "Name a new or empty directory with --out, or remove what is there if it can go."
    if not target.is_dir():
        raise EngineError(f"{target} must be a directory, got a file. {remedy}")
    try:
        data = _load(_content(target / MANIFEST).decode("utf-8"))
    except (FileNotFoundError, NotPlain, UnicodeDecodeError, EngineError):
        data = {}
    if not {"schema", "files"} <= data.keys() or not isinstance(data["files"], dict):
        raise EngineError(f"{target} must be empty or an engine directory, got neither. {remedy}")
    if foreign := sorted(files_in(target).keys() - data["files"].keys()):
        raise EngineError(
            f"{target} must hold only what a build wrote, got also {', '.join(map(printable, foreign))}. {remedy}"
        )


def _content(path: Path) -> bytes:
    """What a manifest holds, without reading gigabytes that somebody gave its name."""
    with open_plain(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
            raise EngineError(f"content must be at most {MOST_BYTES} bytes, got {size}. Build it again.")
        return file.read()


def _check_seal(manifest: Manifest, content: bytes) -> None:
    """Raise EngineError unless `content` is the canonical text of `manifest`, whose hash is the one it names."""
    try:
        canonical, digest = manifest.to_json().encode("ascii"), manifest.digest()
    except (ValueError, RecursionError):  # infinity is a ValueError
        raise _not_as_written(_BEYOND) from None
    if content != canonical:
        lines = zip_longest(content.split(b"\n"), canonical.split(b"\n"))
        number = next(i for i, (got, expected) in enumerate(lines, 1) if got != expected)
        raise _not_as_written(f"other text from line {number} on")
    if manifest.sha256 != digest:
        raise EngineError(f"sha256 must be {digest}, its own, got {manifest.sha256!r}: it was changed. Build it again.")


def _not_as_written(got: str) -> EngineError:
    return EngineError(f"content must be as it was written, byte for byte, got {got}. Build it again.")


def _load(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"content must be JSON, got: {error}. Build it again.") from None
    if not isinstance(data, dict):
        raise EngineError(f"content must be a JSON object, got {type(data).__name__}. Build it again.")
    return data


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant}, which JSON has not")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, as json.loads gave it, as `kind`: a dataclass, Literal, tuple, Mapping, or a plain type."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any or (origin is Literal and value in args):
        return value
    if origin is UnionType:  # X | None
        return None if value is None else _decode(args[0], value, where)
    if is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {k: _decode(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise EngineError(f"{where} must be {_kind_name(kind)}, got {value!r}. Build it again.")


def _decode_fields(cls: Any, data: dict[str, Any], where: str) -> Any:
    hints, names = get_type_hints(cls), {f.name for f in fields(cls)}
    dot = f"{where}." if where else ""
    for problem, keys in (("missing", names - data.keys()), ("unknown", data.keys() - names)):
        if keys:
            raise EngineError(f"{problem} keys: {', '.join(dot + k for k in sorted(keys))}. Build it again.")
    return cls(**{name: _decode(hints[name], data[name], dot + name) for name in names})


def _kind_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return kind.__name__ if isinstance(kind, type) else str(kind)
