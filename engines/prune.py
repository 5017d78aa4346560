"""The vision tower alone, and what the pruner did in it: `flowcut prune`."""

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

from engines.pipeline import graph_metadata, save_graph, token_count
from engines.session import OrtSession
from flowcut.aliases import Model, resolve
from flowcut.atomic import write_file
from flowcut.contract import Limits, vision_contract
from flowcut.deps import require
from flowcut.errors import InputError
from flowcut.overlay import draw
from flowcut.preprocess import ImageSettings, open_image, pixel_values, undo
from flowcut.schedule import Schedule, check_fixed_shapes, default_schedule, make_schedule

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class PruneSettings:
    """What to prune, how, and where to write it. Pictures come from `images` or, preprocessed, from `pixels`.

    Attributes:
        tokens: patches kept per picture, an int or "all"; None: 11.1% of the patches.
        schedule: "adaptive", "static", "masked" or the name of a schedule .json file; None: adaptive in torch, masked,
            which keeps the same patches, on ONNX Runtime, and static where the selector has no other.
        selector: what chooses the patches; None: what the schedule file says, else "flowcut".
        backend: "torch" or "ort", which has no adaptive schedule.
        out, overlay: see `output_paths`.
    """

    model: str
    random: bool = False
    seed: int = 0
    tokens: int | str | None = None
    schedule: str | None = None
    selector: str | None = None
    backend: str = "torch"
    images: tuple[Path, ...] = ()
    pixels: Path | None = None
    out: Path | None = None
    overlay: Path | None = None


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


