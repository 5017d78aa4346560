"""docs/results/schedules: the page is the .json, its words hold there, its figures are those of the schedule files."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
from rich.progress import Progress

from calib.schedule import ScheduleSettings, calibrate_schedule

RESULTS = Path(__file__).parent.parent / "docs" / "results"
BUDGETS = (48, 32, 16)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    sys.path.insert(0, str(RESULTS))
    yield
    sys.path.remove(str(RESULTS))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("schedules")


@pytest.fixture(scope="module")
def written() -> ModuleType:
    return importlib.import_module("schedules_page")


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "schedules.json").read_text(encoding="utf-8"))
    return found


def result(data: dict[str, Any], tokens: int, label: str) -> dict[str, Any]:
    found: dict[str, Any] = data["results"][f"{tokens} {label}"]
    return found


def held_out(data: dict[str, Any], tokens: int, label: str) -> Any:
    return result(data, tokens, label)["agreement"]["held_out"]


def end(data: dict[str, Any], tokens: int, label: str) -> float:
    """Agreement with adaptive on held-out pictures, at the end."""
    return float(held_out(data, tokens, label)["agreement"]["final_jaccard"]["mean"])


def test_the_page_is_made_of_the_json(written: ModuleType, data: dict[str, Any]) -> None:
    assert (RESULTS / "schedules.md").read_text(encoding="utf-8") == written.page(data)


def test_every_schedule_is_measured_at_each_budget_on_unseen_scenes(written: ModuleType, data: dict[str, Any]) -> None:
    assert (data["model"], data["scenes"], data["patches"]) == ("llava-tiny", 400, 144)
    for tokens in BUDGETS:
        for row in written.ROWS:
            found = result(data, tokens, row.label)
            assert found["n"] == 2378
            assert sum(map(int, found["scenes"]["asked"])) == 2378
            assert found["accuracy"] == pytest.approx(sum(map(int, found["scenes"]["right"])) / 2378, abs=1e-6)
            for half in found["agreement"].values():
                assert half["pictures"] == len(half["each"]) == data["pictures"] / 2
                assert mean(half["each"]) == pytest.approx(half["agreement"]["final_jaccard"]["mean"], abs=2e-6)


def test_paired_differences_are_of_the_same_questions(written: ModuleType) -> None:
    one, other = ({"scenes": {"asked": "664", "right": right}} for right in ("653", "663"))
    assert written.more_right(one, one) == (0, 0, 0)
    middle, low, high = written.more_right(one, other)
    assert middle == -1 / 16
    assert low == -1 / 6, "a draw of the second scene alone"
    assert high == 0


def test_figures_are_those_that_the_schedule_files_record(
    script: ModuleType, written: ModuleType, tmp_path: Path
) -> None:
    folder, own = tmp_path / "drawn", tmp_path / "own"
    folder.mkdir()
    own.mkdir()
    for number in range(4):
        script.drawn(folder, number)
        script.drawn(own, number)
    settings = ScheduleSettings("llava-tiny", own, tmp_path / "s.json", tokens=16)
    told = calibrate_schedule(settings, Progress(disable=True))
    documents = {
        "static, median": told.static["calibration"],
        "masked, calibrated": told.masked["calibration"],
        "static, closed form": told.static["calibration"]["closed_form"],
    }
    for row in written.ROWS:
        if row.label in documents:
            found = script.measured_row(script.Task("llava-tiny", folder, 2, 16, 4, row), row)
            figures, document = found["agreement"]["held_out"], documents[row.label]
            assert figures["agreement"] == document["agreement"]
            assert figures["flops_share"] == document["flops_share"]
            assert found["n"] == 12
    assert figures["clamped"] is None
    adaptive = told.static["calibration"]["adaptive"]
    (first, *_) = written.ROWS
    found = script.measured_row(script.Task("llava-tiny", folder, 2, 16, 4, first), first)["agreement"]["held_out"]
    assert found["flops_share"] == adaptive["flops_share"]
    assert found["mean_counts"] == [round(point["mean"], 2) for point in adaptive["held_out"]]


def test_draws_share_no_pictures_with_those_they_are_compared_on(script: ModuleType, tmp_path: Path) -> None:
    tasks = [task for task in script.tasks("llava-tiny", tmp_path, 400, 144) if task.row is None]
    assert {task.pictures for task in tasks} == {10, 40, 200, 400}
    assert (script.others_of(400), script.needed(tasks)) == (range(400, 600), list(range(600)))


@pytest.mark.long
def test_a_short_run_writes_its_own_files_and_is_not_repeated(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.main(["--scenes", "4", "--out", str(tmp_path)])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"schedules_4_scenes.{suffix}" for suffix in ("json", "md", "svg")]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(script, "run", lambda *_: pytest.fail("all of it is known"))
    script.main(["--scenes", "4", "--out", str(tmp_path)])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_too_few_scenes_are_refused(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--scenes", "1", "--out", str(tmp_path)])
    assert "--scenes must be at least 2 and --out a directory, got 1" in capsys.readouterr().err
