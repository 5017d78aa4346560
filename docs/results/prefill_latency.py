"""How much faster a pruned prefill is, against how much it could be: writes prefill_latency.json, .md and .svg.

    python docs/results/prefill_latency.py                    # needs .[peers,export,cpu,plot]; an idle machine, an hour
    python docs/results/prefill_latency.py --part language    # 64, 128 and 192 of 576 tokens, in one run
    python docs/results/prefill_latency.py --part vision      # the tower, by schedule
    python docs/results/prefill_latency.py --part tiny        # llava-tiny, whose weights are trained
    python docs/results/prefill_latency.py --part peers       # transformers, eager PyTorch, ONNX Runtime

All but "tiny" have LLaVA-1.5-7B's geometry and seeded-random weights, float32: the whole tower and the first decoder
layers, as many as memory allows (up to 16 GB of it, and as much disk, while the script runs). Each part runs in a
process of its own and replaces its own section of the .json; the .md is written from all that is there. The pictures
and the page of the part "peers" are left in build/prefill-latency-peers.bench.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from prefill_latency_page import page
from rich.progress import Progress

from calib.schedule import ScheduleSettings, calibrate_schedule
from engines.bench.agreement import encoder_kept, kept_agreement
from engines.bench.counting import Counter, device_roof, graphs_of
from engines.bench.device import describe, load, other_work, waiter
from engines.bench.facts import profiles
from engines.bench.loaded import Loaded
from engines.bench.measure import Runs, measure
from engines.bench.records import Batch, Measured, compare, spread_warnings
from engines.bench.settings import BenchSettings
from engines.bench.subjects import Work
from engines.bench.timing import synchronised
from engines.bench.work import make_prompt, make_works
from engines.pipeline import BuildSettings, build_directory
from engines.plan.run import PlanSettings, plan
from engines.runtime.engine import load_engine
from engines.runtime.memory import process_bytes
from flowcut.arguments_run import QUESTION, SCENE
from flowcut.artifacts import read_manifest, timestamp
from flowcut.atomic import write_file
from flowcut.prompt import question_prompt
from flowcut.tiny.scenes import make_scene, render

Section = dict[str, Any]
HERE = Path(__file__)
ROOT, PATH = HERE.parents[2], HERE.with_suffix(".json")
PEERS = ROOT / "build" / "prefill-latency-peers.bench"
WIDE, TINY = "llava-1.5-7b", "llava-tiny"
TEXT_TOKENS, WARMUP = 52, 2
PICTURES = 8
"""Drawn scenes for agreement."""
DRAWN = {WIDE: 8, TINY: 80}
"""Drawn scenes for `flowcut calibrate schedule`, half of them held out: the seeded tower takes seconds for one."""
CALIBRATED = {"calibrated median": "median", "calibrated flops=0.7": "flops=0.7"}
CLOSED = "closed form"
QUIET = Progress(disable=True)


class Kind(NamedTuple):
    """Engines to build. `layers` of the decoder, None for all."""

    model: str
    layers: int | None
    precision: str = "fp32"


def language(threads: int, quick: bool) -> Section:
    """64, 128 and 192 tokens and all of them, in the same rounds; then int4, two of them."""
    rows = {}
    for name, kind, budgets, repeats in (
        ("fp32", Kind(WIDE, 2), (64, 128, 192), 15),
        ("int4", Kind(WIDE, 2, "int4"), (64,), 10),
    ):
        if quick:
            kind, budgets, repeats = Kind(TINY, None, name), (16,), 2
        with engines(kind, {str(tokens): {"tokens": tokens} for tokens in ("all", *budgets)}) as built:
            rows[name] = timed(built, repeats, threads)
        if len(rows) > 1:
            del rows[name]["peak_memory_bytes"]  # a process's peak is that of the first
        rows[name] |= {"layers": kind.layers, "precision": kind.precision, "whole": whole_decoder(kind, budgets)}
    return rows


def whole_decoder(kind: Kind, budgets: Sequence[int]) -> Section | None:
    """How many times the operations of a prefill the whole decoder has, by budget; None where all of it ran."""
    if kind.layers is None:
        return None
    asked = {
        "random": True,
        "tokens": budgets,
        "precision": kind.precision,
        "text_tokens": TEXT_TOKENS,
        "gpu": ("H100",),
    }
    few, every = (
        plan(PlanSettings(kind.model, **asked, decoder_layers=layers), QUIET).rows for layers in (kind.layers, None)
    )
    names = ["all", *map(str, budgets)]
    times = [y.costs["prefill"].flops / x.costs["prefill"].flops for x, y in zip(few, every, strict=True)]
    return dict(zip(names, times, strict=True))


def vision(threads: int, quick: bool) -> Section:
    """The unpruned tower and three schedules for 64 of its tokens, in the same rounds."""
    kind, tokens, repeats = Kind(WIDE, 1), 64, 20
    if quick:
        kind, tokens, repeats = Kind(TINY, None), 16, 2
    return by_schedule(kind, tokens, repeats, threads)


def tiny(threads: int, quick: bool) -> Section:
    """The same of a trained tower, which is small: on one thread, as more would only wait for each other."""
    del threads
    return by_schedule(Kind(TINY, None), 16, 2 if quick else 60, 1)


def by_schedule(kind: Kind, tokens: int, repeats: int, threads: int) -> Section:
    """Speed and agreement with adaptive of each schedule that one would use."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefill-latency-")))
        pictures = drawn(folder / "pictures", "val", DRAWN[kind.model])
        schedules, chosen = {CLOSED: "static"}, dict[str, Any]()
        for name, choose in CALIBRATED.items():
            chosen[name] = calibrated(kind, tokens, choose, pictures, folder / f"{choose}.json")
            schedules[name] = str(folder / f"{choose}.json")
        options = {"all": {"tokens": "all"}} | {
            name: {"tokens": tokens, "schedule": schedule} for name, schedule in schedules.items()
        }
        built = stack.enter_context(engines(kind, options))
        found = timed(built, repeats, threads)
        agreed = {name: agreement(built[name], threads) for name in schedules}
        if kind.model == TINY:  # where time does not follow the operations, the profile says why
            settings = BenchSettings(built[CLOSED], built["all"], threads=threads)
            found["profile"] = profiles(settings, question_prompt(QUESTION), QUIET)
    return found | {"model": kind.model, "layers": kind.layers, "tokens": tokens, "agreement": agreed, "chosen": chosen}


