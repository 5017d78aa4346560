"""What the Python runtime adds to ONNX Runtime's own time, and how it starts: writes runtime_overhead.json and .md.

    python docs/results/runtime_overhead.py                    # needs .[export,cpu]; an idle machine, 15 minutes
    python docs/results/runtime_overhead.py --part overhead    # outside session.run: of prefill, and of a decode step
    python docs/results/runtime_overhead.py --part positions   # a decode step's time by its place in the cache
    python docs/results/runtime_overhead.py --part memory      # what the process has in memory over 2,000 steps
    python docs/results/runtime_overhead.py --part start       # flowcut --help and load_engine, a process each

The wide engine is CLIP-L with the first 2 layers of the 7B decoder, seeded-random weights, float32: 4 GB on the disk
while the script runs, and as much memory. Each part replaces its own section of the .json; the .md is written from all
that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from full_size import machine
from PIL import Image
from rich.progress import Progress
from runtime_overhead_page import page
from runtime_overhead_watch import Call, clocked, endless, watched

from engines.pipeline import BuildSettings, build_directory
from engines.runtime.clock import Clock
from engines.runtime.control import Control
from engines.runtime.engine import LlavaEngine, Sampling, load_engine
from engines.runtime.memory import cache_bytes, process_bytes
from flowcut.atomic import write_file
from flowcut.cli import SCENE
from flowcut.prompt import question_prompt

Section = dict[str, Any]
ROOT = Path(__file__).parent.parent.parent
PATH = Path(__file__).with_suffix(".json")
QUESTION = "What color is the circle?"
REPEATS, ROUNDS, STEPS, PROCESSES = 12, 40, 2000, 20
FIRST, LAST, BIN = 64, 1024, 64
LONG = {"max_batch": 1, "max_images": 1, "max_prompt": 128, "max_new_tokens": STEPS + 1}


class Kind(NamedTuple):
    """An engine to measure. `threads`: None for those of the command line."""

    model: str
    decoder_layers: int | None
    title: str
    threads: int | None = None


TINY = Kind("llava-tiny", None, "llava-tiny", threads=1)  # more would only wait for each other
WIDE = Kind("llava-1.5-7b", 2, "CLIP-L and 2 layers of 7B width")
PHOTOGRAPHS = {"photograph.jpg": (640, 480), "telephone.jpg": (4032, 3024)}


@contextmanager
def built(kind: Kind, limits: Mapping[str, int]) -> Iterator[Path]:
    """An engine directory of random weights, which answer at length."""
    parent = ROOT / "build"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="runtime-overhead-", dir=parent) as folder:
        settings = BuildSettings(
            kind.model,
            random=True,
            precision="fp32",
            backend="ort",
            decoder_layers=kind.decoder_layers,
            out=Path(folder) / "engine",
            **limits,  # type: ignore[arg-type]
        )
        yield build_directory(settings, Progress(disable=True)).directory


# --- overhead: outside session.run ---


def overhead(directory: Path, threads: int, repeats: int = REPEATS, new_tokens: int = 65) -> Section:
    """Of prefill by picture, of a decode step, and of a second question about a picture."""
    engine = endless(directory, threads, picture_cache_mb=0)
    with tempfile.TemporaryDirectory() as folder:
        made = [photograph(Path(folder) / name, size) for name, size in PHOTOGRAPHS.items()]
        rows = [prefills(engine, picture, repeats) for picture in (SCENE, *made)]
        steps = decode_steps(engine, SCENE, repeats, new_tokens)
        second = second_question(directory, threads, made[0], repeats)
    return {"prefill": rows, "decode": steps, "second_question": second}


def photograph(path: Path, size: tuple[int, int]) -> Path:
    """A JPEG of smooth colours."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def prefills(engine: LlavaEngine, picture: Path, repeats: int) -> Section:
    """Milliseconds of whole calls of `prefill`, within ONNX Runtime, and of each part beside that."""
    prompt, rows = question_prompt(QUESTION), list[dict[str, float]]()
    with watched(engine) as calls, clocked() as spent:
        for number in range(-2, repeats):
            calls.clear()
            spent.clear()
            start = perf_counter()
            engine.prefill(picture, prompt)
            total = perf_counter() - start
            inside = sum(call.inside for call in calls)
            bind = sum(call.seconds for call in calls) - inside
            rest = total - inside - bind - sum(spent.values())
            row = {"total": total, "inside": inside, "outside": total - inside, **spent, "bind": bind, "rest": rest}
            if number >= 0:
                rows.append({name: seconds * 1e3 for name, seconds in row.items()})
    with Image.open(picture) as image:
        size = list(image.size)
    share = summary([row["outside"] / row["total"] for row in rows])
    parts = {name: summary([row[name] for row in rows]) for name in rows[0]}
    return {"picture": picture.name, "size": size, "file_bytes": picture.stat().st_size, "share": share, "ms": parts}


