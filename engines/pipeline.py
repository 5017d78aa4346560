"""From a model to a published engine directory: resolve, export, compile, describe."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from engines.backends import Backend, built_for, check_build, resolve_backend, trt_module
from engines.build import BuildReport, build_engine
from engines.numerics import (
    CALIBRATION,
    Numerics,
    build_targets,
    check_precision,
    choose_numerics,
    warn_of_memory,
    weight_bytes,
)
from engines.rebuild import build_command, source
from flowcut.aliases import Model, resolve
from flowcut.anyres import image_slots
from flowcut.artifacts import (
    Manifest,
    check_replaceable,
    installed_versions,
    publish,
    read_manifest,
    timestamp,
    write_manifest,
)
from flowcut.atomic import check_space, remove_leftovers
from flowcut.budget import Budget, make_budget
from flowcut.chat import FILE, ChatTemplate, make_template, read_template
from flowcut.config import LlavaConfig, Precision
from flowcut.contract import GraphContract, Limits, language_contracts, vision_contract
from flowcut.deps import require
from flowcut.errors import ConfigError, FlowCutError
from flowcut.preprocess import ImageSettings
from flowcut.prompt import Tokenizer
from flowcut.schedule import Schedule, check_fixed_shapes, make_schedule
from flowcut.selector import FLOWCUT, selector_note

if TYPE_CHECKING:
    import onnx_ir as ir

LOG = logging.getLogger("flowcut.engines")
Check = Callable[[Tokenizer, ChatTemplate, LlavaConfig, Budget, Limits], None]
"""Takes the model's tokenizer, chat template and geometry, the visual tokens kept and the engine's limits."""
TEXT_TOKENS = 192
"""Room for a prompt's text where --max-prompt does not say otherwise."""
CODE_BYTES, SETTINGS_BYTES = 100 << 20, 5 << 20
"""Disk for what the engines hold beside their weights, and for all that is neither weights nor engine."""


@dataclass(frozen=True)
class BuildSettings:
    """What to build. None takes the default: 11.1% of the patches (of LLaVA-NeXT's 5.6%), room for 192 text tokens
    beside one picture.

    Attributes:
        tokens: visual tokens kept per picture, an int or "all"; of LLaVA-NeXT half as many of each tile.
        llm_tokens: of these, kept inside the language model after its second layer; None: all. Not for LLaVA-NeXT,
            where `tokens` says it.
        schedule: "static", "masked" or the name of a schedule .json file.
        selector: what chooses the patches; None: what the schedule file says, else "flowcut".
        precision: of the decoder; vision_precision: None takes engines.numerics' default.
        calibration: a file of `flowcut calibrate quantize`, "none", or None for the checkpoint's own if it has one.
        stages: graphs, of consecutive layers, that the decoder is split into.
        out: the directory to make; None: `out_root`/<model>-<tokens>-<selector>-<precision>-<backend>, without the
            selector where that is "flowcut".
    """

    model: str
    random: bool = False
    seed: int = 0
    tokens: int | str | None = None
    llm_tokens: int | None = None
    schedule: str = "static"
    selector: str | None = None
    precision: Precision = "fp16"
    vision_precision: Precision | None = None
    calibration: str | None = None
    stages: int = 1
    backend: str = "auto"
    decoder_layers: int | None = None
    max_batch: int = 4
    max_images: int = 4
    max_prompt: int | None = None
    max_new_tokens: int = 128
    compute_capabilities: tuple[str, ...] = ()
    out: Path | None = None
    out_root: Path = Path("build")


@dataclass(frozen=True)
class Built:
    """A published directory and what making it took. `reports` is empty for backend ort; `replaced` says what stood
    there before, if that was a build of something else."""

    directory: Path
    manifest: Manifest
    reports: Mapping[str, BuildReport] = field(default_factory=dict)
    replaced: str = ""


