"""Tensors of a LLaVA-1.5 checkpoint: from safetensors files, or seeded random ones of the same geometry.

Every tensor has one name, whatever the spelling of its file (see flowcut.tensors). Nothing here keeps a tensor: files
are memory-mapped, random tensors are drawn when asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flowcut.config import LlavaConfig
from flowcut.deps import require
from flowcut.errors import CheckpointError
from flowcut.synthetic import RandomWeights
from flowcut.tensors import Array, Shape, canonical_name, expected_tensors, geometry_digest, numpy_dtype

__all__ = ["INDEX", "SINGLE", "FileWeights", "Weights", "expected_tensors", "open_checkpoint", "random_weights"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
_HARMLESS = (".position_ids", ".rotary_emb.inv_freq")  # buffers that older versions of transformers saved
_SHOWN = 8


class Weights(Protocol):
    """Where the modules and the exporter get their tensors."""

    @property
    def config(self) -> LlavaConfig: ...

    @property
    def random(self) -> bool: ...

    @property
    def sha256(self) -> str:
        """Identity of geometry and values. For files their content is read, once: a minute for 14 GB."""
        ...

    def load(self, name: str) -> Array:
        """One tensor in its stored dtype (float32, float16, bfloat16). KeyError for a name not in `config`."""
        ...


def open_checkpoint(directory: Path, config: LlavaConfig | None = None) -> Weights:
    """Check every file's header against config.json; tensors are read when asked for.

    `config` may ask for less than config.json describes (fewer decoder layers): the other tensors are then allowed.

    Raises:
        ConfigError: config.json is not one of a LLaVA-1.5 checkpoint.
        CheckpointError: naming every missing, extra, misshaped or unsupported tensor and every unreadable file.
    """
    stored = LlavaConfig.from_file(directory / "config.json")
    wanted = expected_tensors(config or stored)
    survey = _Survey(wanted, allowed=wanted.keys() | expected_tensors(stored).keys())
    for path, names in _shards(directory).items():
        survey.add_file(path, names)
    survey.raise_problems(directory)
    return FileWeights(config or stored, tuple(survey.files), survey.found)


def random_weights(config: LlavaConfig, seed: int = 0, dtype: str = "float16") -> Weights:
    """Seeded tensors of any geometry, each decided by (seed, name) alone; 200 million elements a second."""
    return RandomWeights(config, seed, dtype)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` in bytes from the start of the file."""

    path: Path
    dtype: str
    shape: Shape
    offset: int


@dataclass(frozen=True)
class FileWeights:
    """Tensors of safetensors files, memory-mapped one at a time."""

    config: LlavaConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    random: bool = False

    def load(self, name: str) -> Array:
        at = self.tensors[name]
        try:
            # "c": private pages, so that torch may wrap the array without a warning about read-only memory
            mapped = np.memmap(at.path, numpy_dtype(at.dtype), mode="c", offset=at.offset, shape=at.shape)
        except (OSError, ValueError) as error:
            raise _changed(at.path, error) from None
        return np.asarray(mapped)

    @cached_property
    def sha256(self) -> str:
        digest = geometry_digest(self.config)
        for path in sorted(self.files):
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise _changed(path, error) from None
        return digest.hexdigest()


class _Survey:
    """What the files of a checkpoint hold, against what they should; every problem is collected."""

    def __init__(self, wanted: Mapping[str, Shape], allowed: Iterable[str]) -> None:
        self.wanted, self.allowed = wanted, set(allowed)
        self.found: dict[str, StoredTensor] = {}
        self.files: list[Path] = []
        self.unreadable: set[str] = set()  # tensors in missing or damaged files: named by their file only
        self.problems: dict[str, list[str]] = {}

    def add_file(self, path: Path, names: set[str]) -> None:
        """Read one file's header. `names` are the tensors that the index promises in it."""
        if not path.is_file():
            if names & self.wanted.keys():
                self._problem("missing files", path.name)
            self.unreadable |= names
            return
        try:
            stored = _read_header(path)
        except CheckpointError as error:
            self._problem("damaged files", f"{path.name} ({error})")
            self.unreadable |= names or self.wanted.keys()
            return
        self.files.append(path)
        for name, tensor in stored.items():
            self._add_tensor(name, tensor)

    def _add_tensor(self, stored_name: str, tensor: StoredTensor) -> None:
        name = canonical_name(stored_name)
        if name in self.wanted:
            self._check_tensor(name, tensor)
        elif name not in self.allowed and not name.endswith(_HARMLESS):
            self._problem("extra tensors", stored_name)

    def _check_tensor(self, name: str, tensor: StoredTensor) -> None:
        if name in self.found:
            self._problem("tensors stored twice", name)
        if tensor.shape != self.wanted[name]:
            self._problem("misshaped tensors", f"{name} {list(tensor.shape)} instead of {list(self.wanted[name])}")
        if tensor.dtype not in _DTYPES.values():
            self._problem("tensors neither float32, float16 nor bfloat16", f"{name} {tensor.dtype}")
        self.found[name] = tensor

    def raise_problems(self, directory: Path) -> None:
        for name in self.wanted.keys() - self.found.keys() - self.unreadable:
            self._problem("missing tensors", name)
        if self.problems:
            listing = "; ".join(f"{kind}: {_some(items)}" for kind, items in sorted(self.problems.items()))
            raise CheckpointError(
                f"{directory} must hold the tensors that its config.json describes, got {listing}. "
                "Fetch the checkpoint again, or correct config.json."
            )

    def _problem(self, kind: str, item: str) -> None:
        self.problems.setdefault(kind, []).append(item)


def _shards(directory: Path) -> dict[Path, set[str]]:
    """Files of a checkpoint, each with the tensors that the index promises in it (none without an index)."""
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: set()}
    index = directory / INDEX
    if not index.is_file():
        there = sorted(p.name for p in directory.iterdir() if p.suffix in {".safetensors", ".bin", ".pt", ".pth"})
        raise CheckpointError(
            f"{directory} must hold {SINGLE} or {INDEX}, got {_some(there) if there else 'neither'}. "
            "Other formats are not read: save the checkpoint with transformers' save_pretrained."
        )
    out: dict[Path, set[str]] = {}
    for name, file in _weight_map(index).items():
        out.setdefault(directory / file, set()).add(canonical_name(name))
    return out


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(Path(file).name == file for file in files.values()):
            return dict(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{index} must hold a weight_map of tensor to file name. Fetch the checkpoint again.")


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file. safetensors checks the layout but copies what it reads, so we only map it."""
    safetensors = require("safetensors", extra="export")
    try:
        with safetensors.safe_open(path, "np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(str(error).removeprefix("Error while deserializing header: ")) from None
    header.pop("__metadata__", None)
    return {name: _stored(path, entry, 8 + length) for name, entry in header.items()}


def _stored(path: Path, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    dtype = _DTYPES.get(entry["dtype"], str(entry["dtype"]))
    return StoredTensor(path, dtype, tuple(entry["shape"]), data_start + entry["data_offsets"][0])


def _changed(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} must stay as it was when it was opened, got: {error}. Run the command again.")


def _some(items: Iterable[str]) -> str:
    ordered = sorted(items)
    more = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" (+{more} more)" if more > 0 else "")
