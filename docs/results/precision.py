"""What each precision costs in quality: writes precision.json and precision.md.

    python docs/results/precision.py                 # needs .[torch,export,cpu]; half an hour on two cores, 6 GB
    python docs/results/precision.py --only tiny     # or: width

tiny    llava-tiny's answers to the test questions by ONNX Runtime, against those of its float32 graphs
width   one decoder layer of LLaVA-1.5-7B's size: its output by ONNX Runtime against PyTorch's in float32

Each setting's result is in the .json as soon as there is one, so an interrupted run goes on where it stopped; after a
change to the code, delete the .json first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from engines.evaluate import ask, make_pages
from engines.evaluate_score import Answered, by_kind, overall
from engines.evaluate_target import AT_ONCE, NEW_TOKENS, EngineAnswerer
from engines.pipeline import BuildSettings, build_directory
from engines.progress import terminal_progress
from engines.runtime.engine import LlavaEngine, load_engine
from flowcut.aliases import resolve
from flowcut.atomic import write_file
from flowcut.config import Precision
from flowcut.tiny.questions import KINDS
from flowcut.tiny.scenes import make_scene, render

MODEL = "llava-tiny"
BUDGETS: tuple[int | str, ...] = ("all", 16)
SCENES, WORKERS = 200, 2
PICTURES = 100
"""Scenes whose kept patches are compared."""


class Row(NamedTuple):
    """One setting: precisions of decoder and tower, whether int4 and fp8 are given the checkpoint's calibration, and
    whether ONNX Runtime leaves the inputs of int8 and int4 layers as they are."""

    precision: Precision
    vision: Precision
    calibrated: bool = False
    exact: bool = True

    @property
    def name(self) -> str:
        how = ", AWQ" if self.calibrated and "int4" in self[:2] else ", to nearest" if "int4" in self[:2] else ""
        return f"decoder {self.precision}, vision {self.vision}{how}" + ", inputs int8 too" * (not self.exact)


ROWS = (
    Row("fp32", "fp32"),
    Row("fp16", "fp16"),
    Row("bf16", "bf16"),
    Row("int8", "int8"),
    Row("int8", "int8", exact=False),
    Row("fp8", "fp8", True),
    Row("int4", "fp16", True),
    Row("int4", "int8", True),
    Row("int4", "int8"),
    Row("int4", "int8", True, exact=False),
    Row("int4", "int4", True),
)
Results = dict[str, dict[str, Any]]


class Heard(NamedTuple):
    """What a directory answered and which patches it kept, [PICTURES, T]."""

    answers: list[Answered]
    kept: np.ndarray


def listen(row: Row, tokens: int | str, scenes: int) -> Heard:
    """In a worker: build a directory for ONNX Runtime and ask it, on one thread."""
    progress = Progress(disable=True)
    with tempfile.TemporaryDirectory(prefix="flowcut-") as folder:
        settings = BuildSettings(
            MODEL, tokens=tokens, precision=row.precision, vision_precision=row.vision, backend="ort",
            calibration=None if row.calibrated else "none", max_batch=AT_ONCE, max_images=AT_ONCE,
            max_new_tokens=NEW_TOKENS, out=Path(folder) / "engine",
        )  # fmt: skip
        engine = load_engine(build_directory(settings, progress).directory, "ort", threads=1, exact=row.exact)
        answers = ask(EngineAnswerer(engine), make_pages("test", scenes), f"{row.name}, {tokens}", progress)
        return Heard(answers, kept(engine, min(scenes, PICTURES)))


def kept(engine: LlavaEngine, count: int) -> np.ndarray:
    pictures = [render(make_scene("test", number)) for number in range(count)]
    batches = [pictures[i : i + AT_ONCE] for i in range(0, count, AT_ONCE)]
    return np.array([numbers for some in batches for (numbers,) in engine.prefill(some, ["<image>"] * len(some)).kept])


def compared(own: Heard, reference: Heard) -> dict[str, Any]:
    """Accuracy, the share of answers equal to the reference's, and the agreement of kept patches."""
    same = [a.got == b.got for a, b in zip(own.answers, reference.answers, strict=True)]
    sets = [(set(a.tolist()), set(b.tolist())) for a, b in zip(own.kept, reference.kept, strict=True)]
    return {
        **overall(own.answers).to_dict(),
        "by_type": {kind: score.to_dict() for kind, score in by_kind(own.answers).items()},
        "answers_equal": round(float(np.mean(same)), 6),
        "kept_jaccard": round(float(np.mean([len(a & b) / len(a | b) for a, b in sets])), 6),
    }


def measure_tiny(path: Path, scenes: int, results: Results, progress: Progress) -> None:
    """A worker for each core, the float32 graphs first."""
    left = [(tokens, row) for tokens in BUDGETS for row in ROWS if name_of(tokens, row) not in results]
    if not left:
        return
    task = progress.add_task("llava-tiny", total=len(left))
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        references = {tokens: pool.submit(listen, ROWS[0], tokens, scenes) for tokens in {tokens for tokens, _ in left}}
        own = [references[t] if row == ROWS[0] else pool.submit(listen, row, t, scenes) for t, row in left]
        for (tokens, row), future in zip(left, own, strict=True):
            told = compared(future.result(), references[tokens].result())
            results[name_of(tokens, row)] = {"tokens": tokens, "setting": row.name, **told}
            save(path, results, scenes)
            progress.update(task, advance=1)