def build_directory(settings: BuildSettings, progress: Progress, check: Check | None = None) -> Built:
    """Export both graphs, compile them unless the backend is ort, and publish the directory, whole or not at all.

    Args:
        check: called before anything is exported, to raise if what is to be asked would not fit.

    Raises:
        ConfigError, CheckpointError: a setting or checkpoint that does not fit.
        EngineError: the compiler, the disk or the target directory.
    """
    remove_leftovers(settings.out or settings.out_root / "any")  # first, as it may bring back what stood there
    backend = resolve_backend(settings.backend)
    check_build(backend, settings.compute_capabilities)
    precisions = {settings.precision, settings.vision_precision or settings.precision}
    check_precision(backend, precisions, settings.compute_capabilities)
    require("onnx_ir", extra="export")
    model = resolve(settings.model, random=settings.random, decoder_layers=settings.decoder_layers, seed=settings.seed)
    config = model.config
    budget = make_budget(config, settings.tokens, settings.schedule, settings.llm_tokens)
    schedule = make_schedule(settings.schedule, config.vision, budget.tokens, settings.selector, model.weights)
    check_fixed_shapes(schedule)
    numerics, calibration = choose_numerics(
        model, backend, settings.precision, settings.vision_precision, settings.stages, settings.calibration
    )
    limits = _limits(settings, config.text.max_position_embeddings, image_slots(config, budget.tokens))
    contracts = graph_contracts(config, budget, numerics, limits)
    tokenizer = Tokenizer.from_file(model.tokenizer, config.image_token_id, config.text.vocab_size)
    template = read_template(model.files)
    if check is not None:
        check(tokenizer, make_template(template, tokenizer, config), config, budget, limits)
    image_settings = ImageSettings.from_directory(model.files, config.vision.image_size, config.grid_pinpoints)
    name = _directory_name(model.name, budget.label(config), schedule.selector, settings.precision, backend)
    target = settings.out or settings.out_root / name
    check_replaceable(target)
    needed = weight_bytes(config, numerics)
    check_space(target, needed + SETTINGS_BYTES + (0 if backend == "ort" else needed + CODE_BYTES))
    if backend != "ort":
        warn_of_memory(config, numerics)
    targets = build_targets(backend, {numerics.precision, numerics.vision}, settings.compute_capabilities)

    replaced = _standing(target)
    seconds: dict[str, float] = {}
    with publish(target) as directory:
        export_graphs(model, schedule, budget, numerics, contracts, directory, seconds, progress)
        reports = {}
        if backend != "ort":
            reports = _compile(directory, contracts, backend, targets, seconds, progress)
        shutil.copyfile(model.tokenizer, directory / "tokenizer.json")
        if calibration is not None:
            shutil.copyfile(calibration, directory / CALIBRATION)
        _write_json(directory / "preprocessor.json", image_settings.to_dict())
        if template is not None:
            (directory / FILE).write_text(template, encoding="utf-8")
        manifest = write_manifest(
            directory, _manifest(settings, model, schedule, budget, numerics, limits, targets, seconds)
        )
    return Built(target, manifest, reports, "" if replaced == _summary(manifest) else replaced)


def _directory_name(model: str, tokens: str, selector: str, precision: str, backend: str) -> str:
    chosen = [] if selector == FLOWCUT else [selector]
    return "-".join([model, tokens, *chosen, precision, backend])


def _standing(target: Path) -> str:
    """What is at `target` now, in words; empty for nothing readable."""
    try:
        return _summary(read_manifest(target))
    except FlowCutError:
        return ""


def _summary(manifest: Manifest) -> str:
    """What tells apart builds that share a directory's name."""
    layers = manifest.geometry.text.num_hidden_layers
    weights = manifest.note or f"checkpoint {manifest.source_sha256[:8]}"
    chosen = selector_note(manifest.schedule)
    rest = [f"{manifest.stages} stages"] * (manifest.stages > 1)
    rest += [f"vision {manifest.vision_precision}"] * (manifest.vision_precision != manifest.precision)
    rest += ["calibrated"] * bool(manifest.calibration)
    return ", ".join([f"{weights}, schedule {manifest.schedule['kind']}{chosen}", f"{layers} decoder layers", *rest])


def graph_contracts(
    config: LlavaConfig, budget: Budget, numerics: Numerics, limits: Limits
) -> tuple[GraphContract, ...]:
    """Of vision, and of the decoder's stages.

    Raises:
        ConfigError: more stages than can be.
    """
    own, tokens = numerics.precision, budget.tokens
    vision = vision_contract(config, tokens, numerics.vision, limits, own)
    return vision, *language_contracts(config, tokens, own, limits, numerics.stages, budget.llm_tokens)


def export_graphs(
    model: Model,
    schedule: Schedule,
    budget: Budget,
    numerics: Numerics,
    contracts: Sequence[GraphContract],
    directory: Path,
    seconds: dict[str, float],
    progress: Progress,
) -> None:
    """Write vision.onnx and the decoder's graphs with their weights."""
    from export.language import language_model
    from export.vision import vision_model

    own, eyes, (vision, *stages) = numerics.precision, numerics.vision, contracts
    weights = numerics.weights(model.weights)
    with _timed(seconds, "export"):
        metadata = graph_metadata(model, schedule, eyes, budget.llm_tokens)
        tower = vision_model(weights, vision, schedule, eyes, metadata, ranges=numerics.ranges)
        save_graph(tower, directory / "vision.onnx", progress)
        metadata = graph_metadata(model, schedule, own, budget.llm_tokens)
        for stage in stages:
            decoder = language_model(weights, stage, own, metadata, numerics.ranges)
            save_graph(decoder, directory / f"{stage.name}.onnx", progress)


