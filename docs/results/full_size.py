"""What building a 7B engine takes on this machine, no GPU needed: writes full_size.json and .md.

    python docs/results/full_size.py                        # needs .[export,cpu,rtx]; an hour, an idle machine
    python docs/results/full_size.py --only int4 int4-run   # some settings; the others' rows stay as they are
    python docs/results/full_size.py --keep                 # leaves the engine directories (28 GB in fp16)

Weights are seeded-random, which tells sizes, memory and times, and nothing of quality; "int4-checkpoint" reads them
from a checkpoint that is written for it (14 GB more) and removed again. Every command runs as a process of its own. A
row is in the .json as soon as it is measured; an interrupted run removes what it was building.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, NoReturn

from full_size_checkpoint import checkpoint_bytes, write_checkpoint
from full_size_page import page
from full_size_watch import Peaks, Watch, tree

from flowcut.aliases import resolve
from flowcut.artifacts import installed_versions, timestamp
from flowcut.atomic import check_space, write_file
from flowcut.checkpoint import expected_tensors
from flowcut.errors import ConfigError, FlowCutError

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent.parent
PATH = Path(__file__).with_suffix(".json")
MODEL, QUESTION, ANSWER_TOKENS = "llava-1.5-7b", "What color is the circle?", 16
WEIGHT_BYTES = {"fp16": 2.0, "int4": 0.75}  # on average, to ask for enough disk; embeddings and vision stay wide
ROOM_BYTES = 300 << 20
PATIENCE_S = 20.0


class Setting(NamedTuple):
    """One engine directory. `layers`: of the decoder, None for all; `stages`: engines that the decoder becomes;
    `checkpoint`: from files in the Hugging Face format, instead of weights drawn when asked for."""

    precision: str
    layers: int | None = None
    stages: int | None = None
    checkpoint: bool = False

    def arguments(self, model: str) -> list[str]:
        options = {"--decoder-layers": self.layers, "--stages": self.stages}
        given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        weights = [] if self.checkpoint else ["--weights", "random"]
        return ["engine", model, *weights, "--precision", self.precision, "--backend", "rtx", *given]


SETTINGS = {
    "int4-4-layers": Setting("int4", layers=4),
    "int4-8-layers": Setting("int4", layers=8),
    "int4": Setting("int4"),
    "int4-checkpoint": Setting("int4", checkpoint=True),
    "fp16": Setting("fp16"),
    "fp16-2-stages": Setting("fp16", stages=2),
}
RUN = "int4-run"
"""Asks the directory that "int4" built."""
NAMES = ("int4-4-layers", "int4-8-layers", "int4", RUN, "int4-checkpoint", "fp16", "fp16-2-stages")


def build(name: str, model: str, folder: Path) -> Row:
    """Build one engine directory, `folder`/engine."""
    setting = SETTINGS[name]
    with source(setting, model, folder.parent) as (given, facts):
        found = measured([*setting.arguments(given), "--out", shown(folder / "engine")], folder)
    head = {"precision": setting.precision, "stages": setting.stages or 1, "decoder_layers": layers(setting, model)}
    return head | facts | found | files(folder / "engine", found["result"])


@contextmanager
def source(setting: Setting, model: str, out: Path) -> Iterator[tuple[str, Row]]:
    """What the command is given as its model: `model`, or a checkpoint of it, outside the folder that is watched."""
    if not setting.checkpoint:
        yield model, {}
        return
    found = resolve(model, random=True, decoder_layers=setting.layers)
    with new_folder(out / f"{found.name}-checkpoint", keep=False) as directory:
        print(f"writing {shown(directory)}", flush=True)
        facts = write_checkpoint(directory, found)
        yield shown(directory), {"checkpoint": facts}


def ask(engine: Path, folder: Path) -> Row:
    """One question to an engine directory, on ONNX Runtime."""
    question = ["--question", QUESTION, "--answer-tokens", str(ANSWER_TOKENS), "--repeats", "3"]
    return measured(["run", shown(engine), "--backend", "ort", *question], folder)


def layers(setting: Setting, model: str) -> int:
    return resolve(model, random=True, decoder_layers=setting.layers).config.text.num_hidden_layers


def needed_bytes(setting: Setting, model: str) -> int:
    """A cautious guess: the weights in ONNX files and again in engines, beside the checkpoint if there is one."""
    found = resolve(model, random=True, decoder_layers=setting.layers)
    parameters = sum(map(prod, expected_tensors(found.config).values()))
    there = checkpoint_bytes(found) if setting.checkpoint else 0
    return int(parameters * WEIGHT_BYTES[setting.precision] * 2) + there + ROOM_BYTES


def shown(path: Path) -> str:
    """As the command line names it: from the checkout, where that is possible."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def measured(arguments: Sequence[str], folder: Path) -> Row:
    """Run `flowcut` with `arguments` from the checkout, watching its processes and `folder`, which has its TMPDIR.

    `result` is its line of JSON, empty where it failed; `error` then tells why.
    """
    head = {"command": shlex.join(["python", "-m", "flowcut", *arguments]), "machine": machine()}
    scratch_files = folder / "tmp"
    scratch_files.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch_files)}
    begin = perf_counter()
    code, out, err, peaks = watched([sys.executable, "-m", "flowcut", *arguments], folder, environment)
    wall_s = perf_counter() - begin
    lines = (err.strip() or "it said nothing").splitlines()
    error = "" if code == 0 else f"{ended(code)}: {lines[-1]}"
    result = json.loads(out.splitlines()[-1]) if code == 0 else {}
    shutil.rmtree(scratch_files)
    return head | {"wall_s": wall_s, "error": error, "peaks": asdict(peaks), "result": result}


