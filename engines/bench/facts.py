"""What stands beside every speed-up: do pruned and unpruned agree, are they right, and where does the time go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import Progress

from engines.bench.agreement import encoder_kept, kept_agreement, logits_agreement
from engines.bench.settings import BenchSettings
from engines.evaluate import ask, make_pages
from engines.evaluate_score import overall
from engines.evaluate_target import EngineAnswerer
from engines.layer_profile import collect, forget_times
from engines.runtime.engine import LlavaEngine, load_engine
from flowcut.errors import FlowCutError
from flowcut.selector import selector_name
from flowcut.tiny.scenes import make_scene, render

PROFILED = 5
"""Runs of a profile, after one that does not count."""


def agreement(
    settings: BenchSettings, engines: Mapping[str, LlavaEngine], prompt: str, progress: Progress
) -> dict[str, Any]:
    """On the user's pictures and on drawn scenes, outside of what is timed.

    kept: the pruned engine's patches against those that adaptive keeps in PyTorch; baseline: what both say first.
    """
    pictures: list[Path | Image.Image] = [*settings.pictures]
    pictures += [render(make_scene("test", number)) for number in range(settings.compare)]
    own, other = engines["pruned"], engines.get("baseline")
    with _task(progress, "agreement: pruned", len(pictures)) as advance:
        ours = [advance(own.prefill(picture, prompt)) for picture in pictures]
    found: dict[str, Any] = {"kept": None, "kept_reason": "", "baseline": None}
    if other is not None:
        with _task(progress, "agreement: baseline", len(pictures)) as advance:
            theirs = [advance(other.prefill(picture, prompt)).logits for picture in pictures]
        first, second = (np.concatenate(each) for each in ([one.logits for one in ours], theirs))
        if first.shape == second.shape and np.isfinite(first).all() and np.isfinite(second).all():
            found["baseline"] = logits_agreement(first, second)
        elif first.shape == second.shape:
            found["baseline_reason"] = "logits that are not finite"
        else:  # a mismatch that was allowed
            found["baseline_reason"] = f"{first.shape[1]} tokens in one vocabulary, {second.shape[1]} in the other"
    with _task(progress, "agreement: adaptive, in PyTorch", None):
        try:
            kept = encoder_kept(own.model, own.reader, pictures)
            found["kept"] = kept_agreement(
                own.manifest, settings.checkpoint, own.reader, pictures, kept, settings.threads
            )
        except FlowCutError as error:
            if settings.checkpoint is not None:
                raise
            found["kept_reason"] = str(error)
    return found


def accuracy(settings: BenchSettings, engines: Mapping[str, LlavaEngine], progress: Progress) -> dict[str, Any] | None:
    """Right answers about llava-tiny's test scenes; None where none were asked for."""
    if not settings.scenes:
        return None
    pages, found = make_pages("test", settings.scenes), dict[str, Any]()
    for name in ("pruned", "baseline"):
        engine = engines.get(name)
        if engine is None:
            found[name] = None
            continue
        answers = ask(EngineAnswerer(engine), pages, selector_name(engine.manifest.schedule), progress)
        found[name] = overall(answers).to_dict()
    return {**found, "scenes": settings.scenes, "split": "test"}


def profiles(settings: BenchSettings, prompt: str, progress: Progress) -> dict[str, Any]:
    """By subject and graph, milliseconds a run of each kind of op, dearest first, from runs of their own."""
    found: dict[str, Any] = {}
    for name, directory in (("pruned", settings.directory), ("baseline", settings.baseline)):
        if directory is None:
            continue
        options = {"threads": settings.threads, "exact": settings.exact, "picture_cache_mb": 0, "concurrency": 1}
        with (
            load_engine(directory, settings.backend, profile=True, **options) as engine,
            _task(progress, f"profile {directory.name}", PROFILED + 1) as advance,
        ):
            advance(engine.prefill(settings.pictures[0], prompt))
            forget_times(engine.model)
            for _ in range(PROFILED):
                advance(engine.prefill(settings.pictures[0], prompt))
            found[name] = {
                graph: {
                    "total_ms": round(profile.total_ms / PROFILED, 3),
                    "ops": [[op.op, round(op.total_ms / PROFILED, 3)] for op in profile.ops],
                }
                for graph, profile in collect(engine.model).items()
            }
    return found


@contextmanager
def _task(progress: Progress, what: str, total: int | None) -> Iterator[Any]:
    """Yields a function that advances the bar and returns what it is given."""
    task = progress.add_task(what, total=total)
    progress.refresh()

    def advance(value: Any) -> Any:
        progress.advance(task)
        progress.refresh()
        return value

    try:
        yield advance
    finally:
        progress.remove_task(task)