def calibrated(kind: Kind, tokens: int, choose: str, pictures: Path, out: Path) -> Section:
    """As `flowcut calibrate schedule` does it; half of the pictures are held out."""
    random = kind.model != TINY
    settings = ScheduleSettings(kind.model, pictures, out, random=random, tokens=tokens, choose=choose)
    told = calibrate_schedule(settings, QUIET).to_dict()
    return {name: told[name] for name in ("counts", "pictures", "agreement", "flops_share")}


def agreement(directory: Path, threads: int) -> Section:
    """Kept patches against adaptive's, on scenes that no schedule was chosen on."""
    with load_engine(directory, "ort", threads=threads, picture_cache_mb=0) as engine:
        pictures = [render(make_scene("test", number)) for number in range(PICTURES)]
        kept = encoder_kept(engine.model, engine.reader, pictures)
        return kept_agreement(engine.manifest, None, engine.reader, pictures, kept, threads)


def peers(threads: int, quick: bool) -> Section:
    """`flowcut bench --peers`, a process of its own."""
    kind, tokens, repeats = (Kind(TINY, None), 16, 2) if quick else (Kind(WIDE, 2), 64, 12)
    out = PEERS.with_name(f"quick-{PEERS.name}") if quick else PEERS
    out.parent.mkdir(exist_ok=True)
    with engines(kind, {"all": {"tokens": "all"}, "pruned": {"tokens": tokens}}) as built:
        options = {"--repeats": repeats, "--warmup": WARMUP, "--prompt-tokens": TEXT_TOKENS, "--new-tokens": 8}
        options |= {"--threads": threads, "--compare": 4, "--out": out}
        words = ["flowcut", "bench", built["pruned"], "--baseline", built["all"], "--peers", "--profile"]
        words += [each for option in options.items() for each in option]
        done = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"flowcut bench failed: {done.stderr.strip()}")
    found: Section = json.loads(done.stdout.splitlines()[-1])
    del found["settings"]["prompt"]
    return found | {"layers": kind.layers}


