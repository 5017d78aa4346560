"""What `flowcut eval` may ask: an engine directory, or a checkpoint in PyTorch or exported for the occasion."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from rich.progress import Progress

from engines.pipeline import BuildSettings, build_directory
from engines.runtime.engine import LlavaEngine, Sampling, load_engine
from flowcut.aliases import Model, resolve
from flowcut.artifacts import Manifest, read_manifest
from flowcut.budget import Budget, make_budget
from flowcut.config import LlavaConfig, Precision
from flowcut.deps import require
from flowcut.errors import ConfigError
from flowcut.integrity import MANIFEST
from flowcut.prompt import question_prompt
from flowcut.schedule import Schedule, check_fixed_shapes, default_schedule, make_schedule
from flowcut.selector import selector_name
from flowcut.tiny.scenes import Split

NEW_TOKENS = 4
"""Longest answer; the right ones are one word."""
AT_ONCE = 8
"""Prompts at once where the graphs are exported for the occasion."""
RANDOM, SEEDS = "random", 3
"""The selector of several seeds, and how many."""


@dataclass(frozen=True)
class EvalSettings:
    """What to ask whom.

    Attributes:
        target: an engine directory, or what flowcut.aliases.resolve takes.
        tokens, llm_tokens, schedule, selector, precision, calibration: of a checkpoint, as in PruneSettings and
            BuildSettings; a directory has its own. The selector "random" is random-0, random-1 and random-2 one after
            the other.
        backend: "auto", "torch" or "ort" for a checkpoint; "auto", "rtx", "trt" or "ort" for a directory.
        scenes, questions: see engines.evaluate.make_pages.
        threads: of PyTorch or of ONNX Runtime on the CPU; None leaves it to choose.
        answers: file that takes all answers, one JSON object a line.
    """

    target: str
    tokens: int | str | None = None
    schedule: str | None = None
    selector: str | None = None
    backend: str = "auto"
    precision: Precision | None = None
    calibration: str | None = None
    split: Split = "test"
    scenes: int | None = None
    questions: int | None = None
    threads: int | None = None
    answers: Path | None = None
    llm_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("scenes", "questions", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class Subject:
    """Who is asked. `schedule` is its kind; `note` is the model's.

    `tokens` of `patches` are a picture's, of LLaVA-NeXT those of all its tiles; `llm_tokens` stay inside the language
    model, None: all.
    """

    model: str
    note: str
    tokens: int
    llm_tokens: int | None
    patches: int
    selector: str
    schedule: str
    backend: str
    precision: str


class Answerer(Protocol):
    """A model, ready to answer. `at_once`: pictures that one call should bring."""

    at_once: int

    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Answers to each picture's questions, which come without a template."""
        ...


Answerers = Generator[tuple[str, Answerer]]
"""With the name of each one's selector, opened one after the other."""


def open_target(settings: EvalSettings, progress: Progress) -> tuple[Subject, Answerers]:
    """Who is asked, checked against the settings, and what answers.

    Raises:
        ConfigError, CheckpointError, EngineError: a setting or target that does not fit.
        FlowCutError: a library that is not installed.
    """
    directory = Path(settings.target).expanduser()
    if settings.target and (directory / MANIFEST).is_file():
        return _open_directory(settings, directory)
    if "/" in settings.target and not directory.exists():
        raise ConfigError(
            f"target must be an engine directory or a model, got {settings.target!r}, which does not exist. "
            "`flowcut engine` and `make engine` write engine directories."
        )
    return _open_checkpoint(settings, progress)


class EngineAnswerer:
    """An engine directory, whatever runs it. Each question brings its picture, as a request does."""

    at_once = 16

    def __init__(self, engine: LlavaEngine) -> None:
        limits = engine.manifest.limits
        self._engine = engine
        self._prompts = min(limits.max_batch, limits.max_images)
        self._sampling = Sampling(min(NEW_TOKENS, limits.max_new_tokens))

    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """See Answerer."""
        both, anyres = zip(pictures, questions, strict=True), self._engine.manifest.geometry.anyres
        pairs = [(picture, question_prompt(text, anyres=anyres)) for picture, texts in both for text in texts]
        answers: list[str] = []
        for start in range(0, len(pairs), self._prompts):
            some = pairs[start : start + self._prompts]
            generation = self._engine.generate([p for p, _ in some], [text for _, text in some], self._sampling)
            answers += generation.texts
        words = iter(answers)
        return [[next(words) for _ in texts] for texts in questions]


def _open_directory(settings: EvalSettings, directory: Path) -> tuple[Subject, Answerers]:
    if settings.backend == "torch":
        raise ConfigError(
            f"backend must be auto, rtx, trt or ort for an engine directory, got 'torch'. To evaluate in PyTorch, name "
            f"the checkpoint that {directory} was built from."
        )
    manifest = read_manifest(directory)
    _check_built(settings, manifest, directory)
    engine = load_engine(directory, settings.backend, threads=settings.threads, exact=True)
    subject = Subject(
        model=manifest.model,
        note=manifest.note,
        **_visual_tokens(manifest.geometry, manifest.budget),
        selector=selector_name(manifest.schedule),
        schedule=manifest.schedule["kind"],
        backend=engine.backend,
        precision=manifest.precision,
    )
    return subject, _loaded(subject.selector, engine)