def decode_steps(engine: LlavaEngine, picture: Path, repeats: int, new_tokens: int) -> Section:
    """Milliseconds per step of whole answers: all, within ONNX Runtime, in Session.run beside that, and the rest."""
    rows, prompt = list[dict[str, float]](), question_prompt(QUESTION)
    with watched(engine) as calls:
        for number in range(-1, max(3, repeats // 3)):
            calls.clear()
            answer = engine.generate(picture, prompt, Sampling(new_tokens))
            steps = [call for call in calls if call.position is not None]
            if number < 0 or not steps:
                continue
            per_step = {
                "total": answer.latency_ms["decode_per_token"],
                "inside": sum(call.inside for call in steps) * 1e3 / len(steps),
                "bind": sum(call.seconds - call.inside for call in steps) * 1e3 / len(steps),
            }
            per_step["outside"] = per_step["total"] - per_step["inside"]
            per_step["rest"] = per_step["outside"] - per_step["bind"]
            rows.append(per_step)
    return {"steps": len(steps), "answers": len(rows), "ms": {k: summary([row[k] for row in rows]) for k in rows[0]}}


def second_question(directory: Path, threads: int, picture: Path, repeats: int) -> Section:
    """Milliseconds of `prefill` with vision and without, in turn. Both engines share their sessions."""
    fresh = load_engine(directory, "ort", threads=threads, picture_cache_mb=0)
    known = load_engine(directory, "ort", threads=threads)
    prompt, times = question_prompt(QUESTION), {"with_vision": list[float](), "without_vision": list[float]()}
    for number in range(-1, repeats):
        for name, engine in (("with_vision", fresh), ("without_vision", known)):
            with watched(engine) as calls:
                start = perf_counter()
                engine.prefill(picture, prompt)
                ms = (perf_counter() - start) * 1e3
            if number >= 0:
                if any(call.graph == "vision" for call in calls) != (name == "with_vision"):
                    raise SystemExit(f"vision must run exactly where it is counted, got {calls} {name}.")
                times[name].append(ms)
    return {name: summary(values) for name, values in times.items()}


# --- positions: a decode step by its place in the cache ---


def positions(directory: Path, threads: int, rounds: int = ROUNDS, last: int = LAST) -> Section:
    """Medians by position: of whole steps, and from a profile of its own what attention takes of them.

    One cache, full of zeros behind the prompt: a step's work does not depend on what is in it. In every round each
    position has its turn, in an order of its own, so that whatever slows the machine for a while slows all alike.
    """
    plain = endless(directory, threads)
    whole = by_position([(call.position, call.seconds * 1e3) for call in steps_at(plain, last, rounds)], last)
    attention, others = profiled(directory, threads, last, rounds)
    rows = [
        {"position": position, "step_ms": step, "attention_ms": a, "others_ms": o}
        for position, step, a, o in zip(places(last), whole, attention, others, strict=True)
    ]
    return {"rounds": rounds, "rows": rows}


def places(last: int) -> list[int]:
    """Positions to look at."""
    return [*range(FIRST, last, BIN), last]


def steps_at(engine: LlavaEngine, last: int, rounds: int) -> list[Call]:
    """Steps at each place, `rounds` of each, after some that do not count."""
    request = engine.reader.read([], text_prompt(engine), Sampling(1), Control())
    prefill, token = engine.model.prefill([request], Clock()), np.zeros(1, np.int64)
    order = np.random.default_rng(0)
    for step in range(8):
        engine.model.step(prefill, token, step)
    engine.model.language.forget_times()
    with watched(engine) as calls:
        for _ in range(rounds):
            for position in order.permutation(places(last)).tolist():
                engine.model.step(prefill, token, position - int(prefill.lengths[0]))
    return list(calls)


def text_prompt(engine: LlavaEngine) -> str:
    """As many tokens as there are before FIRST."""
    words = 1
    while len(engine.reader.tokenizer.encode("a " * (words + 1), [], 1).input_ids) <= FIRST:
        words += 1
    return "a " * words


def profiled(directory: Path, threads: int, last: int, rounds: int) -> tuple[list[float], list[float]]:
    """By position, milliseconds of a step within attention, and within all other nodes."""
    engine = endless(directory, threads, profile=True)
    calls = steps_at(engine, last, rounds)
    with patch("engines.sessions.ort_session.layer_times", lambda _, runs: runs):  # the runs themselves, not their sums
        runs: Any = engine.model.language.layer_times()
    nodes: dict[tuple[bool, str], list[tuple[int | None, float]]] = {}
    for call, run in zip(calls, runs, strict=True):
        for event in run:
            key = (event["args"]["op_name"] == "Attention", event["args"]["node_index"])
            nodes.setdefault(key, []).append((call.position, event["dur"] / 1e3))
    # Medians of each node, and then their sum: where another process takes the core, it takes it from one node.
    medians = {key: by_position(found, last) for key, found in nodes.items()}
    sums = [np.sum([m for (attends, _), m in medians.items() if attends == wanted], axis=0) for wanted in (True, False)]
    return sums[0].tolist(), sums[1].tolist()


def by_position(values: Sequence[tuple[int | None, float]], last: int) -> list[float]:
    """Medians at each place."""
    found: dict[int, list[float]] = {position: [] for position in places(last)}
    for position, value in values:
        if position in found:
            found[position].append(value)
    return [statistics.median(each) for each in found.values()]


# --- memory: over many steps ---


def memory(directory: Path, threads: int, steps: int = STEPS, every: int = 100) -> Section:
    """What the process has in memory while an answer grows, the second. The cache's pages are touched before it begins,
    so that rows that come into use are no growth."""
    engine = endless(directory, threads)
    session = engine.model.language
    allocate = session.allocate_state

    def touched(batch: int) -> Any:
        state = allocate(batch)
        for cache in state.caches:  # type: ignore[attr-defined]
            cache.update_inplace(np.zeros(cache.shape(), np.float32))
        return state

    seen: list[list[int]] = []
    with patch.object(session, "allocate_state", touched):
        engine.generate([], text_prompt(engine), Sampling(steps))
        for number, _ in enumerate(engine.stream([], text_prompt(engine), Sampling(steps))):
            if number % every == 0 or number == steps - 1:
                seen.append([number, process_bytes()[0] or 0])
    (first, before), (last, after) = seen[1], seen[-1]
    report = engine.memory()
    return {
        "steps": last,
        "cache_bytes": cache_bytes(session.contract),
        "resident": seen,
        "growth_bytes": after - before,
        "bytes_per_step": (after - before) / (last - first),
        "report": report.to_dict(),
    }


# --- start: a process each ---

LOAD = """
import sys, time
start = time.perf_counter()
from engines.runtime.clock import Clock
from engines.runtime.control import Control
from engines.runtime.engine import load_engine
imported = time.perf_counter()
load_engine(sys.argv[1], "ort", threads=int(sys.argv[2]))
print(imported - start, time.perf_counter() - imported)
"""


def start(directory: Path, threads: int, processes: int = PROCESSES) -> Section:
    """Seconds of whole processes, and within them of importing and loading."""
    times: dict[str, list[float]] = {"help": [], "process": [], "import": [], "load": []}
    for number in range(-1, processes):
        helped, _ = process([sys.executable, "-m", "flowcut", "--help"])
        loaded, out = process([sys.executable, "-c", LOAD, str(directory), str(threads)])
        imports, loads = map(float, out.split())
        if number >= 0:
            for name, seconds in zip(times, (helped, loaded, imports, loads), strict=True):
                times[name].append(seconds)
    return {name: summary(values) for name, values in times.items()}


def process(command: Sequence[str]) -> tuple[float, str]:
    """Seconds that it ran, and what it printed."""
    begin = perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return perf_counter() - begin, done.stdout


def summary(values: Sequence[float]) -> Section:
    return {"median": statistics.median(values), "p90": float(np.percentile(values, 90)), "n": len(values)}


class Part(NamedTuple):
    """A section: what measures it, on which engines, with room for what."""

    measure: Callable[[Path, int], Section]
    kinds: tuple[Kind, ...]
    limits: Mapping[str, int]


PARTS = {
    "overhead": Part(overhead, (WIDE,), {}),
    "positions": Part(positions, (TINY, WIDE), LONG),
    "memory": Part(memory, (TINY,), LONG),
    "start": Part(start, (TINY,), {}),
}


def measured(name: str, threads: int) -> list[Section]:
    """A section, one entry for each kind of engine. Measured in a process that has built nothing."""
    part, found = PARTS[name], list[Section]()
    for kind in part.kinds:
        head = {"title": kind.title, "threads": kind.threads or threads, "machine": machine()}
        with built(kind, part.limits) as directory:
            options = ["--part", name, "--inside", str(directory), "--threads", str(head["threads"])]
            _, out = process([sys.executable, __file__, *options])
        found.append({**head, **json.loads(out.splitlines()[-1])})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--inside", type=Path, metavar="DIR", help="measure a part on this engine alone, and print it")
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help=f"of ONNX Runtime (default: {cores})")
    given = parser.parse_args(arguments)
    if given.threads < 1:
        parser.error(f"--threads must be at least 1, got {given.threads}.")
    if given.inside is not None:
        print(json.dumps(PARTS[given.part].measure(given.inside, given.threads)))
        return
    data = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
    for name in PARTS if given.part == "all" else [given.part]:
        print(f"{name}: measuring", flush=True)
        data[name] = measured(name, given.threads)
        write_file(PATH, (json.dumps(data, indent=1) + "\n").encode())
    write_file(PATH.with_suffix(".md"), page(data).encode())


if __name__ == "__main__":
    main()