@dataclass(frozen=True)
class Outcome:
    """What `prune` did, with which schedule, and which files it wrote. `note` is the model's."""

    pruned: Pruned
    schedule: Schedule
    note: str
    written: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What the last line of `flowcut prune` holds."""
        return {
            "kept": self.pruned.kept.tolist(),
            "counts": self.pruned.counts.tolist(),
            "schedule": self.schedule.to_dict(),
            "note": self.note,
            "written": self.written,
        }


def prune(settings: PruneSettings, progress: Progress) -> Outcome:
    """Run the vision tower of a model over pictures and write what was asked for.

    Raises:
        ConfigError, CheckpointError, InputError: a setting, checkpoint or picture that does not fit.
        FlowCutError: the disk, or a library that is not installed.
    """
    model = resolve(settings.model, random=settings.random, seed=settings.seed)
    vision = model.config.vision
    name = settings.schedule or default_schedule(settings.selector, settings.backend)
    tokens = token_count(settings.tokens, vision.patches, settings.schedule or "")
    schedule = make_schedule(name, vision, tokens, settings.selector, model.weights)
    image_settings = ImageSettings.from_directory(model.files, vision.image_size)
    if settings.pixels is None:
        pixels = pixel_values([open_image(path) for path in settings.images], image_settings)
    else:
        pixels = read_pixels(settings.pixels, vision.image_size)
    paths = output_paths(settings.out, settings.overlay, len(pixels))
    if settings.backend == "ort":
        pruned = prune_ort(model, schedule, pixels, progress)
    else:
        pruned = prune_torch(model, schedule, pixels)
    pages = overlays(pruned, pixels, image_settings, vision.grid) if settings.overlay else []
    return Outcome(pruned, schedule, model.note, write_outputs(pruned, pages, paths))


def prune_torch(model: Model, schedule: Schedule, pixels: Floats) -> Pruned:
    """In eager PyTorch, float32, with any schedule."""
    require("torch", "torch")
    import torch

    from flowcut.vision import VisionModel

    with torch.inference_mode():
        vision = VisionModel.from_weights(model.weights)
        output = vision.features(torch.from_numpy(pixels), schedule)
    trace = [(layer, [numbers.numpy() for numbers in kept]) for layer, kept in output.trace]
    return Pruned(output.kept.numpy(), output.counts.numpy(), output.features.numpy(), trace)


def prune_ort(
    model: Model, schedule: Schedule, pixels: Floats, progress: Progress, threads: int | None = None
) -> Pruned:
    """On ONNX Runtime, float32, through a graph exported for the occasion. The schedule must have fixed shapes."""
    check_fixed_shapes(schedule)
    require("onnx_ir", "export")
    from export.vision import traced_contract, vision_model

    limits = Limits(max_images=len(pixels))
    contract = vision_contract(model.config, schedule.tokens, "fp32", limits)
    graph = vision_model(model.weights, contract, schedule, "fp32", graph_metadata(model, schedule, "fp32"), trace=True)
    with tempfile.TemporaryDirectory(prefix="flowcut-") as directory:
        path = Path(directory) / "vision.onnx"
        save_graph(graph, path, progress)
        session = OrtSession(path, traced_contract(contract, schedule, model.config.vision), threads)
        outputs: dict[str, Any] = session.run({"pixel_values": pixels}).arrays
    return Pruned(outputs["kept"], outputs["counts"], outputs["features"], _trace(outputs))


def _trace(outputs: dict[str, Any]) -> list[tuple[int, list[Integers]]]:
    """Valid rows of each `kept.<layer>` output."""
    layers = sorted(int(name.split(".")[1]) for name in outputs if name.startswith("kept."))
    valid = {layer: outputs["counts"][:, layer + 1] for layer in layers}
    return [(i, [row[:n] for row, n in zip(outputs[f"kept.{i}"], valid[i], strict=True)]) for i in layers]


def overlays(pruned: Pruned, pixels: Floats, settings: ImageSettings, grid: int) -> list[Image.Image]:
    """One picture per image: the input and what was left after each pruning point."""
    pages = []
    for i, picture in enumerate(pixels):
        kept = [(layer, numbers[i]) for layer, numbers in pruned.trace]
        pages.append(draw(undo(picture, settings), kept, grid, settings.image_size))
    return pages


def read_pixels(path: Path, image_size: int) -> Floats:
    """Preprocessed pixel_values [B, 3, S, S] from a .npy file.

    Raises:
        InputError: unreadable, not a numeric array of that shape, or not finite.
    """
    try:
        pixels = np.lib.format.open_memmap(path, mode="r")  # looks at the header only, however large the file
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"pixels must be a .npy file, got {str(path)!r}: {reason}.") from None
    if pixels.ndim != 4 or pixels.shape[1:] != (3, image_size, image_size) or not len(pixels):
        raise InputError(
            f"pixels must have the shape [B, 3, {image_size}, {image_size}], got {list(pixels.shape)} in {str(path)!r}."
        )
    if pixels.dtype.kind not in "fiu":
        raise InputError(f"pixels must be real numbers, got {pixels.dtype} in {str(path)!r}.")
    with np.errstate(over="ignore"):  # what does not fit into float32 is found below
        values = np.array(pixels, np.float32, order="C")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise InputError(f"pixels must be finite in float32, got {bad} values that are not in {str(path)!r}.")
    return values


def output_paths(out: Path | None, overlay: Path | None, pictures: int) -> tuple[list[Path], list[Path]]:
    """Where the arrays and where the pages go: none or one, and none or one per picture, numbered if several.

    Raises:
        InputError: a folder that does not exist, or two outputs of one name: known before anything is computed.
    """
    pages = [overlay] if overlay is not None else []
    if overlay is not None and pictures > 1:
        pages = [overlay.with_stem(f"{overlay.stem}-{i}") for i in range(pictures)]
    arrays = [out] if out is not None else []
    for field, paths in (("out", arrays), ("overlay", pages)):
        for path in paths:
            if not path.parent.is_dir() or path.is_dir():
                raise InputError(f"{field} must be a file in an existing directory, got {str(path)!r}.")
    if set(arrays) & set(pages):
        raise InputError(f"out and overlay must be different files, got {str(out)!r} for both.")
    return arrays, pages


def write_outputs(
    pruned: Pruned, pages: Sequence[Image.Image], paths: tuple[Sequence[Path], Sequence[Path]]
) -> list[str]:
    """Write the arrays and the pages to `output_paths`; returns the paths. Nothing is written before all is encoded."""
    contents: dict[Path, bytes] = {}
    for path in paths[0]:
        buffer = io.BytesIO()
        np.savez(buffer, kept=pruned.kept, counts=pruned.counts, features=pruned.features)
        contents[path] = buffer.getvalue()
    for path, page in zip(paths[1], pages, strict=True):
        buffer = io.BytesIO()
        page.save(buffer, format="PNG")
        contents[path] = buffer.getvalue()
    for path, content in contents.items():
        write_file(path, content)
    return [str(path) for path in contents]