def name_of(tokens: int | str, row: Row) -> str:
    return f"tiny {row.name}, {tokens}"


def measure_width(path: Path, scenes: int, results: Results, progress: Progress) -> None:
    """Imported here: it needs torch."""
    from precision_width import WIDTHS, layer_errors

    for setting in WIDTHS:
        name = f"width {setting[0]}{' calibrated' * setting[1]}"
        if name not in results:
            results[name] = layer_errors(setting, progress)
            save(path, results, scenes)


def save(path: Path, results: Results, scenes: int) -> None:
    write_file(path, (json.dumps({**head(scenes), "results": results}, indent=1, sort_keys=True) + "\n").encode())


def head(scenes: int) -> dict[str, Any]:
    model = resolve(MODEL)
    return {"model": MODEL, "sha256": model.weights.sha256, "scenes": scenes}


def known(path: Path, scenes: int) -> Results:
    """What an earlier run found out for the same checkpoint and scenes."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    results: Results = data.pop("results")
    return results if data == head(scenes) else {}


def page(results: Mapping[str, Mapping[str, Any]], scenes: int) -> str:
    """The .md."""
    tiny = {name: result for name, result in results.items() if name.startswith("tiny ")}
    width = {name: result for name, result in results.items() if name.startswith("width ")}
    lines = ["# Quality per precision", "", "Written by `precision.py`.", ""]
    if tiny:
        lines += tiny_tables(tiny, scenes)
    if width:
        lines += width_table(width)
    return "\n".join(lines) + "\n"


def tiny_tables(results: Mapping[str, Mapping[str, Any]], scenes: int) -> list[str]:
    n = next(iter(results.values()))["n"]
    lines = [
        f"{MODEL}, {n} questions about the first {scenes} scenes of the test split, ONNX Runtime on the CPU, static "
        "schedule. Accuracy in percent with 95% intervals (2000 bootstrap draws of scenes); *equal* is the share of "
        f"answers that are word for word those of the float32 graphs; *patches* the Jaccard index of what is kept of "
        f"{min(scenes, PICTURES)} pictures. int4 means blocks of 64 here, whose widths 128 does not divide. bf16 is "
        "computed in float32 from bf16 weights, since ONNX Runtime's CPU provider has no bf16. *Inputs int8 too* is "
        "what `flowcut run` does with int8 and int4 on a CPU: ONNX Runtime's default, which TensorRT does not share. "
        "One build of each: what a few tenths of a percent mean, the intervals say.",
    ]
    for tokens in BUDGETS:
        some = {r["setting"]: r for r in results.values() if r["tokens"] == tokens}
        kinds = [str(kind) for kind in KINDS]
        lines += ["", f"| {tokens} of 144 patches | accuracy | equal | patches | {' | '.join(kinds)} |"]
        lines.append("|---|" + "---:|" * (3 + len(kinds)))
        for row in ROWS:
            if row.name in some:
                lines.append(f"| {row.name} | " + " | ".join(tiny_cells(some[row.name], kinds)) + " |")
    return lines


def tiny_cells(result: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    low, high = result["interval"]
    first = f"{result['accuracy']:.1%} ({low * 100:.1f}-{high * 100:.1f})".replace("%", "")
    shares = [f"{result['answers_equal'] * 100:.1f}", f"{result['kept_jaccard']:.3f}"]
    return [first, *shares, *(f"{result['by_type'][kind]['accuracy'] * 100:.1f}" for kind in kinds)]


def width_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    first = next(iter(results.values()))
    lines = [
        "",
        f"One decoder layer of {first['model']}'s size (width {first['width']}), seeded random weights, "
        f"{first['tokens']} tokens: what the layer adds to its input, by ONNX Runtime, against PyTorch in float32; "
        "root mean square of the difference over that of what is added. **Normal weights have no outliers, so these "
        "figures test the machinery; what a precision costs a trained model they do not tell.**",
        "",
        "| layer | relative error |",
        "|---|---:|",
    ]
    ordered = sorted(results.values(), key=lambda result: float(result["error"]))
    return lines + [f"| {result['setting']} | {result['error']:.2e} |" for result in ordered]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=["tiny", "width"], help="measure this part alone (default: both)")
    parser.add_argument("--scenes", type=int, default=SCENES, metavar="N", help=f"(default: {SCENES})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="where to write")
    given = parser.parse_args(arguments)
    if given.scenes < 1 or not given.out.is_dir():
        parser.error(f"--scenes must be at least 1 and --out a directory, got {given.scenes} and {given.out}.")
    short = "" if given.scenes == SCENES else f"_{given.scenes}_scenes"  # never over the committed results
    path = given.out / f"precision{short}.json"
    results = known(path, given.scenes)
    with terminal_progress() as progress:
        if given.only != "width":
            measure_tiny(path, given.scenes, results, progress)
        if given.only != "tiny":
            measure_width(path, given.scenes, results, progress)
    text = page(results, given.scenes)
    write_file(path.with_suffix(".md"), text.encode())
    Console().print(text, markup=False)


if __name__ == "__main__":
    main()
