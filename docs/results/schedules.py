"""How far schedules with constants agree with adaptive, and what they cost: writes schedules.json, .md and .svg.

    python docs/results/schedules.py      # needs .[torch,plot]; 82 minutes on two cores that others used too

Each result is in the .json as soon as there is one, so an interrupted run goes on where it stopped. What was found for
another checkpoint or number of scenes is done again; after a change to the code, delete the .json first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from schedules_page import BUDGETS, ROWS, SIZES, Row, page, plot

from calib.agreement import agreement, clamp_rate
from calib.dataset import Picture, find_pictures, split
from calib.flops import flops_share
from calib.journal import Journal
from calib.patches import jaccard
from calib.runs import Runs
from calib.schedule import ScheduleSettings, calibrate_schedule
from engines.evaluate import SCENES, ask, make_pages
from engines.evaluate_score import Answered, overall
from flowcut.aliases import resolve
from flowcut.atomic import write_file
from flowcut.preprocess import ImageSettings
from flowcut.schedule import Schedule, make_schedule
from flowcut.tiny.scenes import make_scene, render

PICTURES = 200
"""Scenes of the val split that constants are chosen from and, half of them, compared on."""
OTHERS = 200
"""Further ones, on which constants from few and from many pictures are compared."""
DRAWS = {10: 5, 40: 5, 200: 2, 400: 1}
"""By number of pictures, how often so many are drawn; each draw has its own."""
WORKERS = 2
Results = dict[str, dict[str, Any]]
"""By the task's name."""


class Task(NamedTuple):
    """One measurement, in a worker: a row of a budget's table, or, without `row`, one draw of `pictures`."""

    model: str
    folder: Path
    scenes: int
    tokens: int
    pictures: int
    row: Row | None = None
    number: int = 0

    @property
    def name(self) -> str:
        return f"{self.tokens} {self.row.label}" if self.row else f"{self.pictures} pictures, draw {self.number}"

    def measured(self) -> dict[str, Any]:
        return measured_row(self, self.row) if self.row else measured_draw(self)


def tasks(model: str, folder: Path, scenes: int, patches: int) -> list[Task]:
    """All that is measured. The few pictures of a short run are as many as its scenes."""
    pictures = min(PICTURES, scenes)
    budgets = [round(patches * share) for share in BUDGETS]
    rows = [Task(model, folder, scenes, tokens, pictures, row) for tokens in budgets for row in ROWS]
    sizes = [size for size in SIZES if size <= scenes] or [scenes]
    draws = [(size, number) for size in sizes for number in range(DRAWS.get(size, 1))]
    return rows + [Task(model, folder, scenes, budgets[-1], size, None, number) for size, number in draws]


# --- what a worker does ---


def measured_row(task: Task, row: Row) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="flowcut-") as place:
        schedule = scheduled(task, row, Path(place))
        numbers = range(task.pictures)
        halves = dict(zip(("calibration", "held_out"), split(pictures_of(task, numbers, Path(place))), strict=True))
        found = {name: compared(task, half, schedule, Path(place) / name) for name, half in halves.items()}
    answers = answered(task, schedule)
    return {
        "tokens": task.tokens,
        "schedule": schedule.kind,
        "counts": list(schedule.counts),
        "agreement": found,
        "scenes": by_scene(answers),
        **overall(answers).to_dict(),
    }


def measured_draw(task: Task) -> dict[str, Any]:
    """Median constants of so many pictures, on their own held-out half and on pictures that no draw has."""
    start = task.number * task.pictures
    with tempfile.TemporaryDirectory(prefix="flowcut-") as place:
        told = calibrated(task, range(start, start + task.pictures), "median", Path(place)).to_dict()
        others, vision = pictures_of(task, others_of(task.scenes), Path(place)), resolve(task.model).config.vision
        paths = (told["schedule"], told["masked_schedule"])
        static, masked = (
            compared(task, others, make_schedule(path, vision, task.tokens), Path(place) / "others") for path in paths
        )
    return {
        "pictures": task.pictures,
        "counts": told["counts"],
        "capacities": told["capacities"],
        "held_out": told["agreement"]["static"]["final_jaccard"]["mean"],
        "others": static["agreement"]["final_jaccard"]["mean"],
        "clamped": masked["clamped"],
    }


