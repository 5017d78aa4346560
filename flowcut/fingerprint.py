"""Which vision tower a schedule was calibrated on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import numpy as np

from flowcut.checkpoint import Weights
from flowcut.tensors import expected_tensors

TOWER = "vision_tower."


def vision_sha256(weights: Weights) -> str:
    """Identity of the vision tower: its geometry, and the type, shape and bytes of its tensors.

    The decoder takes no part: a checkpoint cut to fewer decoder layers, or one with another language model on the same
    tower, prunes alike. Reads 0.6 GB of a 7B checkpoint's 14.
    """
    digest = hashlib.sha256(json.dumps(asdict(weights.config.vision), sort_keys=True).encode())
    for name in sorted(expected_tensors(weights.config)):
        if name.startswith(TOWER):
            array = weights.load(name)
            digest.update(f"{name} {array.dtype.name} {list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
