"""What calibrations have in common: where their files may go, and what these say of where they come from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calib.dataset import Dataset
from flowcut.artifacts import installed_versions
from flowcut.errors import ConfigError


def check_out(out: Path, suffix: str, ours: Callable[[Path], bool]) -> None:
    """Raise ConfigError unless `out` is a file of that kind in an existing directory that can be written.

    Args:
        ours: whether a file that is there is of this command's kind, and may be replaced.
    """
    if out.suffix != suffix or not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"out must be a {suffix} file in an existing directory, got {str(out)!r}.")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"out must be in a directory that can be written, got {str(out)!r}.")
    if out.exists() and not ours(out):
        raise ConfigError(f"out must be new or an earlier calibration, got {str(out)!r}, which is neither. Rename it.")


def partial_path(out: Path, directory: bool) -> Path:
    """Where an interrupted run keeps what it has, beside `out`: a directory or a file.

    Raises:
        ConfigError: the other of the two is there.
    """
    path = out.with_name(f".{out.name}.partial")
    if path.exists() and path.is_dir() != directory:
        kinds = ("a directory", "a file") if directory else ("a file", "a directory")
        raise ConfigError(f"{path} must be {kinds[0]} of an interrupted calibration, got {kinds[1]}. Remove it.")
    return path


def pictures_of(dataset: Dataset, **more: dict[str, Any]) -> dict[str, Any]:
    """Names and hashes of the pictures, and of those that were left out why.

    Args:
        more: a further field of every picture, by its sha256.
    """
    fields = [
        {"name": p.name, "sha256": p.sha256} | {field: values[p.sha256] for field, values in more.items()}
        for p in dataset.pictures
    ]
    return {"pictures": fields, "skipped": [{"name": name, "reason": reason} for name, reason in dataset.skipped]}


def circumstances(libraries: Sequence[str], threads: int | None) -> dict[str, Any]:
    """Versions, and threads of PyTorch: what figures may depend on beside their inputs."""
    import numpy as np
    import torch
    from PIL import __version__ as pillow

    known = installed_versions() | {"numpy": np.__version__, "pillow": pillow, "torch": str(torch.__version__)}
    versions = {name: known[name] for name in ("python", "flowcut-trt", "torch", "numpy", "pillow", *libraries)}
    return {"versions": versions, "threads": threads or torch.get_num_threads()}


def digest(parts: Sequence[Any]) -> str:
    """Identity of inputs, for `calib.journal` and `calib.partial`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
