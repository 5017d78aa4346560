"""`flowcut prune`: the vision tower alone, and what the pruner did in it; with a question also the language model.

LLaVA-NeXT's tower sees each picture as tiles. What is kept of them is put together as the vision graph does it; the
budget of the whole picture is reached inside the language model. That runs as far as it drops visual tokens, which is
two layers, and only where a question is asked: the last token of its prompt chooses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.progress import Progress

from engines.prune_files import output_paths, read_pixels, write_outputs
from engines.prune_ort import prune_ort
from engines.prune_question import check_question, make_asked
from engines.prune_result import Floats, Outcome, Pruned
from flowcut.aliases import resolve
from flowcut.anyres import Tiling, vision_feeds
from flowcut.budget import make_budget
from flowcut.config import LlavaConfig
from flowcut.deps import require
from flowcut.errors import InputError
from flowcut.overlay import draw, draw_tiles
from flowcut.preprocess import ImageSettings, open_image, pixel_values, undo
from flowcut.schedule import default_schedule, make_schedule
from flowcut.tiles import tiled_pixels


@dataclass(frozen=True)
class PruneSettings:
    """What to prune, how, and where to write it. Pictures come from `images` or, preprocessed, from `pixels`.

    Attributes:
        tokens, llm_tokens: see flowcut.budget.make_budget.
        schedule: "adaptive", "static", "masked" or the name of a schedule .json file; None: adaptive in torch, masked,
            which keeps the same patches, on ONNX Runtime, and static where the selector has no other.
        selector: what chooses the patches; None: what the schedule file says, else "flowcut".
        backend: "torch" or "ort", which has no adaptive schedule.
        question: put about each picture alone, so that the language model drops visual tokens too; None: the encoder
            alone runs. LLaVA-1.5 takes it with llm_tokens only, and the other way round.
        out, overlay: see `output_paths`.
    """

    model: str
    random: bool = False
    seed: int = 0
    tokens: int | str | None = None
    llm_tokens: int | None = None
    question: str | None = None
    schedule: str | None = None
    selector: str | None = None
    backend: str = "torch"
    images: tuple[Path, ...] = ()
    pixels: Path | None = None
    out: Path | None = None
    overlay: Path | None = None


def prune(settings: PruneSettings, progress: Progress) -> Outcome:
    """Run a model over pictures as far as it drops visual tokens and write what was asked for.

    Raises:
        ConfigError, CheckpointError, InputError: a setting, checkpoint, question or picture that does not fit.
        FlowCutError: the disk, or a library that is not installed.
    """
    model = resolve(settings.model, random=settings.random, seed=settings.seed)
    config, vision = model.config, model.config.vision
    name = settings.schedule or default_schedule(settings.selector, settings.backend)
    budget = make_budget(config, settings.tokens, settings.schedule or "", settings.llm_tokens)
    check_question(config, settings.question, budget)
    schedule = make_schedule(name, vision, budget.tokens, settings.selector, model.weights)
    image_settings = ImageSettings.from_directory(model.files, vision.image_size, config.grid_pinpoints)
    pixels, tilings = _pixels(settings, config, image_settings)
    rows = vision_feeds(config, budget.tokens, tilings).rows if tilings else (budget.tokens,)
    asked = make_asked(model, settings.question, budget, rows)
    paths = output_paths(settings.out, settings.overlay, len(tilings or pixels))
    if settings.backend == "ort":
        pruned = prune_ort(model, schedule, pixels, progress, tilings=tilings, asked=asked)
    else:
        require("torch", "torch")
        from engines.prune_torch import prune_torch

        pruned = prune_torch(model, schedule, pixels, tilings, asked)
    pages = overlays(pruned, pixels, image_settings, vision.grid) if settings.overlay else []
    written = write_outputs(pruned.arrays(), pages, paths)
    return Outcome(pruned, schedule, model.note, written, budget.llm_tokens, settings.question)


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


def overlays(pruned: Pruned, pixels: Floats, settings: ImageSettings, grid: int) -> list[Image.Image]:
    """A page per picture: the input, what was left after each pruning point, and what the language model left."""
    seen = [undo(image, settings) for image in pixels]
    left = [None] * len(pruned.encoder) if pruned.left is None else pruned.left
    pages, first = [], 0
    for i, numbers in enumerate(left):
        count = pruned.tilings[i].tiles if pruned.tilings else 1
        own = slice(first, first + count)
        kept = [(layer, each[own]) for layer, each in pruned.trace]
        first += count
        if pruned.tilings:
            pages.append(draw_tiles(seen[own], kept, pruned.tilings[i], settings.image_size, numbers))
        else:
            trace = [(layer, each[0]) for layer, each in kept]
            pages.append(draw(seen[i], trace, grid, settings.image_size, numbers))
    return pages
