"""The checkpoint that an engine directory was built from, found again and shown to be the same."""

from __future__ import annotations

from pathlib import Path

from flowcut.aliases import ALIASES, resolve
from flowcut.artifacts import Manifest
from flowcut.checkpoint import Weights, random_weights
from flowcut.deps import require
from flowcut.errors import CheckpointError, FlowCutError


def source_weights(manifest: Manifest, checkpoint: str | None) -> tuple[Weights | None, str]:
    """The tensors that the directory was built from, for torch, or why there are none.

    Args:
        checkpoint: a model as `flowcut engine` takes it; None takes the manifest's hint.

    Raises:
        FlowCutError: a `checkpoint` that is not the right one or cannot be read, or no torch to read it with.
    """
    try:
        require("torch", extra="torch")
        weights = _open_weights(manifest, checkpoint)
    except FlowCutError as error:
        if checkpoint is not None:
            raise
        return None, str(error)
    if weights is None:
        return None, "checkpoint not found; pass --checkpoint DIR"
    if weights.sha256 == manifest.source_sha256:
        return weights, ""
    problem = f"the one that was exported (sha256 {manifest.source_sha256 or 'not known'}), got {weights.sha256}"
    if checkpoint is not None:
        raise CheckpointError(f"checkpoint must be {problem}. Pass another --checkpoint, or build the engine again.")
    return None, f"{manifest.model} is not {problem}; pass --checkpoint DIR"


def need_source(manifest: Manifest, checkpoint: str | None) -> Weights:
    """The same, where nothing can be done without them.

    Raises:
        CheckpointError: there are none.
        FlowCutError: see `source_weights`.
    """
    require("torch", extra="torch")
    weights, why_not = source_weights(manifest, checkpoint)
    if weights is None:
        raise CheckpointError(f"checkpoint must be the one that the engine was built from, got none: {why_not}.")
    return weights


def _open_weights(manifest: Manifest, checkpoint: str | None) -> Weights | None:
    layers = manifest.geometry.text.num_hidden_layers
    if checkpoint is not None:
        return resolve(checkpoint, decoder_layers=layers).weights
    if manifest.weights == "random":
        return random_weights(manifest.geometry, manifest.seed)
    if manifest.source in ALIASES or Path(manifest.source).is_dir():
        return resolve(manifest.source, decoder_layers=layers).weights
    return None