def watched(command: Sequence[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str, Peaks]:
    """Exit code, stdout, stderr and peaks of a process in a session of its own, which ends with this one."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment,
        start_new_session=True,
    ) as child:  # fmt: skip
        try:
            with Watch(child.pid, folder) as peaks:
                out, err = child.communicate()
        except BaseException:
            end(child)
            raise
    return child.returncode, out, err, peaks


def end(child: subprocess.Popen[str]) -> None:
    """Let it clean up, for PATIENCE_S; then end whatever is left of its session."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(PATIENCE_S)
    for pid in tree(child.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ended(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def files(directory: Path, result: Row) -> Row:
    """Bytes on the disk of the published directory, and of every graph: its weights, ONNX files and engine."""
    sizes = {path.name: path.stat() for path in directory.iterdir()} if result else {}
    graphs = {}
    for graph, engine_bytes in result.get("engine_bytes", {}).items():
        onnx_bytes = sum(stat.st_size for name, stat in sizes.items() if name.startswith(f"{graph}.onnx"))
        weight_bytes = result["weight_bytes"][graph]
        graphs[graph] = {"weight_bytes": weight_bytes, "onnx_bytes": onnx_bytes, "engine_bytes": engine_bytes}
    sizes_on_disk = sum(stat.st_blocks * 512 for stat in sizes.values())
    return {
        "directory_bytes": sizes_on_disk,
        "files": {n: s.st_size for n, s in sorted(sizes.items())},
        "graphs": graphs,
    }


def machine() -> Row:
    """Processor, memory, load and versions, before a measurement."""
    return {
        "created": timestamp(),
        "processor": colon_value("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg()[0],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "versions": installed_versions(),
    }


def colon_value(path: str, name: str) -> str:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "unknown")


def measure(names: Sequence[str], model: str, out: Path, results: Path, keep: bool) -> None:
    """One setting after the other; its row is written when it is there, its folder removed before the next build."""
    engine = out / "int4" / "engine"
    if RUN in names and "int4" not in names:
        check_there(engine)
    with ExitStack() as made:
        for name in names:
            print(f"{name}: measuring", flush=True)
            if name == RUN:
                with new_folder(out / name, keep=False) as folder:
                    row = ask(engine, folder)
            else:
                made.close()
                check_space(out / name, needed_bytes(SETTINGS[name], model))
                row = build(name, model, made.enter_context(new_folder(out / name, keep)))
            store(results, name, {"model": model} | row)
            print(f"{name}: {row['wall_s']:.0f} s{row['error'] and ', ' + row['error']}", flush=True)


def check_there(engine: Path) -> None:
    if not engine.is_dir():
        raise ConfigError(f"{RUN} must have {engine} to ask, got none. Run --only int4 {RUN}, or int4 with --keep.")


@contextmanager
def new_folder(folder: Path, keep: bool) -> Iterator[Path]:
    """An empty folder, removed afterwards unless it is to be kept and holds a complete engine directory."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{folder} must not exist, got one, from --keep? Remove it or choose another --out."
        ) from None
    try:
        yield folder
    finally:
        if not (keep and (folder / "engine").is_dir()):
            shutil.rmtree(folder)
        with suppress(OSError):  # others are in it
            folder.parent.rmdir()


def store(results: Path, name: str, row: Row) -> None:
    """Replace one row of the .json, and write the page anew."""
    data = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    data = {key: row if key == name else data[key] for key in NAMES if key in {*data, name}}
    write_file(results, (json.dumps(data, indent=1) + "\n").encode())
    write_file(results.with_suffix(".md"), page(data).encode())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    add("--keep", action="store_true", help="keep the engine directories")
    add(
        "--out",
        type=Path,
        default=ROOT / "build" / "full-size",
        metavar="DIR",
        help="for them (default: build/full-size)",
    )
    add("--model", default=MODEL, help=f"another one is a test of this script (default: {MODEL})")
    add("--results", type=Path, metavar="FILE.json", help="to write (default: full_size.json, and .md beside it)")
    given = parser.parse_args(arguments)
    if given.model != MODEL and given.results is None:
        parser.error(f"--results must be given with --model {given.model}: full_size.json is about {MODEL}.")
    try:
        names = [name for name in NAMES if name in given.only]
        measure(names, given.model, given.out.absolute(), given.results or PATH, given.keep)
    except FlowCutError as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(1, "interrupted; the rows that were finished are stored.\n")


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    main()
