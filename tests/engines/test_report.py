"""Tables stay within 80 columns at the sizes that real models have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from engines import report
from engines.ask import STAGES, Answer, Question, Summary
from engines.prune import Outcome, Pruned
from engines.runtime import Generation
from flowcut.aliases import ASSETS
from flowcut.config import LlavaConfig
from flowcut.schedule import make_schedule, pruning_points


@pytest.fixture
def console() -> Console:
    return Console(width=80, record=True, highlight=False, markup=False, emoji=False)


def test_every_pruning_point_of_llava_fits_in_a_row(console: Console) -> None:
    vision = LlavaConfig.from_file(ASSETS / "llava-1.5-7b" / "config.json").vision
    schedule, count = make_schedule("static", vision, 64), 12
    points = zip(pruning_points(vision.num_hidden_layers), schedule.counts, strict=True)
    trace = [(layer, [np.arange(kept)] * count) for layer, kept in points]
    pruned = Pruned(np.zeros((count, 64), np.int64), np.zeros((count, 25), np.int64), np.zeros((count, 64, 1)), trace)
    report.pruned(console, Outcome(pruned, schedule, "random weights", ["a.npz"]))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["picture", "input", *(str(layer) for layer, _ in trace)]
    assert [line.split() for line in lines[3 : 3 + count]] == [
        [str(i), "576", *map(str, schedule.counts)] for i in range(count)
    ]
    assert lines[-2:] == ["wrote    a.npz", "random weights: which patches are kept means nothing."]


def test_long_paths_are_not_broken(console: Console) -> None:
    path = str(Path("/", *["folder"] * 30, "kept.npz"))
    vision = LlavaConfig.from_file(ASSETS / "llava-tiny" / "config.json").vision
    pruned = Pruned(np.zeros((1, 144), np.int64), np.zeros((1, 13), np.int64), np.zeros((1, 144, 1)), [])
    report.pruned(console, Outcome(pruned, make_schedule("static", vision, 144), "", [path]))
    assert console.export_text().splitlines() == ["Nothing is pruned: all 144 patches stay.", f"wrote    {path}"]


def test_a_stage_without_a_run_is_a_dash(console: Console) -> None:
    latency: dict[str, Summary] = {stage: {"median": 1.5, "p90": 2.25, "n": 3} for stage in STAGES}
    latency["decode_per_token"] = {"median": None, "p90": None, "n": 0}
    answer = Answer(Generation([""], [[]], [True], [[]], [7], {}), 7, latency)
    engine = cast(Any, SimpleNamespace(backend="ort", manifest=SimpleNamespace(backend="ort", note="")))
    report.answered(console, engine, Question((), "p"), answer)
    lines = console.export_text().splitlines()
    assert any(line.split() == ["milliseconds", "over", "3", "runs", "median", "p90"] for line in lines)
    assert lines[-2].split() == ["time", "to", "first", "token", "1.50", "2.25"]
    assert lines[-1].split() == ["each", "further", "token", "-", "-"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (963_200, "963.2 kB"), (13_476_839_424, "13.5 GB")],
)
def test_sizes_have_the_unit_that_suits_them(count: int, text: str) -> None:
    assert report._size(count) == text
