"""What a benchmark times, opened: engine directories and peers, and what is told of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from engines.backends import Backend
from engines.bench.peak import Peak
from engines.bench.settings import BenchSettings
from engines.bench.subjects import EngineSubject, Output, Subject
from engines.report import LIBRARIES
from engines.runtime.engine import LlavaEngine, load_engine
from flowcut.config import QUANTIZED, Precision
from flowcut.selector import selector_name

PRUNED, BASELINE = "pruned", "baseline"
NO_GRAPHS = "no-cuda-graphs"


@dataclass
class Loaded:
    """What is timed. `engines` are those of engine directories, by subject."""

    subjects: list[Subject] = field(default_factory=list)
    engines: dict[str, LlavaEngine] = field(default_factory=dict)
    directories: dict[str, Path] = field(default_factory=dict)

    def add(self, name: str, directory: Path, engine: LlavaEngine, note: str = "") -> None:
        self.engines[name], self.directories[name] = engine, directory
        self.subjects.append(EngineSubject(name, title_of(engine) + note, engine))


def open_all(settings: BenchSettings, backend: Backend, gpu: bool, stack: ExitStack, progress: Progress) -> Loaded:
    """Pruned first, then its baseline, then all else."""
    loaded = Loaded()
    pairs = [(PRUNED, settings.directory), *([] if settings.baseline is None else [(BASELINE, settings.baseline)])]
    graphs = settings.cuda_graphs != "off"
    for name, directory in pairs:
        loaded.add(name, directory, _open(settings, directory, settings.backend, graphs, stack, progress))
    if backend != "ort" and settings.cuda_graphs == "both":
        for name, directory in pairs:
            engine = _open(settings, directory, settings.backend, False, stack, progress)
            loaded.add(f"{name}-{NO_GRAPHS}", directory, engine, ", without CUDA graphs")
    if settings.peers:
        if backend != "ort":
            for name, directory in pairs:
                loaded.add(f"ort-{name}", directory, _open(settings, directory, "ort", graphs, stack, progress))
        from engines.bench.peers import torch_peers

        engine = loaded.engines[PRUNED]
        device = "cuda" if gpu else "cpu"
        loaded.subjects += torch_peers(
            engine.manifest, settings.checkpoint, engine.reader, settings.threads, progress, device
        )
    return loaded


def _open(
    settings: BenchSettings, directory: Path, backend: str, graphs: bool, stack: ExitStack, progress: Progress
) -> LlavaEngine:
    with step(progress, f"load {directory.name}"):
        engine = load_engine(
            directory,
            backend,
            threads=settings.threads,
            exact=settings.exact,
            picture_cache_mb=0,  # every run is to see its pictures
            concurrency=1,
            cuda_graphs=graphs,
        )
    return stack.enter_context(engine)


def title_of(engine: LlavaEngine) -> str:
    """For people."""
    manifest, geometry = engine.manifest, engine.manifest.geometry
    patches, asked = geometry.vision.patches * geometry.max_tiles, manifest.budget.asked(geometry)
    kept = f"{asked} of {patches} patches" if asked < patches else f"all {patches} patches"
    dropped = None if geometry.anyres else manifest.llm_tokens
    behind = f", {dropped} in the decoder" if dropped is not None else ""
    own, eyes = manifest.precision, manifest.vision_precision
    return f"{kept}{behind}, {library_of(engine)}, {own}{f' (vision {eyes})' * (eyes != own)}"


def library_of(engine: LlavaEngine) -> str:
    """With the device where ONNX Runtime has a choice."""
    device = getattr(engine.model.vision, "device", None)
    return LIBRARIES[engine.backend] + (" on CUDA" if engine.backend == "ort" and device == "cuda" else "")


def about_engine(engine: LlavaEngine, directory: Path, found: Peak | None) -> dict[str, Any]:
    manifest = engine.manifest
    return {
        "kind": "engine",
        "directory": str(directory),
        "sha256": manifest.sha256,
        "model": manifest.model,
        "note": manifest.note,
        "weights": manifest.weights,
        "source_sha256": manifest.source_sha256,
        "backend": engine.backend,
        "built_for": manifest.backend,
        "precision": manifest.precision,
        "vision_precision": manifest.vision_precision,
        "decoder_layers": manifest.geometry.text.num_hidden_layers,
        "tokens": manifest.budget.asked(manifest.geometry),
        "patches": manifest.geometry.vision.patches * manifest.geometry.max_tiles,
        "llm_tokens": manifest.llm_tokens,
        "schedule": manifest.schedule["kind"],
        "selector": selector_name(manifest.schedule),
        "counts": list(manifest.schedule["counts"]),
        "cuda_graphs": None if engine.backend == "ort" else engine.options.cuda_graphs,
        "peak_memory_bytes": None if found is None else found.process,
        "device_memory_bytes": None if found is None else found.device,
    }


def _computes_in(precision: Precision) -> str:
    """What a graph whose weights are kept in `precision` multiplies in."""
    return precision if precision not in QUANTIZED else "fp16"


def about_peer(engine: LlavaEngine, output: Output, gpu: bool) -> dict[str, Any]:
    """PyTorch, with the checkpoint that `engine` was built from; on a CPU it computes in float32, on a GPU in the types
    that the engine's graphs compute in."""
    about = about_engine(engine, Path(), None)
    same = ("model", "note", "weights", "source_sha256", "decoder_layers", "patches")
    return {
        "kind": "peer",
        "directory": None,
        **{name: about[name] for name in same},
        "backend": "torch",
        "precision": _computes_in(engine.manifest.precision) if gpu else "fp32",
        "tokens": min(max(output.visual_tokens), about["patches"]),  # LLaVA-NeXT's newlines are tokens, not patches
        "peak_memory_bytes": None,
        "device_memory_bytes": None,
    }


@contextmanager
def step(progress: Progress, what: str) -> Iterator[None]:
    """Something of unknown length on the progress bar."""
    task = progress.add_task(what, total=None)
    progress.refresh()
    try:
        yield
    finally:
        progress.remove_task(task)