def scheduled(task: Task, row: Row, place: Path) -> Schedule:
    """By name, or from the file that a calibration wrote, as an engine's build would read it."""
    model = resolve(task.model)
    if row.choose is None:
        return make_schedule(row.kind, model.config.vision, task.tokens)
    result = calibrated(task, range(task.pictures), row.choose, place)
    path = result.masked_out if row.kind == "masked" else result.out
    return make_schedule(str(path), model.config.vision, task.tokens, weights=model.weights)


def calibrated(task: Task, numbers: range, choose: str, place: Path) -> Any:
    linked(task, numbers, place / "calibrate")
    settings = ScheduleSettings(
        task.model, place / "calibrate", place / "schedule.json", tokens=task.tokens, choose=choose
    )
    return calibrate_schedule(settings, Progress(disable=True))


def compared(task: Task, pictures: Sequence[Picture], schedule: Schedule, journal: Path) -> dict[str, Any]:
    """As the schedule file has it, and more: the Jaccard index of each picture, and what adaptive costs."""
    model, adaptive = resolve(task.model), adaptive_of(task)
    vision, points = model.config.vision, adaptive.points(model.config.vision.num_hidden_layers)
    runs = runs_of(task.model, journal)
    reference = runs.kept(pictures, adaptive, "adaptive")
    (column,) = runs.compared(pictures, [schedule], adaptive, "compare")
    kept = [one.kept for one in column]
    counts = np.array([[mask.bit_count() for mask in masks] for masks in kept])  # [pictures, points]
    shapes = [schedule.counts] if schedule.counts else counts.tolist()
    clamps = clamp_rate(points, schedule.counts, reference)["any"] if schedule.kind == "masked" else None
    return {
        "pictures": len(pictures),
        "agreement": agreement(points, kept, reference, [one.cosine for one in column]),
        "each": [round(jaccard(a[-1], b[-1]), 6) for a, b in zip(kept, reference, strict=True)],
        "clamped": clamps,
        "mean_counts": [round(float(count), 2) for count in counts.mean(axis=0)],
        "flops_share": round(float(np.mean([flops_share(vision, row) for row in shapes])), 6),
    }


def adaptive_of(task: Task) -> Schedule:
    return make_schedule("adaptive", resolve(task.model).config.vision, task.tokens)


def runs_of(model: str, journal: Path) -> Runs:
    settings = ImageSettings.from_directory(resolve(model).files, resolve(model).config.vision.image_size)
    return Runs(_tower(model), settings, Journal(journal, "of this process alone"), Progress(disable=True))


def answered(task: Task, schedule: Schedule) -> list[Answered]:
    return ask(
        _torch(task.model)(schedule), make_pages("test", task.scenes), "flowcut", Progress(disable=True), _draw()
    )


def by_scene(answers: Sequence[Answered]) -> dict[str, str]:
    """Questions asked and answered rightly about each scene, a digit each, so that schedules can be paired."""
    asked, right = dict[int, int](), dict[int, int]()
    for answer in answers:
        asked[answer.scene] = asked.get(answer.scene, 0) + 1
        right[answer.scene] = right.get(answer.scene, 0) + answer.right
    return {"asked": "".join(map(str, asked.values())), "right": "".join(map(str, right.values()))}


@cache
def _draw() -> Any:
    return lru_cache(maxsize=1000)(render)


@cache
def _tower(model: str) -> Any:
    """On one thread: there are as many workers as cores."""
    import torch

    from calib.tower import Tower

    torch.set_num_threads(1)
    return Tower(resolve(model).weights)