def _check_built(settings: EvalSettings, manifest: Manifest, directory: Path) -> None:
    """Raise ConfigError for a setting that differs from what the directory was built with."""
    config, schedule = manifest.geometry, manifest.schedule
    if config.anyres:
        make_budget(config, None, llm_tokens=settings.llm_tokens)  # which has no such option
    asked = None if settings.tokens is None else make_budget(config, settings.tokens).asked(config)
    built: dict[str, tuple[Any, Any]] = {
        "tokens": (asked, manifest.budget.asked(config)),
        "llm_tokens": (settings.llm_tokens, manifest.llm_tokens),
        "selector": (settings.selector, selector_name(schedule)),
        "schedule": (None if schedule["kind"] == "off" else settings.schedule, schedule["kind"]),
        "precision": (settings.precision, manifest.precision),
    }
    if settings.schedule and settings.schedule.endswith(".json"):
        wanted = make_schedule(settings.schedule, config.vision, manifest.tokens)  # without what it was calibrated on
        built["schedule"] = wanted.to_dict(), Schedule.from_dict(schedule).to_dict()
    for field, (given, own) in built.items():
        if given is not None and given != own:
            raise ConfigError(
                f"{field} must be {own!r}, which {directory} was built with, got {given!r}. Leave it out, or name the "
                "checkpoint instead of the directory."
            )


def _open_checkpoint(settings: EvalSettings, progress: Progress) -> tuple[Subject, Answerers]:
    backend = "torch" if settings.backend == "auto" else settings.backend
    if backend not in ("torch", "ort"):
        raise ConfigError(
            f"backend must be torch or ort for a checkpoint, got {settings.backend!r}. `flowcut engine "
            f"{settings.target}` builds an engine directory, which other backends run."
        )
    if backend == "torch" and settings.precision not in (None, "fp32"):
        raise ConfigError(f"precision must be fp32 with torch, got {settings.precision!r}. --backend ort has others.")
    model = resolve(settings.target)
    budget = make_budget(model.config, settings.tokens, settings.schedule or "", settings.llm_tokens)
    schedules = _schedules(settings, backend, model, budget)
    subject = Subject(
        model=model.name,
        note=model.note,
        **_visual_tokens(model.config, budget),
        selector=RANDOM if len(schedules) > 1 else schedules[0].selector,
        schedule=schedules[0].kind,
        backend=backend,
        precision=settings.precision or "fp32",
    )
    if backend == "torch":
        require("torch", extra="torch")
        return subject, _eager(model, schedules, budget, settings.threads)
    for schedule in schedules:
        check_fixed_shapes(schedule)
    require("onnx_ir", extra="export")
    require("onnxruntime", extra="cpu")
    return subject, _exported(settings, schedules, progress)


def _visual_tokens(config: LlavaConfig, budget: Budget) -> dict[str, Any]:
    patches = config.vision.patches * config.max_tiles
    return {"tokens": budget.asked(config), "llm_tokens": budget.llm_tokens, "patches": patches}


def _schedules(settings: EvalSettings, backend: str, model: Model, budget: Budget) -> list[Schedule]:
    vision, tokens = model.config.vision, budget.tokens
    name = settings.schedule or default_schedule(settings.selector, backend)
    seeded = settings.selector == RANDOM and tokens < vision.patches
    several = [f"{RANDOM}-{seed}" for seed in range(SEEDS)] if seeded else [settings.selector]
    return [make_schedule(name, vision, tokens, one, model.weights) for one in several]


def _loaded(name: str, engine: LlavaEngine) -> Answerers:
    yield name, EngineAnswerer(engine)


def _eager(model: Model, schedules: Sequence[Schedule], budget: Budget, threads: int | None) -> Answerers:
    from calib.tower import torch_threads
    from engines.evaluate_one_by_one import OneByOne
    from engines.evaluate_torch import Eager, TorchAnswerer

    alone = model.config.anyres or budget.llm_tokens is not None
    with torch_threads(threads):
        eager = Eager.load(model)
        for schedule in schedules:
            one = OneByOne(eager, schedule, budget.llm_tokens) if alone else TorchAnswerer(eager, schedule)
            yield schedule.selector, one


def _exported(settings: EvalSettings, schedules: Sequence[Schedule], progress: Progress) -> Answerers:
    for schedule in schedules:
        with tempfile.TemporaryDirectory(prefix="flowcut-") as directory:
            target = Path(directory) / "engine"
            build_directory(_build(settings, schedule, target), progress)
            yield schedule.selector, EngineAnswerer(load_engine(target, "ort", threads=settings.threads, exact=True))


def _build(settings: EvalSettings, schedule: Schedule, target: Path) -> BuildSettings:
    return BuildSettings(
        model=settings.target,
        tokens=settings.tokens,
        llm_tokens=settings.llm_tokens,
        schedule=settings.schedule or default_schedule(schedule.selector, "ort"),
        selector=schedule.selector,
        precision=settings.precision or "fp32",
        calibration=settings.calibration,
        backend="ort",
        max_batch=AT_ONCE,
        max_images=AT_ONCE,
        max_new_tokens=NEW_TOKENS,
        out=target,
    )
