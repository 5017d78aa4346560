"""What fewer patches cost in right answers, by selector: writes accuracy_by_tokens.json, .md and .svg.

    python docs/results/accuracy_by_tokens.py      # needs .[torch,export,cpu,plot]; minutes on two cores

Each setting's result is in the .json as soon as there is one, so an interrupted run goes on where it stopped. What was
found for another checkpoint or number of scenes is done again; after a change to the code, delete the .json first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engines.evaluate import SCENES, ask, make_pages
from engines.evaluate_score import Answered, by_kind, by_selector, overall
from engines.evaluate_target import SEEDS, EvalSettings, open_target
from flowcut.aliases import resolve
from flowcut.atomic import write_file
from flowcut.schedule import make_schedule
from flowcut.tiny.questions import KINDS
from flowcut.tiny.scenes import render

SHARES = (1.0, 0.5, 1 / 3, 2 / 9, 1 / 9, 1 / 18)
WORKERS = 2
Results = dict[str, dict[str, Any]]
"""By the setting's name."""


class Line(NamedTuple):
    """One line of the plot: what chooses the patches, how many at each layer, and what runs it."""

    label: str
    selector: str
    schedule: str
    backend: str
    colour: str
    marker: str


# Colours of Okabe and Ito, which most people tell apart, and markers for the others.
LINES = (
    Line("flowcut, adaptive", "flowcut", "adaptive", "torch", "#0072B2", "o"),
    Line("flowcut, masked, ONNX Runtime fp32", "flowcut", "masked", "ort", "#000000", "x"),
    Line("flowcut, static", "flowcut", "static", "torch", "#56B4E9", "s"),
    Line("no history", "no-history", "adaptive", "torch", "#009E73", "^"),
    Line("no semantic term", "no-semantic", "adaptive", "torch", "#CC79A7", "v"),
    Line("no strength", "no-strength", "adaptive", "torch", "#E69F00", "D"),
    Line("cls (last layer's attention)", "cls", "static", "torch", "#D55E00", "P"),
    Line(f"random, {SEEDS} seeds", "random", "static", "torch", "#999999", "*"),
    Line("grid", "grid", "static", "torch", "#7A5230", "X"),
)


class Setting(NamedTuple):
    """One evaluation. Unpruned, no selector has anything to choose: each backend is then evaluated once."""

    selector: str
    schedule: str
    backend: str
    tokens: int
    scenes: int

    @property
    def name(self) -> str:
        return f"{self.backend} {self.selector} {self.schedule} {self.tokens}"


def setting(line: Line, tokens: int, patches: int, scenes: int) -> Setting:
    if tokens == patches:
        return Setting("flowcut", "off", line.backend, tokens, scenes)
    return Setting(line.selector, line.schedule, line.backend, tokens, scenes)


def evaluated(model: str, one: Setting) -> dict[str, Any]:
    """In a worker, which keeps the checkpoint and the drawn scenes."""
    pages, drawn = make_pages("test", one.scenes), _draw()
    answers: list[Answered] = []
    if one.backend == "torch":
        for schedule in _schedules(model, one):
            answers += ask(_torch(model)(schedule), pages, schedule.selector, Progress(disable=True), drawn)
    else:
        schedule = "masked" if one.schedule == "off" else one.schedule
        settings = EvalSettings(model, one.tokens, schedule, one.selector, one.backend, threads=1)
        with closing(open_target(settings, Progress(disable=True))[1]) as answerers:
            for name, answerer in answerers:
                answers += ask(answerer, pages, name, Progress(disable=True), drawn)
    return summary(answers)


def summary(answers: Sequence[Answered]) -> dict[str, Any]:
    seeds = {name: round(share, 6) for name, share in by_selector(answers).items()}
    types = {kind: score.to_dict() for kind, score in by_kind(answers).items()}
    return {**overall(answers).to_dict(), "by_type": types, "seeds": seeds if len(seeds) > 1 else {}}


