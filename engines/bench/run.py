"""`flowcut bench`: from settings to what was found."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from rich.progress import Progress

from engines.backends import Backend
from engines.bench.comparable import check_out, manifests
from engines.bench.counting import Counter, device_roof, graphs_of
from engines.bench.device import clocks, cores, describe, load, nvidia_smi, other_work, waiter
from engines.bench.facts import accuracy, agreement, profiles
from engines.bench.loaded import BASELINE, NO_GRAPHS, PRUNED, Loaded, about_engine, about_peer, open_all, step
from engines.bench.measure import Runs, measure
from engines.bench.peak import Peak, peak
from engines.bench.peers import check_peers
from engines.bench.records import Batch, Benchmark, Comparison, Measured, compare, spread_warnings
from engines.bench.settings import BenchSettings
from engines.bench.subjects import Output, Subject, Work
from engines.bench.timing import synchronised
from engines.bench.work import make_prompt, make_works
from engines.loading import choose_backend
from engines.sessions.ort_loading import on_cuda
from flowcut.artifacts import Manifest, timestamp
from flowcut.deps import require
from flowcut.preprocess import open_image

BUSY, ENOUGH = 0.1, 10
"""Cores that other processes take during the rounds, and rounds, beyond and below which there is a warning."""


def bench(settings: BenchSettings, progress: Progress) -> Benchmark:
    """Measure an engine directory beside its baseline and its peers, in turns, in this process.

    Raises:
        ConfigError: settings that do not fit the directories, or a baseline of something else.
        EngineError: directories that cannot be run here.
        InputError: a picture or question that cannot be used, or a prompt that is too long.
        FlowCutError: a library that is not installed.
    """
    own, other, differ = manifests(settings)
    check_out(settings)
    for picture in settings.pictures:
        open_image(picture)
    require("matplotlib", extra="plot")
    backend = choose_backend(own, settings.backend)
    gpu = backend != "ort" or on_cuda()
    settings = replace(settings, threads=settings.threads or cores())  # the same for all, whatever their own choice
    if settings.peers:
        check_peers(own, settings.checkpoint, "cuda" if gpu else "cpu")
    machine, before = describe(gpu, settings.threads), load()
    reading = synchronised(waiter(gpu))
    peaks = _peaks(settings, progress)
    with ExitStack() as stack:
        roof, roof_problem = device_roof(machine, graphs_of(own))
        loaded = open_all(settings, backend, gpu, stack, progress)
        engine = loaded.engines[PRUNED]
        prompt = make_prompt(engine.reader.tokenizer, engine.template, settings.question, settings.prompt_tokens)
        works = stack.enter_context(make_works(settings.pictures, prompt, settings.batches))
        with other_work() as others_cores:
            runs = [_timed(settings, loaded.subjects, work, reading, progress) for work in works]
        roof = None if roof is None else roof.again(graphs_of(own))
        counter = Counter(roof)
        measured = [
            _measured(subject, loaded, peaks, [found[i] for found in runs], works, counter, gpu)
            for i, subject in enumerate(loaded.subjects)
        ]
        agreed = agreement(settings, loaded.engines, prompt, progress)
        right = accuracy(settings, loaded.engines, progress)
        loaded.subjects.clear()
    pruned, others = measured[0], measured[1:]
    busy = None if not others_cores else round(others_cores[0], 3)
    warnings = [*_busy(busy), *_few(settings), *roof_problem, *counter.problems, *spread_warnings(measured)]
    return Benchmark(
        head=_head(settings, own, backend),
        pruned=pruned,
        baseline=others[0] if other is not None else None,
        peers=others[other is not None :],
        comparisons=_comparisons(measured),
        agreement=agreed,
        accuracy=right,
        mismatch=differ,
        warnings=warnings,
        machine={
            **machine,
            "load_before": before,
            "load_after": load(),
            "other_work_cores": busy,
            "clocks_mhz_after": clocks(),
            "gpu_after": nvidia_smi() or None if gpu else None,
            "roof": None if roof is None else roof.to_dict(),
        },
        settings=_told(settings, pruned, prompt),
        profile=profiles(settings, prompt, progress) if settings.profile else {},
    )


def _timed(
    settings: BenchSettings, subjects: Sequence[Subject], work: Work, reading: Any, progress: Progress
) -> list[Runs]:
    total = len(subjects) * (settings.warmup + settings.repeats)
    task = progress.add_task(f"batch {work.batch}: {len(subjects)} in turns", total=total)

    def advance() -> None:
        progress.advance(task)
        progress.refresh()  # between runs: nothing redraws within them

    try:
        steps = settings.new_tokens - 1
        return measure(subjects, work, steps, settings.warmup, settings.repeats, reading, advance)
    finally:
        progress.remove_task(task)


def _peaks(settings: BenchSettings, progress: Progress) -> Mapping[str, Peak]:
    """By subject. Before anything is loaded here: a machine may have room for one at a time."""
    if not settings.memory:
        return {}
    found = {}
    for name, directory in ((PRUNED, settings.directory), (BASELINE, settings.baseline)):
        if directory is not None:
            with step(progress, f"peak memory of {directory.name}"):
                found[name] = peak(directory, settings)
    return found


def _measured(
    subject: Subject,
    loaded: Loaded,
    peaks: Mapping[str, Peak],
    runs: Sequence[Runs],
    works: Sequence[Work],
    counter: Counter,
    gpu: bool,
) -> Measured:
    """A subject's rounds of all batch sizes, with what its graphs ask for."""
    engine, directory = loaded.engines.get(subject.name), loaded.directories.get(subject.name)
    batches = []
    for found, work in zip(runs, works, strict=True):
        output = _output(found)
        counted = {} if engine is None or directory is None else counter.count(engine, directory, work, output)
        visual, whole = max(output.visual_tokens), max(output.prompt_tokens)
        batches.append(Batch(work.batch, visual, whole - visual, whole, found.stages, found.device_ms, counted))
    first = _output(runs[0])
    if engine is None or directory is None:
        about = about_peer(loaded.engines[PRUNED], first, gpu)
    else:
        about = about_engine(engine, directory, peaks.get(subject.name))
    return Measured(subject.name, subject.title, about, batches, first.kept[0].tolist() if len(first.kept) else None)


