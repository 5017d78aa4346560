"""Run the vision tower alone and show what the pruner did: `flowcut prune`."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from engines.session import OrtSession
from flowcut.aliases import Model
from flowcut.atomic import write_file
from flowcut.contract import Limits, vision_contract
from flowcut.deps import require
from flowcut.errors import InputError
from flowcut.overlay import draw
from flowcut.preprocess import ImageSettings, undo
from flowcut.schedule import Schedule

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Pruned:
    """What happened to B pictures.

    Attributes:
        kept: [B, K] patch numbers, ascending.
        counts: [B, L+1] patches entering layer 0, then leaving each layer.
        features: [B, K, hidden] float32, hidden state -2 before the projector.
        trace: per pruning point its layer and, per picture, the patches that left it.
    """

    kept: Integers
    counts: Integers
    features: Floats
    trace: list[tuple[int, list[Integers]]]


def prune_torch(model: Model, schedule: Schedule, pixel_values: Floats) -> Pruned:
    """In eager PyTorch, float32, with any schedule."""
    require("torch", "torch")
    import torch

    from flowcut.vision import VisionModel

    with torch.inference_mode():
        vision = VisionModel.from_weights(model.weights)
        output = vision.features(torch.from_numpy(pixel_values), schedule)
    trace = [(layer, [numbers.numpy() for numbers in kept]) for layer, kept in output.trace]
    return Pruned(output.kept.numpy(), output.counts.numpy(), output.features.numpy(), trace)


def prune_ort(
    model: Model, schedule: Schedule, pixel_values: Floats, progress: Progress, threads: int | None = None
) -> Pruned:
    """On ONNX Runtime, float32, through a graph exported for the occasion. The schedule must have fixed shapes."""
    from engines.pipeline import graph_metadata, save_graph
    from export.vision import traced_contract, vision_model

    limits = Limits(max_images=len(pixel_values))
    contract = vision_contract(model.config, schedule.tokens, "fp32", limits)
    graph = vision_model(model.weights, contract, schedule, "fp32", graph_metadata(model, schedule, "fp32"), trace=True)
    with tempfile.TemporaryDirectory(prefix="flowcut-") as directory:
        path = Path(directory) / "vision.onnx"
        save_graph(graph, path, progress)
        session = OrtSession(path, traced_contract(contract, schedule, model.config.vision), threads)
        outputs: dict[str, Any] = session.run({"pixel_values": pixel_values}).arrays
    return Pruned(outputs["kept"], outputs["counts"], outputs["features"], _trace(outputs))


def _trace(outputs: dict[str, Any]) -> list[tuple[int, list[Integers]]]:
    """Valid rows of each `kept.<layer>` output."""
    layers = sorted(int(name.split(".")[1]) for name in outputs if name.startswith("kept."))
    valid = {layer: outputs["counts"][:, layer + 1] for layer in layers}
    return [(i, [row[:n] for row, n in zip(outputs[f"kept.{i}"], valid[i], strict=True)]) for i in layers]


def overlays(pruned: Pruned, pixel_values: Floats, settings: ImageSettings, grid: int) -> list[Image.Image]:
    """One picture per image: the input and what was left after each pruning point."""
    pages = []
    for i, pixels in enumerate(pixel_values):
        kept = [(layer, numbers[i]) for layer, numbers in pruned.trace]
        pages.append(draw(undo(pixels, settings), kept, grid, settings.image_size))
    return pages


def read_pixels(path: Path, image_size: int) -> Floats:
    """Preprocessed pixel_values [B, 3, S, S] from a .npy file.

    Raises:
        InputError: unreadable, not a numeric array of that shape, or not finite.
    """
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"pixels {path} must be a .npy file, got: {error}.") from None
    shape = (3, image_size, image_size)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 4 or pixels.shape[1:] != shape or not len(pixels):
        got = list(pixels.shape) if isinstance(pixels, np.ndarray) else "an archive"
        raise InputError(f"pixels {path} must have the shape [B, 3, {image_size}, {image_size}], got {got}.")
    if pixels.dtype.kind not in "fiu" or not np.isfinite(pixels).all():
        raise InputError(f"pixels {path} must be finite numbers, got {pixels.dtype} with other values.")
    return pixels.astype(np.float32, copy=False)


def write_outputs(pruned: Pruned, out: Path | None, pages: Sequence[Image.Image], overlay: Path | None) -> list[str]:
    """Write the arrays to `out` and the pages to `overlay` (numbered where there are several); returns the paths."""
    contents: dict[Path, bytes] = {}
    if out is not None:
        buffer = io.BytesIO()
        np.savez(buffer, kept=pruned.kept, counts=pruned.counts, features=pruned.features)
        contents[out] = buffer.getvalue()
    if overlay is not None:
        for i, page in enumerate(pages):
            buffer = io.BytesIO()
            page.save(buffer, format="PNG")
            contents[overlay if len(pages) == 1 else overlay.with_stem(f"{overlay.stem}-{i}")] = buffer.getvalue()
    for path, content in contents.items():
        write_file(path, content)
    return [str(path) for path in contents]