@cache
def _draw() -> Any:
    return lru_cache(maxsize=1000)(render)


@cache
def _torch(model: str) -> Any:
    """A function from a schedule to an answerer, on one thread: there are as many workers as cores."""
    import torch

    from engines.evaluate_torch import Eager, TorchAnswerer

    torch.set_num_threads(1)
    eager = Eager.load(resolve(model))
    return lambda schedule: TorchAnswerer(eager, schedule)


def _schedules(model: str, one: Setting) -> Iterator[Any]:
    names = [f"random-{seed}" for seed in range(SEEDS)] if one.selector == "random" else [one.selector]
    kind = "static" if one.schedule == "off" else one.schedule
    for name in names:
        yield make_schedule(kind, resolve(model).config.vision, one.tokens, name)


def run(model: str, settings: Sequence[Setting], path: Path, head: Mapping[str, Any], done: Results) -> Results:
    """Evaluate what is not done yet, the longest first; `path` always holds all that is known."""
    left = [one for one in settings if one.name not in done]
    left.sort(key=lambda one: (one.backend == "ort", one.selector == "random", one.tokens), reverse=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ProcessPoolExecutor(WORKERS, context) as pool, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("evaluations", total=len(settings), completed=len(settings) - len(left))
        futures: dict[Future[dict[str, Any]], Setting] = {pool.submit(evaluated, model, one): one for one in left}
        try:
            for future in as_completed(futures):
                one = futures[future]
                done[one.name] = {**one._asdict(), **future.result()}
                save(path, head, done)
                progress.update(task, advance=1, description=one.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


def save(path: Path, head: Mapping[str, Any], results: Results) -> None:
    text = json.dumps({**head, "results": results}, indent=1, sort_keys=True)
    write_file(path, (text + "\n").encode())


def known(path: Path, head: Mapping[str, Any]) -> Results:
    """What an earlier run found out for the same checkpoint and scenes."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    results: Results = data.pop("results")
    return results if data == dict(head) else {}


def page(head: Mapping[str, Any], rows: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The .md: a table of all questions, then one for each kind. `rows`: per line's label a result per budget."""
    budgets = [result["tokens"] for result in next(iter(rows.values()))]
    columns = [f"{tokens} ({tokens / head['patches']:.1%})" for tokens in budgets]
    note = f" **{head['note']}: these numbers mean nothing.**" if head["note"] else ""
    n = next(iter(rows.values()))[0]["n"]
    lines = [
        "# Accuracy against patches kept",
        "",
        f"Written by `accuracy_by_tokens.py`: {head['model']} (weights {head['sha256'][:12]}), {n} questions about the "
        f"first {head['scenes']} scenes of the test split; an answer is right if it is the one word expected.{note} "
        "Unpruned, no selector has anything to choose: one number for PyTorch and one for ONNX Runtime. All rows are "
        "eager PyTorch in fp32 but those that say otherwise.",
        "",
        "Percent of right answers, with 95% intervals: over all questions from 2000 bootstrap draws of scenes, of one "
        f"kind Wilson's. random is the mean of {SEEDS} seeds, each of which is one choice of patches for all pictures; "
        "its intervals are over scenes, given these seeds.",
        "",
        "What to keep in mind: `cls`, `random` and `grid` choose after the whole tower, whose last layers have already "
        "spread what a thing is over its patches; FlowCut and its parts choose on the way, and make the tower cheaper. "
        "The decoder was trained on pictures shortened to 64, 28 or 12 patches with the middle of every thing among "
        "them, never to 8, and never by one of these selectors. `larger` and `relation` are choices of two: half is "
        "chance.",
        "",
        "![Accuracy against patches kept, a line per selector](accuracy_by_tokens.svg)",
        "",
        *table("all questions", columns, {label: [cell(result) for result in some] for label, some in rows.items()}),
    ]
    for kind in KINDS:
        cells = {label: [cell(result["by_type"][kind]) for result in some] for label, some in rows.items()}
        lines += ["", *table(kind, columns, cells)]
    return "\n".join(lines) + "\n"


def table(title: str, columns: Iterable[str], rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
    columns = list(columns)
    yield f"| {title} | " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for label, cells in rows.items():
        yield f"| {label} | " + " | ".join(cells) + " |"


def cell(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['accuracy'] * 100:.1f} ({low * 100:.1f}-{high * 100:.1f})"


def plot(path: Path, patches: int, rows: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """All questions in one large panel, each kind in a small one."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "flowcut", "svg.fonttype": "path", "font.size": 9})
    names: list[list[Any]] = [["all", "all", KINDS[i], KINDS[i + 1]] for i in range(0, len(KINDS), 2)]
    figure, panels = plt.subplot_mosaic(names, figsize=(13, 8), layout="constrained")
    for name, panel in panels.items():
        for i, line in enumerate(LINES):
            scores = [result if name == "all" else result["by_type"][name] for result in rows[line.label]]
            shift = 1.012 ** (i - len(LINES) // 2)  # side by side, so that bars do not hide each other
            draw_line(panel, line, [result["tokens"] * shift for result in rows[line.label]], scores, name == "all")
        dress(panel, "all questions" if name == "all" else str(name), [r["tokens"] for r in next(iter(rows.values()))])
    panels["all"].set(xlabel=f"patches kept, of {patches}", ylabel="right answers, %")
    panels["all"].legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_line(panel: Any, line: Line, x: Sequence[float], scores: Sequence[Mapping[str, Any]], large: bool) -> None:
    y = [score["accuracy"] * 100 for score in scores]
    bars = [[a - s["interval"][0] * 100 for a, s in zip(y, scores, strict=True)]]
    bars += [[s["interval"][1] * 100 - a for a, s in zip(y, scores, strict=True)]]
    style = "--" if line.backend == "ort" else "-"
    size = 5 if large else 3
    panel.errorbar(
        x, y, [[max(0.0, v) for v in side] for side in bars], color=line.colour, marker=line.marker, linestyle=style,
        markersize=size, linewidth=1.4 if large else 0.9, elinewidth=0.8, capsize=2 if large else 0, label=line.label,
    )  # fmt: skip


def dress(panel: Any, title: str, ticks: Sequence[int]) -> None:
    panel.set_title(title, loc="left", fontweight="bold")
    panel.set_xscale("log")
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llava-tiny", help="checkpoint (default: llava-tiny)")
    parser.add_argument(
        "--scenes", type=int, default=SCENES, metavar="N", help=f"of the test split (default: {SCENES})"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="where to write")
    given = parser.parse_args(arguments)
    if given.scenes < 1 or not given.out.is_dir():
        parser.error(f"--scenes must be at least 1 and --out a directory, got {given.scenes} and {given.out}.")
    model = resolve(given.model)
    patches = model.config.vision.patches
    head = {
        "model": model.name, "note": model.note, "sha256": model.weights.sha256, "split": "test",
        "scenes": given.scenes, "patches": patches,
    }  # fmt: skip
    budgets = [round(patches * share) for share in SHARES]
    wanted = {line.label: [setting(line, tokens, patches, given.scenes) for tokens in budgets] for line in LINES}
    short = "" if given.scenes == SCENES else f"_{given.scenes}_scenes"  # never over the committed results
    path = given.out / f"accuracy_by_tokens{short}.json"
    settings = list(dict.fromkeys(one for some in wanted.values() for one in some))
    before = known(path, head)
    results = run(given.model, settings, path, head, {o.name: before[o.name] for o in settings if o.name in before})
    rows = {label: [results[one.name] for one in some] for label, some in wanted.items()}
    write_file(path.with_suffix(".md"), page(head, rows).encode())
    plot(path.with_suffix(".svg"), patches, rows)


if __name__ == "__main__":
    main()
