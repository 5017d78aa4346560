"""The vision tower alone, and what the pruner did in it: `flowcut prune`.

LLaVA-NeXT's tower sees each picture as tiles. What is kept of them is put together as the vision graph does it; the
budget of the whole picture is reached inside the language model only, which does not run here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from engines.pipeline import graph_metadata, save_graph
from engines.prune_files import output_paths, read_pixels, write_outputs
from engines.session import OrtSession
from flowcut.aliases import Model, resolve
from flowcut.anyres import Tiling, kept_patches, patch_places, vision_feeds
from flowcut.budget import make_budget
from flowcut.config import LlavaConfig
from flowcut.contract import Limits, vision_contract
from flowcut.deps import require
from flowcut.errors import InputError
from flowcut.overlay import draw, draw_tiles
from flowcut.preprocess import ImageSettings, open_image, pixel_values, undo
from flowcut.schedule import Schedule, check_fixed_shapes, default_schedule, make_schedule
from flowcut.tiles import tiled_pixels

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class PruneSettings:
    """What to prune, how, and where to write it. Pictures come from `images` or, preprocessed, from `pixels`.

    Attributes:
        tokens: see flowcut.budget.make_budget.
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
    """What happened to the B images that the tower saw: pictures, or of LLaVA-NeXT the tiles of all pictures.

    Attributes:
        kept: [B, K] patch numbers, ascending.
        counts: [B, L+1] patches entering layer 0, then leaving each layer.
        features: [B, K, hidden] float32, hidden state -2 before the projector.
        trace: per pruning point its layer and, per image, the patches that left it.
        tilings: how LLaVA-NeXT's pictures were cut; empty for LLaVA-1.5.
        merged: per picture of LLaVA-NeXT the patches kept outside the padding, numbered as flowcut.anyres.kept_patches
            does, ascending.
    """

    kept: Integers
    counts: Integers
    features: Floats
    trace: list[tuple[int, list[Integers]]]
    tilings: Sequence[Tiling] = ()
    merged: Sequence[Integers] = ()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What --out holds. Of LLaVA-NeXT, `kept` is per picture and ends in -1 where others kept more."""
        whole: dict[str, NDArray[Any]] = {"kept": self.kept, "counts": self.counts, "features": self.features}
        if not self.tilings:
            return whole
        kept = np.full((len(self.merged), max(map(len, self.merged))), -1, np.int64)
        for row, numbers in zip(kept, self.merged, strict=True):
            row[: len(numbers)] = numbers
        grids = np.array([(tiling.rows, tiling.columns) for tiling in self.tilings], np.int64)
        return whole | {"kept": kept, "grids": grids, "tile_kept": self.kept}

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        if not self.tilings:
            return {"kept": self.kept.tolist(), "counts": self.counts.tolist()}
        return {
            "kept": [numbers.tolist() for numbers in self.merged],
            "counts": self.counts.tolist(),
            "grids": [[tiling.rows, tiling.columns] for tiling in self.tilings],
            "tile_kept": self.kept.tolist(),
        }


@dataclass(frozen=True)
class Outcome:
    """What `prune` did, with which schedule, and which files it wrote. `note` is the model's.

    llm_tokens: what the language model would leave of each picture; None: all.
    """

    pruned: Pruned
    schedule: Schedule
    note: str
    written: list[str]
    llm_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the last line of `flowcut prune` holds."""
        return {
            **self.pruned.to_dict(),
            **({"llm_tokens": self.llm_tokens} if self.pruned.tilings else {}),
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
    config, vision = model.config, model.config.vision
    name = settings.schedule or default_schedule(settings.selector, settings.backend)
    budget = make_budget(config, settings.tokens, settings.schedule or "")
    schedule = make_schedule(name, vision, budget.tokens, settings.selector, model.weights)
    image_settings = ImageSettings.from_directory(model.files, vision.image_size, config.grid_pinpoints)
    pixels, tilings = _pixels(settings, config, image_settings)
    paths = output_paths(settings.out, settings.overlay, len(tilings or pixels))
    if settings.backend == "ort":
        pruned = prune_ort(model, schedule, pixels, progress, tilings=tilings)
    else:
        pruned = prune_torch(model, schedule, pixels, tilings)
    pages = overlays(pruned, pixels, image_settings, vision.grid) if settings.overlay else []
    written = write_outputs(pruned.arrays(), pages, paths)
    return Outcome(pruned, schedule, model.note, written, budget.llm_tokens)


def _pixels(
    settings: PruneSettings, config: LlavaConfig, image_settings: ImageSettings
) -> tuple[Floats, Sequence[Tiling]]:
    """What the tower sees, and how LLaVA-NeXT's pictures were cut."""
    if settings.pixels is not None:
        if config.anyres:
            raise InputError(
                f"pixels must not be given for LLaVA-NeXT, got {str(settings.pixels)!r}: the size of a picture says "
                "where its tiles belong. Give --image."
            )
        return read_pixels(settings.pixels, config.vision.image_size), ()
    images = [open_image(path) for path in settings.images]
    return tiled_pixels(images, image_settings, config) if config.anyres else (pixel_values(images, image_settings), ())


def prune_torch(model: Model, schedule: Schedule, pixels: Floats, tilings: Sequence[Tiling] = ()) -> Pruned:
    """In eager PyTorch, float32, with any schedule. `tilings`: of LLaVA-NeXT's pictures, whose tiles `pixels` are."""
    require("torch", "torch")
    import torch

    from flowcut.vision import VisionModel

    with torch.inference_mode():
        vision = VisionModel.from_weights(model.weights)
        output = vision.features(torch.from_numpy(pixels), schedule)
    trace = [(layer, [numbers.numpy() for numbers in kept]) for layer, kept in output.trace]
    kept = output.kept.numpy()
    return Pruned(kept, output.counts.numpy(), output.features.numpy(), trace, tilings, merge(kept, tilings))


def merge(kept: Integers, tilings: Sequence[Tiling]) -> list[Integers]:
    """What is kept of each picture, its tiles put together, from what is kept [tiles, K] of each tile."""
    pictures, first = [], 0
    for tiling in tilings:
        places = np.take_along_axis(patch_places(tiling), kept[first : first + tiling.tiles], 1)
        pictures.append(kept_patches(np.sort(places, axis=None)))
        first += tiling.tiles
    return pictures


def prune_ort(
    model: Model,
    schedule: Schedule,
    pixels: Floats,
    progress: Progress,
    threads: int | None = None,
    tilings: Sequence[Tiling] = (),
) -> Pruned:
    """On ONNX Runtime, float32, through a graph exported for the occasion. The schedule must have fixed shapes."""
    check_fixed_shapes(schedule)
    require("onnx_ir", "export")
    from export.vision import traced_contract, vision_model

    limits = Limits(max_images=len(tilings or pixels))
    contract = vision_contract(model.config, schedule.tokens, "fp32", limits)
    graph = vision_model(model.weights, contract, schedule, "fp32", graph_metadata(model, schedule, "fp32"), trace=True)
    with tempfile.TemporaryDirectory(prefix="flowcut-") as directory:
        path = Path(directory) / "vision.onnx"
        save_graph(graph, path, progress)
        session = OrtSession(path, traced_contract(contract, schedule, model.config.vision), threads)
        outputs: dict[str, Any] = session.run(_feeds(model.config, schedule, pixels, tilings)).arrays
    kept = outputs["tile_kept" if tilings else "kept"]
    pictures = [kept_patches(places) for places in outputs["kept"]] if tilings else []
    return Pruned(kept, outputs["counts"], outputs["features"], _trace(outputs), tilings, pictures)


def _feeds(
    config: LlavaConfig, schedule: Schedule, pixels: Floats, tilings: Sequence[Tiling]
) -> dict[str, NDArray[Any]]:
    """All that the vision graph takes."""
    if not tilings:
        return {"pixel_values": pixels}
    return {"pixel_values": pixels, **vision_feeds(config, schedule.tokens, tilings).arrays()}


def _trace(outputs: dict[str, Any]) -> list[tuple[int, list[Integers]]]:
    """Valid rows of each `kept.<layer>` output."""
    layers = sorted(int(name.split(".")[1]) for name in outputs if name.startswith("kept."))
    valid = {layer: outputs["counts"][:, layer + 1] for layer in layers}
    return [(i, [row[:n] for row, n in zip(outputs[f"kept.{i}"], valid[i], strict=True)]) for i in layers]


def overlays(pruned: Pruned, pixels: Floats, settings: ImageSettings, grid: int) -> list[Image.Image]:
    """A page per picture: the input and what was left after each pruning point."""
    seen = [undo(image, settings) for image in pixels]
    if not pruned.tilings:
        traces = [[(layer, numbers[i]) for layer, numbers in pruned.trace] for i in range(len(seen))]
        return [draw(image, trace, grid, settings.image_size) for image, trace in zip(seen, traces, strict=True)]
    pages, first = [], 0
    for tiling in pruned.tilings:
        own = slice(first, first + tiling.tiles)
        kept = [(layer, numbers[own]) for layer, numbers in pruned.trace]
        pages.append(draw_tiles(seen[own], kept, tiling, settings.image_size))
        first += tiling.tiles
    return pages
