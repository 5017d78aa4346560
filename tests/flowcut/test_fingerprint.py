"""What makes two vision towers the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import WriteCheckpoint
from safetensors.numpy import load_file, save_file

from flowcut.aliases import resolve
from flowcut.fingerprint import vision_sha256


def test_decoder_layers_and_the_language_model_do_not_matter(checkpoint: WriteCheckpoint) -> None:
    model = str(checkpoint())
    whole = vision_sha256(resolve(model).weights)
    assert vision_sha256(resolve(model, decoder_layers=1).weights) == whole
    assert resolve(model, decoder_layers=1).weights.sha256 != resolve(model).weights.sha256


@pytest.mark.parametrize(
    ("tensor", "same"),
    [
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias", False),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", False),
        ("language_model.lm_head.weight", True),
        ("multi_modal_projector.linear_1.bias", True),
    ],
)
def test_one_element_of_the_tower_matters_and_none_outside(
    tensor: str, same: bool, checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    before = checkpoint()
    after = tmp_path / "changed"
    shutil.copytree(before, after)
    tensors = load_file(after / "model.safetensors")
    tensors[tensor] = tensors[tensor].copy()
    tensors[tensor].flat[0] += np.float32(1)
    save_file(tensors, after / "model.safetensors")
    equal = vision_sha256(resolve(str(after)).weights) == vision_sha256(resolve(str(before)).weights)
    assert equal == same


def test_random_weights_are_told_apart_by_seed() -> None:
    found = {vision_sha256(resolve("llava-tiny", random=True, seed=seed).weights) for seed in (0, 0, 1)}
    assert len(found | {vision_sha256(resolve("llava-tiny").weights)}) == 3


def test_bfloat16_can_be_read(checkpoint: WriteCheckpoint) -> None:
    stored = [vision_sha256(resolve(str(checkpoint(dtype=dtype))).weights) for dtype in ("bfloat16", "float32")]
    assert stored[0] != stored[1]
