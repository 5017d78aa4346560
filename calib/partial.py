"""What an interrupted calibration had already computed, as files beside the one that it was to write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowcut.atomic import write_file
from flowcut.deps import require
from flowcut.tensors import Array

Saved = tuple[dict[str, Array], Any]
_KEY = "flowcut"


class Partial:
    """Tensors and JSON by key. Those of other inputs, and damaged ones, count as not there."""

    def __init__(self, directory: Path, inputs: str) -> None:
        """
        Args:
            inputs: identity of everything that the results depend on, beside their keys.
        """
        self._directory, self._inputs = directory, inputs

    def get(self, key: str) -> Saved | None:
        safetensors = require("safetensors", extra="torch")
        try:
            with safetensors.safe_open(self._path(key), "np") as opened:
                header = json.loads((opened.metadata() or {}).get(_KEY, "{}"))
                if header.get("inputs") != self._inputs:
                    return None
                return {name: opened.get_tensor(name) for name in opened.keys()}, header["info"]  # noqa: SIM118
        except (OSError, ValueError, safetensors.SafetensorError):
            return None

    def put(self, key: str, tensors: Mapping[str, Array], info: Any) -> None:
        """Keep a result, whole or not at all.

        Raises:
            EngineError: the disk refuses.
        """
        self._directory.mkdir(exist_ok=True)
        metadata = {_KEY: json.dumps({"inputs": self._inputs, "info": info})}
        write_file(self._path(key), require("safetensors.numpy", extra="torch").save(dict(tensors), metadata))

    def remove(self) -> None:
        """Done: nothing is left to resume."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.safetensors"
