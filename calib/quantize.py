"""`flowcut calibrate quantize`: what int4 and fp8 need to know of a checkpoint, from pictures with prompts.

Nothing in the file depends on when, where or in how many attempts it was made.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from rich.progress import Progress

from calib.calibration import Calibration, is_calibration, write_calibration
from calib.dataset import Dataset, find_pictures, tower_pixels
from calib.groups import groups
from calib.origin import check_out, circumstances, digest, partial_path, pictures_of
from calib.partial import Partial
from calib.rounding import block_size
from flowcut.aliases import Model, resolve
from flowcut.anyres import image_slots
from flowcut.budget import Budget, make_budget
from flowcut.deps import require
from flowcut.errors import CheckpointError, ConfigError, InputError
from flowcut.preprocess import ImageSettings
from flowcut.prompt import Tokenizer, question_prompt
from flowcut.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from calib.measure import Sample

LOG = logging.getLogger("flowcut.calib")
Wanted = Literal["int4", "fp8", "all"]
LIMIT = 32
QUESTIONS = (
    "What is in the picture?",
    "What color is the largest thing?",
    "How many things are there?",
    "What is to the left of the center?",
    "Describe the image in detail.",
)
"""A stand-in for what users ask; one for each picture in turn."""
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class QuantizeSettings:
    """What to calibrate, on which pictures and prompts, and where to write it.

    Attributes:
        tokens, llm_tokens: visual tokens kept per picture, see flowcut.budget.make_budget.
        schedule: see flowcut.schedule.make_schedule.
        precision: "int4" searches scales, "fp8" keeps ranges, "all" does both.
        questions: put into the model's template, one for each picture in turn; none: QUESTIONS.
        limit: use the first N pictures by name.
        threads: of PyTorch; None leaves it to choose.
    """

    model: str
    images: Path
    out: Path
    random: bool = False
    seed: int = 0
    tokens: int | str | None = None
    llm_tokens: int | None = None
    schedule: str = "static"
    precision: Wanted = "all"
    questions: tuple[str, ...] = ()
    limit: int = LIMIT
    decoder_layers: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(Wanted):
            raise ConfigError(f"precision must be one of {', '.join(get_args(Wanted))}, got {self.precision!r}.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}.")


@dataclass(frozen=True)
class Quantized:
    """What was written, and where."""

    out: Path
    calibration: Calibration
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """What the last line of `flowcut calibrate quantize` holds."""
        info = self.calibration.info
        return {
            "calibration": str(self.out),
            "sha256": self.calibration.sha256,
            "bytes": self.file_bytes,
            "model": info["model"],
            "note": info["note"],
            "precision": info["precision"],
            "pictures": len(info["pictures"]),
            "skipped": len(info["skipped"]),
            "tokens": info["tokens"],
            "ranges": len(self.calibration.ranges),
            "scales": len(self.calibration.scales),
            "error": {part: _means(info["errors"], part) for part in ("vision", "language") if info["errors"]},
        }


def calibrate_quantize(settings: QuantizeSettings, progress: Progress) -> Quantized:
    """Measure, then write the file. An interrupted run is resumed by the same call.

    Raises:
        ConfigError, CheckpointError, InputError: a setting, checkpoint, picture or question that does not fit.
        EngineError: the disk. FlowCutError: PyTorch is not installed.
    """
    check_out(settings.out, SUFFIX, is_calibration)
    require("torch", extra="torch")
    from calib.measure import Bench, measure_language, measure_vision
    from calib.tower import torch_threads

    model = resolve(settings.model, random=settings.random, decoder_layers=settings.decoder_layers, seed=settings.seed)
    if settings.precision != "fp8":
        _check_blocks(model)
    config = model.config
    budget = make_budget(config, settings.tokens, settings.schedule, settings.llm_tokens)
    schedule = make_schedule(settings.schedule, config.vision, budget.tokens, weights=model.weights)
    image_settings = ImageSettings.from_directory(model.files, config.vision.image_size, config.grid_pinpoints)
    prompts = settings.questions or QUESTIONS
    dataset = find_pictures(
        settings.images, settings.limit, progress, lambda image: tower_pixels(image, image_settings, config)
    )
    samples = _samples(model, dataset, prompts, budget)
    origin = _origin(model, settings, dataset, prompts, schedule, budget)
    prompts_read = [s.prompt.input_ids.tolist() for s in samples]
    inputs = digest([model.weights.sha256, image_settings.to_dict(), origin, prompts_read])
    partial = Partial(partial_path(settings.out, directory=True), inputs)
    try:
        bench = Bench(model.weights, samples, settings.precision != "fp8", budget.llm_tokens, partial, progress)
        with torch_threads(settings.threads):
            measured, embeds = measure_vision(bench, schedule, image_settings)
            measured = measure_language(bench, measured, embeds)
    except CheckpointError:
        partial.remove()  # a mended checkpoint is another one
        raise
    tokens = _tokens(samples, [len(rows) for rows in embeds], budget.asked(config))
    info = {**origin, "errors": measured.errors, "tokens": tokens}
    ranges = {} if settings.precision == "int4" else measured.ranges
    calibration = write_calibration(settings.out, model.weights, ranges, measured.scales, info)
    partial.remove()
    return Quantized(settings.out, calibration, settings.out.stat().st_size)


def _samples(model: Model, dataset: Dataset, questions: Sequence[str], budget: Budget) -> list[Sample]:
    """Pictures by content, so that names decide nothing, each with the next question.

    Raises:
        InputError: a prompt that is empty or, with the largest picture, longer than the decoder's positions.
    """
    from calib.measure import Sample

    text, anyres = model.config.text, model.config.anyres
    tokenizer = Tokenizer.from_file(model.tokenizer, model.config.image_token_id, text.vocab_size)
    # a place for each picture, which its visual tokens take once they have been counted
    encoded = [tokenizer.encode(question_prompt(question, anyres=anyres), [1], 1) for question in questions]
    visual = image_slots(model.config, budget.tokens)
    for question, prompt in zip(questions, encoded, strict=True):
        length = len(prompt.input_ids) - 1 + visual
        if not question.strip() or length > text.max_position_embeddings:
            raise InputError(
                f"question must be text of at most {text.max_position_embeddings} tokens with {visual} visual ones, "
                f"got {question!r} ({length} tokens)."
            )
    pictures = sorted(dataset.pictures, key=lambda picture: picture.sha256)
    return [Sample(picture, encoded[i % len(encoded)]) for i, picture in enumerate(pictures)]


def _check_blocks(model: Model) -> None:
    """Raise ConfigError for a model whose layers have no int4."""
    for inputs in {group.inputs for group in groups(model.config)}:
        block_size(inputs)


def _origin(
    model: Model,
    settings: QuantizeSettings,
    dataset: Dataset,
    questions: Sequence[str],
    schedule: Schedule,
    budget: Budget,
) -> dict[str, Any]:
    """What the file says of where it comes from."""
    return {
        "model": model.name,
        "note": model.note,
        "weights": f"random, seed {settings.seed}" if model.weights.random else "checkpoint",
        "precision": settings.precision,
        "schedule": schedule.to_dict(),
        **({} if budget.llm_tokens is None else {"llm_tokens": budget.llm_tokens}),
        "questions": list(questions),
        **pictures_of(dataset),
        **circumstances(("tokenizers",), settings.threads),
    }


def _tokens(samples: Sequence[Sample], visual: Sequence[int], asked: int) -> dict[str, int]:
    """Per picture the visual ones asked for; in all those that went into the decoder, and those that outputs were
    compared on. visual: of each sample, those that went in."""
    from calib.measure import SAMPLED

    lengths = [len(sample.prompt.input_ids) - 1 + count for sample, count in zip(samples, visual, strict=True)]
    each = -(-SAMPLED // len(samples))
    return {"visual": asked, "language": sum(lengths), "compared": sum(min(n, each) for n in lengths)}


def _means(errors: dict[str, dict[str, float]], part: str) -> dict[str, float]:
    """Mean relative error of a part's groups, before and after."""
    from calib.groups import part_of

    mine = [error for name, error in errors.items() if part_of(name) == part]
    return {when: float(f"{np.mean([error[when] for error in mine]):.6g}") for when in ("before", "after")}
