"""A checkpoint as it lies on the disk after a download: the Hugging Face format, with seeded-random values."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flowcut.aliases import Model
from flowcut.checkpoint import INDEX, expected_tensors, random_weights
from flowcut.deps import require

SETTINGS = ("config.json", "preprocessor_config.json")  # and no tokenizer.json: flowcut then takes its stand-in
DTYPE = "float16"
LAYER = re.compile(r"language_model\.model\.layers\.\d+\.")


def write_checkpoint(directory: Path, model: Model) -> dict[str, Any]:
    """Write a checkpoint of `model`'s geometry into an empty directory, holding one shard at a time.

    The shards are on the disk and out of the page cache afterwards: who reads them next reads the disk.
    """
    for name in SETTINGS:
        shutil.copyfile(model.files / name, directory / name)
    weights = random_weights(model.config, dtype=DTYPE)
    parts = list(shards(expected_tensors(model.config)))
    places: dict[str, str] = {}
    write = require("safetensors.numpy", extra="export").save_file
    for number, names in enumerate(parts, 1):
        path = directory / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: weights.load(name) for name in names}
        write(tensors, path, metadata={"format": "pt"})
        settle(path)
        places |= dict.fromkeys(names, path.name)
    total = checkpoint_bytes(model)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return {"dtype": DTYPE, "shards": len(parts), "tensor_bytes": total}


def shards(names: dict[str, Any]) -> Iterator[list[str]]:
    """Every decoder layer, and what stands before and after them."""
    for _, group in groupby(names, lambda name: found[0] if (found := LAYER.match(name)) else ""):
        yield list(group)


def settle(path: Path) -> None:
    """Write its pages back, so that this is not left to the command that is measured, and drop them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checkpoint_bytes(model: Model) -> int:
    """Of its tensors."""
    return sum(map(prod, expected_tensors(model.config).values())) * np.dtype(DTYPE).itemsize