@contextmanager
def engines(kind: Kind, options: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Path]]:
    """Engine directories for ONNX Runtime, by name, for as long as the context lasts."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prefill-latency-", dir=ROOT / "build") as folder:
        base = BuildSettings(
            kind.model,
            random=kind.model != TINY,
            precision=kind.precision,  # type: ignore[arg-type]
            backend="ort",
            decoder_layers=kind.layers,
            max_batch=1,
            max_images=1,
            max_new_tokens=16,
        )
        built = {}
        for name, given in options.items():
            out = Path(folder) / name.replace("=", "-").replace(" ", "-")
            built[name] = build_directory(replace(base, out=out, **given), QUIET).directory
        yield built


def timed(built: Mapping[str, Path], repeats: int, threads: int) -> Section:
    """Prefills of all engines in turns, and how many times faster each is than "all"."""
    machine, before = describe(on_gpu=False, threads=threads), load()
    graphs = graphs_of(read_manifest(built["all"]))
    roof, _ = device_roof(machine, graphs)
    assert roof is not None, "onnx and onnxruntime are installed"
    loaded = Loaded()
    with ExitStack() as stack:
        for name, directory in built.items():
            engine = load_engine(directory, "ort", threads=threads, picture_cache_mb=0, concurrency=1)
            loaded.add(name, directory, stack.enter_context(engine))
        engine = loaded.engines["all"]
        prompt = make_prompt(engine.reader.tokenizer, engine.template, QUESTION, TEXT_TOKENS)
        (work,) = stack.enter_context(make_works([SCENE], prompt, [1]))
        reading = synchronised(waiter(on_gpu=False))
        with other_work() as others:
            runs = measure(loaded.subjects, work, 0, WARMUP, repeats, reading, lambda: None)
        roof = roof.again(graphs)
        counter = Counter(roof)
        measured = [subject(loaded, i, each, work, counter) for i, each in enumerate(runs)]
    whole, pruned = measured[0], measured[1:]
    return {
        "created": timestamp(),
        "machine": {**machine, "load_before": before, "other_work_cores": round(others[0], 3), "roof": roof.to_dict()},
        "text_tokens": TEXT_TOKENS,
        "subjects": {each.name: each.to_dict() for each in measured},
        "comparisons": {each.name: compare(each, whole)[0].to_dict() for each in pruned},
        "warnings": spread_warnings(measured),
        "peak_memory_bytes": process_bytes()[1],
    }


def subject(loaded: Loaded, index: int, runs: Runs, work: Work, counter: Counter) -> Measured:
    one, output = loaded.subjects[index], runs.output
    assert output is not None, "there is at least one round"
    engine = loaded.engines[one.name]
    manifest = engine.manifest
    counted = counter.count(engine, loaded.directories[one.name], work, output)
    visual, prompt = output.visual_tokens[0], output.prompt_tokens[0]
    batch = Batch(1, visual, prompt - visual, prompt, runs.stages, runs.device_ms, counted)
    about = {"counts": list(manifest.schedule["counts"]), "note": manifest.note, "tokens": manifest.tokens}
    return Measured(one.name, one.title, about, [batch])


def drawn(folder: Path, split: Any, count: int) -> Path:
    """A directory of llava-tiny's scenes."""
    folder.mkdir()
    for number in range(count):
        render(make_scene(split, number)).save(folder / f"{number:03}.png")
    return folder


PARTS: dict[str, Callable[[int, bool], Section]] = {
    "language": language,
    "vision": vision,
    "tiny": tiny,
    "peers": peers,
}


def in_process(name: str, threads: int, quick: bool) -> Section:
    """A part's section, from a process that has done nothing else."""
    options = ["--inside", "--part", name, "--threads", str(threads), *["--quick"] * quick]
    done = subprocess.run([sys.executable, __file__, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: Section = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help=f"of the CPU (default: {cores})")
    parser.add_argument("--quick", action="store_true", help="the same path on llava-tiny, in a minute; writes nothing")
    parser.add_argument("--inside", action="store_true", help="measure in this process and print the section")
    given = parser.parse_args(arguments)
    if given.threads < 1:
        parser.error(f"--threads must be at least 1, got {given.threads}.")
    names = list(PARTS) if given.part == "all" else [given.part]
    if given.inside:
        print(json.dumps(PARTS[names[0]](given.threads, given.quick)))
        return
    data = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
    for name in names:
        print(f"{name}: measuring", flush=True)
        data[name] = in_process(name, given.threads, given.quick)
        if name == "peers" and not given.quick:
            write_file(PATH.with_suffix(".svg"), (PEERS / "bench.svg").read_bytes())
        if not given.quick:
            write_file(PATH, (json.dumps(data, indent=1) + "\n").encode())
    text = page(data)
    if not given.quick:
        write_file(PATH.with_suffix(".md"), text.encode())


if __name__ == "__main__":
    main()
