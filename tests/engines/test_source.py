"""The checkpoint behind an engine directory. What `verify` says of it is in test_verify.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import WriteCheckpoint
from verify_engines import builder

from engines.source import need_source, source_weights
from flowcut.aliases import ASSETS
from flowcut.artifacts import Manifest, read_manifest
from flowcut.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    build = builder(tmp_path_factory, model="llava-tiny", tokens=16)
    random = build("fp16", random=True, seed=3, decoder_layers=2)
    return {"checkpoint": read_manifest(build("fp16")), "random": read_manifest(random)}


def test_what_the_manifest_names_is_found(manifests: dict[str, Manifest]) -> None:
    weights, why_not = source_weights(manifests["checkpoint"], None)
    assert weights is not None
    assert not why_not
    assert weights.sha256 == manifests["checkpoint"].source_sha256
    assert need_source(manifests["checkpoint"], str(ASSETS / "llava-tiny")).sha256 == weights.sha256


def test_random_weights_are_drawn_again(manifests: dict[str, Manifest]) -> None:
    weights = need_source(manifests["random"], None)
    assert weights.random
    assert weights.config.text.num_hidden_layers == 2
    other = need_source(replace(manifests["random"], seed=3), None)
    name = "multi_modal_projector.linear_1.weight"
    np.testing.assert_array_equal(weights.load(name), other.load(name))


def test_why_there_are_none_is_said_or_raised(manifests: dict[str, Manifest]) -> None:
    lost = replace(manifests["checkpoint"], source="nowhere")
    assert source_weights(lost, None) == (None, "checkpoint not found; pass --checkpoint DIR")
    with pytest.raises(
        CheckpointError, match=r"must be the one that the engine was built from, got none: checkpoint not"
    ):
        need_source(lost, None)
    changed = replace(manifests["checkpoint"], source_sha256="0" * 64)
    weights, why_not = source_weights(changed, None)
    assert weights is None
    assert why_not.startswith("llava-tiny is not the one that was exported (sha256 0000")
    with pytest.raises(
        CheckpointError, match=r"got none: llava-tiny is not the one that was exported .*--checkpoint DIR"
    ):
        need_source(changed, None)


def test_a_named_checkpoint_has_to_be_the_one(manifests: dict[str, Manifest], checkpoint: WriteCheckpoint) -> None:
    for name in manifests:
        with pytest.raises(CheckpointError, match=r"checkpoint must be the one that was exported .* Pass another"):
            source_weights(manifests[name], str(checkpoint("tiny", seed=1)))
    with pytest.raises(ConfigError, match="model must be one of"):
        source_weights(manifests["checkpoint"], str(Path("nowhere")))