def _output(runs: Runs) -> Output:
    assert runs.output is not None, "there is at least one round"
    return runs.output


def _head(settings: BenchSettings, manifest: Manifest, backend: Backend) -> dict[str, Any]:
    return {
        "command": command(settings),
        "created": timestamp(),
        "model": manifest.model,
        "note": manifest.note,
        "weights": manifest.weights,
        "backend": backend,
    }


def command(settings: BenchSettings) -> str:
    """What to type to measure the same again."""
    words = ["flowcut", "bench", str(settings.directory)]
    default = BenchSettings(settings.directory)
    options = {"batches": "--batch", "pictures": "--image", "memory": "--no-memory"}
    for name, value in vars(settings).items():
        if name == "directory" or value == getattr(default, name):
            continue
        words.append(options.get(name, f"--{name.replace('_', '-')}"))
        if name == "batches":
            words.append(",".join(map(str, value)))
        elif name == "pictures":
            words += map(str, value)
        elif not isinstance(value, bool):
            words.append(str(value))
    return shlex.join(words)


def _told(settings: BenchSettings, pruned: Measured, prompt: str) -> dict[str, Any]:
    """The settings as they were, paths as text."""
    told = {name: value for name, value in asdict(settings).items() if name not in ("out", "directory", "baseline")}
    told["batches"], told["pictures"] = list(settings.batches), [path.name for path in settings.pictures]
    return told | {"text_tokens": pruned.batches[0].text_tokens, "prompt": prompt}


def _comparisons(measured: Sequence[Measured]) -> list[Comparison]:
    """The first with all others; engines without CUDA graphs with one another alone."""
    bare = [each for each in measured if each.name.endswith(NO_GRAPHS)]
    pruned, *others = (each for each in measured if each not in bare)
    found = [each for one in others for each in compare(pruned, one)]
    return found + [each for one in bare[1:] for each in compare(bare[0], one)]


def _busy(others_cores: float | None) -> list[str]:
    if others_cores is None or others_cores <= BUSY:
        return []
    return [
        f"other processes took {others_cores:.2f} cores during the rounds: ratios are of turns and may stand, "
        "single times and shares of the roofline do not."
    ]


def _few(settings: BenchSettings) -> list[str]:
    if settings.repeats >= ENOUGH:
        return []
    rounds = f"{settings.repeats} round{'s' * (settings.repeats > 1)}"
    return [f"{rounds} only: medians, percentiles and intervals of fewer than {ENOUGH} say little."]
