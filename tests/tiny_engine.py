"""An engine directory of the bundled checkpoint or another, written by the exporter alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from export.builder import save
from export.language import language_model
from export.vision import vision_model
from flowcut.aliases import Model, resolve
from flowcut.artifacts import Manifest, timestamp, write_manifest
from flowcut.config import Precision
from flowcut.contract import Limits, language_contract, vision_contract
from flowcut.preprocess import ImageSettings
from flowcut.schedule import Schedule, make_schedule

LIMITS = Limits(max_batch=3, max_images=4, max_prompt=64, max_new_tokens=32)


@dataclass(frozen=True)
class TinyEngine:
    """The directory and what it was made of."""

    directory: Path
    model: Model
    schedule: Schedule


def write_engine(
    directory: Path,
    model: str = "llava-tiny",
    precision: Precision = "fp32",
    tokens: int = 16,
    limits: Limits = LIMITS,
    backend: str = "ort",
    random: bool = False,
) -> TinyEngine:
    """`random`: seeded weights, which answer at length.

    For rtx and trt the engine files hold the path of their ONNX file, which is what tests/fake_gpu.py runs.
    """
    directory.mkdir()
    found = resolve(model, random=random)
    schedule = make_schedule("static", found.config.vision, tokens)
    vision = vision_contract(found.config, tokens, precision, limits)
    language = language_contract(found.config, tokens, precision, limits)
    save(vision_model(found.weights, vision, schedule, precision, {}), directory / "vision.onnx")
    save(language_model(found.weights, language, precision, {}), directory / "language.onnx")
    if backend != "ort":
        for graph in ("vision", "language"):
            (directory / f"{graph}.engine").write_text(str(directory / f"{graph}.onnx"), encoding="utf-8")
    shutil.copy(found.files / "tokenizer.json", directory)
    settings = ImageSettings.from_directory(found.files, found.config.vision.image_size)
    (directory / "preprocessor.json").write_text(json.dumps(settings.to_dict()), encoding="utf-8")
    write_manifest(directory, _manifest(found, schedule, precision, limits, backend))
    return TinyEngine(directory, found, schedule)


def _manifest(model: Model, schedule: Schedule, precision: Precision, limits: Limits, backend: str) -> Manifest:
    return Manifest(
        source="",
        model=model.name,
        weights="random" if model.weights.random else "checkpoint",
        note=model.note,
        source_sha256="",
        geometry=model.config,
        tokens=schedule.tokens,
        schedule=schedule.to_dict(),
        precision=precision,
        backend=backend,  # type: ignore[arg-type]
        limits=limits,
        versions={},
        compute_capabilities=(),
        created=timestamp(),
        build_seconds={},
    )
