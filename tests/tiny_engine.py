"""An engine directory of the bundled checkpoint or another, written by the exporter alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from fake_gpu import VERSION as FAKE_VERSION

from export.builder import save
from export.language import language_model
from export.vision import vision_model
from flowcut.aliases import Model, resolve
from flowcut.artifacts import Manifest, timestamp, write_manifest
from flowcut.budget import Budget, make_budget
from flowcut.chat import FILE, read_template
from flowcut.config import Precision
from flowcut.contract import Limits, language_contracts, stage_names, vision_contract
from flowcut.preprocess import ImageSettings
from flowcut.schedule import Schedule, make_schedule

LIMITS = Limits(max_batch=3, max_images=4, max_prompt=64, max_new_tokens=32)


@dataclass(frozen=True)
class TinyEngine:
    """The directory and what it was made of."""

    directory: Path
    model: Model
    schedule: Schedule
    budget: Budget


def write_engine(
    directory: Path,
    model: str = "llava-tiny",
    precision: Precision = "fp32",
    tokens: int | str = 16,
    limits: Limits = LIMITS,
    backend: str = "ort",
    random: bool = False,
    vision_precision: Precision | None = None,
    stages: int = 1,
    llm_tokens: int | None = None,
    schedule: str = "static",
) -> TinyEngine:
    """`model` may be a directory, `tokens` and `llm_tokens` are what the user of the command line gives.

    `random`: seeded weights, which answer at length. `vision_precision`: None for the decoder's.

    For rtx and trt the engine files hold the path of their ONNX file, which is what tests/fake_gpu.py runs.
    """
    directory.mkdir()
    found = resolve(model, random=random)
    budget = make_budget(found.config, tokens, "", llm_tokens)
    made = make_schedule(schedule, found.config.vision, budget.tokens)
    eyes = vision_precision or precision
    vision = vision_contract(found.config, budget.tokens, eyes, limits, precision)
    save(vision_model(found.weights, vision, made, eyes, {}), directory / "vision.onnx")
    for stage in language_contracts(found.config, budget.tokens, precision, limits, stages, budget.llm_tokens):
        save(language_model(found.weights, stage, precision, {}), directory / f"{stage.name}.onnx")
    if backend != "ort":
        for graph in ("vision", *stage_names(stages)):
            (directory / f"{graph}.engine").write_text(str(directory / f"{graph}.onnx"), encoding="utf-8")
    shutil.copy(found.tokenizer, directory / "tokenizer.json")
    settings = ImageSettings.from_directory(found.files, found.config.vision.image_size, found.config.grid_pinpoints)
    if (template := read_template(found.files)) is not None:
        (directory / FILE).write_text(template, encoding="utf-8")
    (directory / "preprocessor.json").write_text(json.dumps(settings.to_dict()), encoding="utf-8")
    write_manifest(directory, _manifest(found, made, budget, (precision, eyes), stages, limits, backend))
    return TinyEngine(directory, found, made, budget)


def _manifest(
    model: Model,
    schedule: Schedule,
    budget: Budget,
    precisions: tuple[Precision, Precision],
    stages: int,
    limits: Limits,
    backend: str,
) -> Manifest:
    libraries = {"ort": {}, "rtx": {"tensorrt_rtx": FAKE_VERSION}, "trt": {"tensorrt": FAKE_VERSION}}
    return Manifest(
        source="",
        model=model.name,
        weights="random" if model.weights.random else "checkpoint",
        note=model.note,
        source_sha256="",
        geometry=model.config,
        tokens=budget.tokens,
        llm_tokens=budget.llm_tokens,
        schedule=schedule.to_dict(),
        precision=precisions[0],
        vision_precision=precisions[1],
        stages=stages,
        calibration={},
        backend=backend,  # type: ignore[arg-type]
        limits=limits,
        versions=libraries[backend],
        compute_capabilities=() if backend == "ort" else ("sm80 and later",),
        created=timestamp(),
        build_seconds={},
    )
