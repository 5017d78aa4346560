"""A seeded LLaVA-NeXT checkpoint: the recipe's LLaVA-1.5, with pinpoints in its config.json and an image_newline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

SIDE = 56  # of the recipe's tiny preset: 8 x 8 patches a tile
PINPOINTS = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE), (3 * SIDE, SIDE), (SIDE, 3 * SIDE))


def write_next(source: Path, out: Path, pinpoints: Sequence[Sequence[int]] = PINPOINTS, side: int = SIDE) -> Path:
    """Copy the checkpoint `source` (one safetensors file) to `out` as LLaVA-NeXT's; tokenizer files come along."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config |= {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in pinpoints],
        "use_image_newline_parameter": True,
    }
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(out / "model.safetensors")
    hidden = tensors["language_model.model.norm.weight"].shape[0]
    newline = 0.5 * np.random.default_rng(0).standard_normal(hidden)
    tensors["image_newline"] = newline.astype(tensors["language_model.model.norm.weight"].dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "aspect_ratio_setting": "anyres",
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "do_pad": True,
        "resample": 3,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return out
