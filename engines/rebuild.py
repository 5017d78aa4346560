"""The command that builds an engine directory again, as its manifest records it."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.backends import Backend

if TYPE_CHECKING:
    from engines.pipeline import BuildSettings

_NOT_ONE_WORD = ("model", "random", "backend", "compute_capabilities")


def build_command(settings: BuildSettings, backend: Backend) -> str:
    """`flowcut engine MODEL ..` for a shell, with every setting that is not the default.

    Works from any folder: files and folders that the settings name have their whole path. Without `out` or `out_root`
    it builds where such a build goes by default, below the folder that it is typed in.

    Args:
        backend: what "auto" came to.
    """
    words = ["flowcut", "engine", source(settings.model), "--backend", backend]
    words += ["--weights", "random"] * settings.random
    words += [word for name in settings.compute_capabilities for word in ("--compute-capability", name)]
    for each in fields(settings):
        value = getattr(settings, each.name)
        beside = each.name == "out_root" and settings.out is not None  # of which `out` takes no notice
        if value != each.default and each.name not in _NOT_ONE_WORD and not beside:
            words += [f"--{each.name.replace('_', '-')}", _text(each.name, value)]
    return shlex.join(words)


def source(model: str) -> str:
    """Where a build or `verify` may find the checkpoint again."""
    directory = Path(model).expanduser()
    return str(directory.resolve()) if model and directory.is_dir() else model


def _text(name: str, value: Any) -> str:
    is_file = {
        "out": True,
        "out_root": True,
        "schedule": str(value).endswith(".json"),
        "calibration": value != "none",
    }
    if not is_file.get(name, False):
        return str(value)
    path = Path(value).expanduser() if name == "calibration" else Path(value)
    return str(path.absolute())