@cache
def _torch(model: str) -> Any:
    """A function from a schedule to an answerer."""
    from engines.evaluate_torch import Eager, TorchAnswerer

    eager = Eager.load(resolve(model))
    return lambda schedule: TorchAnswerer(eager, schedule)


# --- pictures ---


def others_of(scenes: int) -> range:
    first = max(size * draws for size, draws in DRAWS.items())
    return range(first, first + min(OTHERS, scenes))


def picture(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.png"


def drawn(folder: Path, number: int) -> None:
    render(make_scene("val", number)).save(picture(folder, number))


def linked(task: Task, numbers: range, into: Path) -> Path:
    """A directory of some of the pictures."""
    into.mkdir()
    for number in numbers:
        picture(into, number).symlink_to(picture(task.folder, number))
    return into


def pictures_of(task: Task, numbers: range, place: Path) -> tuple[Picture, ...]:
    return find_pictures(linked(task, numbers, place / f"from {numbers.start}")).pictures


def needed(some: Sequence[Task]) -> list[int]:
    """Numbers of the scenes that tasks look at."""
    found = set[int]()
    for task in some:
        start = task.number * task.pictures
        found |= {*range(start, start + task.pictures), *(() if task.row else others_of(task.scenes))}
    return sorted(found)


# --- the run ---


def run(left: Sequence[Task], path: Path, head: Mapping[str, Any], done: Results) -> None:
    """Measure, the longest first; `path` always holds all that is known."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(WORKERS, context) as pool, Progress(*columns, console=Console(stderr=True)) as progress:
        try:
            render_all(pool, left, progress)
            for task, found in finished(pool, left, progress):
                done[task.name] = found
                save(path, head, done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def render_all(pool: Executor, left: Sequence[Task], progress: Progress) -> None:
    numbers = needed(left)
    futures = [pool.submit(drawn, left[0].folder, number) for number in numbers]
    for future in progress.track(as_completed(futures), total=len(numbers), description="pictures"):
        future.result()


def finished(pool: Executor, left: Sequence[Task], progress: Progress) -> Iterator[tuple[Task, dict[str, Any]]]:
    left = sorted(left, key=lambda task: (task.row is not None and "flops" in task.name, task.pictures), reverse=True)
    futures: dict[Future[dict[str, Any]], Task] = {pool.submit(task.measured): task for task in left}
    for future in progress.track(as_completed(futures), total=len(left), description="measurements"):
        yield futures[future], future.result()


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llava-tiny", help="checkpoint (default: llava-tiny)")
    parser.add_argument(
        "--scenes", type=int, default=SCENES, metavar="N", help=f"of the test split (default: {SCENES})"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="where to write")
    given = parser.parse_args(arguments)
    if given.scenes < 2 or not given.out.is_dir():
        parser.error(f"--scenes must be at least 2 and --out a directory, got {given.scenes} and {given.out}.")
    model = resolve(given.model)
    head = {
        "model": model.name, "note": model.note, "sha256": model.weights.sha256, "scenes": given.scenes,
        "patches": model.config.vision.patches, "pictures": min(PICTURES, given.scenes),
    }  # fmt: skip
    short = "" if given.scenes == SCENES else f"_{given.scenes}_scenes"  # never over the committed results
    path = given.out / f"schedules{short}.json"
    with tempfile.TemporaryDirectory(prefix="flowcut-") as folder:
        wanted = tasks(given.model, Path(folder), given.scenes, model.config.vision.patches)
        before = known(path, head)
        results = {task.name: before[task.name] for task in wanted if task.name in before}
        if left := [task for task in wanted if task.name not in results]:
            run(left, path, head, results)
    data = json.loads(json.dumps({**head, "results": results}, sort_keys=True))
    write_file(path.with_suffix(".md"), page(data).encode())
    plot(path.with_suffix(".svg"), data)


if __name__ == "__main__":
    main()