def graph_metadata(model: Model, schedule: Schedule, precision: str, llm_tokens: int | None = None) -> dict[str, str]:
    """What each ONNX file says of itself."""
    return {
        "flowcut.model": model.name,
        "flowcut.note": model.note,
        "flowcut.source_sha256": model.weights.sha256,
        "flowcut.tokens": str(schedule.tokens),
        "flowcut.schedule": json.dumps(schedule.to_dict(), sort_keys=True),
        "flowcut.precision": precision,
    } | ({} if llm_tokens is None else {"flowcut.llm_tokens": str(llm_tokens)})


def save_graph(graph: ir.Model, path: Path, progress: Progress) -> None:
    """Write one graph, showing which tensor is being written."""
    from export.builder import save

    LOG.info("%s: export", path.stem)
    task, written = progress.add_task(f"{path.stem}: export", total=None), count(1)
    try:
        save(graph, path, lambda _, __, total: progress.update(task, completed=next(written), total=total))
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        progress.remove_task(task)


def _explained(error: OSError, path: Path) -> OSError:
    """numpy's tofile tells how much it wrote, not why it stopped. A full disk shows; a limit on file sizes does not."""
    if error.errno is None and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return error


def _compile(
    directory: Path,
    contracts: Sequence[GraphContract],
    backend: Backend,
    compute_capabilities: tuple[str, ...],
    seconds: dict[str, float],
    progress: Progress,
) -> dict[str, BuildReport]:
    reports = {}
    for contract in contracts:
        onnx_path, engine_path = (directory / f"{contract.name}.{suffix}" for suffix in ("onnx", "engine"))
        with _timed(seconds, f"compile {contract.name}"):
            report = build_engine(onnx_path, engine_path, contract, backend, compute_capabilities, progress)
        reports[contract.name] = report
    return reports


def _limits(settings: BuildSettings, positions: int, tokens: int) -> Limits:
    """`positions` are all that the decoder has (max_position_embeddings), `tokens` the most of one picture."""
    answer = settings.max_new_tokens
    least, most = tokens + 1, positions - answer
    if answer >= 1 and most < least:
        raise ConfigError(
            f"max_new_tokens must be in 1..{positions - least} ({positions} positions less one picture's {tokens} "
            f"tokens and one of text), got {answer}. Lower --max-new-tokens or --tokens."
        )
    prompt = min(tokens + TEXT_TOKENS, most) if settings.max_prompt is None else settings.max_prompt
    if answer >= 1 and not least <= prompt <= most:
        raise ConfigError(
            f"max_prompt must be in {least}..{most} (one picture's tokens and one of text; {positions} positions less "
            f"max_new_tokens), got {prompt}. Choose another --max-prompt, or lower --tokens or --max-new-tokens."
        )
    return Limits(settings.max_batch, settings.max_images, prompt, answer)


def _versions(backend: Backend) -> dict[str, str]:
    """Installed distributions and, whatever its distribution is called, the library that compiled."""
    if backend == "ort":
        return installed_versions()
    library = trt_module(backend)
    return installed_versions() | {library.__name__: str(library.__version__)}


def _manifest(
    settings: BuildSettings,
    model: Model,
    schedule: Schedule,
    budget: Budget,
    numerics: Numerics,
    limits: Limits,
    targets: Sequence[str],
    seconds: dict[str, float],
) -> Manifest:
    backend = resolve_backend(settings.backend)
    return Manifest(
        model=model.name,
        source=source(settings.model),
        weights="random" if model.weights.random else "checkpoint",
        note=model.note,
        source_sha256=model.weights.sha256,
        geometry=model.config,
        tokens=budget.tokens,
        llm_tokens=budget.llm_tokens,
        schedule=schedule.to_dict(),
        precision=numerics.precision,
        vision_precision=numerics.vision,
        stages=numerics.stages,
        calibration=numerics.record(),
        backend=backend,
        limits=limits,
        versions=_versions(backend),
        compute_capabilities=built_for(backend, targets),
        created=timestamp(),
        command=build_command(settings, backend),
        seed=settings.seed if model.weights.random else 0,
        build_seconds={name: round(value, 2) for name, value in seconds.items()},
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
