"""docs/results/schedules: the page is the .json, its words hold there, its figures are those of the schedule files."""

from __future__ import annotations

import importlib
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
from rich.progress import Progress

from calib.schedule import ScheduleSettings, calibrate_schedule

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SCRIPT = "schedules"
BUDGETS = (48, 32, 16)
HALVES = ("calibration", "held_out")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def written() -> ModuleType:
    return importlib.import_module("schedules_page")


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


def test_the_manual_has_the_same_table_and_it_says_what_the_manual_says(
    written: ModuleType, data: dict[str, Any]
) -> None:
    manual = (RESULTS.parent / "schedules.md").read_text(encoding="utf-8")
    table = [line for line in written.sizes(data) if line.startswith("|")]
    assert "\n".join(table) in manual
    draws = written.draws_by_size(data)
    assert list(draws) == [10, 40, 200, 400]
    for one in draws[40] + draws[200] + draws[400]:
        assert one["others"] == pytest.approx(draws[400][0]["others"], abs=0.005), "the median needs 40 pictures"
        assert one["counts"] == pytest.approx(draws[400][0]["counts"], abs=2)
    clamped = {size: mean(one["clamped"] for one in some) for size, some in draws.items()}
    assert clamped[200] < 0.03 < 0.1 < clamped[40] < 0.15 < clamped[10], "capacities need more"


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


def test_what_the_page_says_of_agreement_holds(written: ModuleType, data: dict[str, Any]) -> None:
    for tokens in BUDGETS:
        closed, median, p90, most = (
            result(data, tokens, f"static, {name}") for name in ("closed form", "median", "p90", "max")
        )
        assert written.gain(median, closed)[1] > 0, "the median agrees better than the closed form"
        assert written.gain(p90, median)[2] < 0, "p90 agrees less than the median"
        assert written.gain(most, median)[2] < 0, "and so does max"
        adaptive = held_out(data, tokens, "adaptive")["mean_counts"]
        assert all(a > b for a, b in zip(closed["counts"][:-1], adaptive[:-1], strict=True))
        assert 2 * (adaptive[-2] - tokens) > 144 - tokens, "most of the surplus goes at the last point"
        for label in ("static, flops=0.7", "static, flops=0.5"):
            searched, held = (result(data, tokens, label)["agreement"][half]["each"] for half in HALVES)
            assert mean(searched) - mean(held) < 0.03, "does not overfit by much"
            assert end(data, tokens, label) < end(data, tokens, "static, median")


def test_what_the_page_says_of_cost_holds(data: dict[str, Any]) -> None:
    for tokens in BUDGETS:
        cost = {name.partition(" ")[2]: held_out(data, tokens, name.partition(" ")[2]) for name in names(data, tokens)}
        share = {label: figures["flops_share"] for label, figures in cost.items()}
        assert share["static, flops=0.5"] <= 0.5 < share["static, flops=0.7"] <= 0.7 < share["adaptive"]
        assert share["adaptive"] < share["masked, calibrated"] < share["masked, full capacity"]
        assert share["static, median"] < share["static, p90"] < share["static, max"]
        assert share["static, median"] < share["static, closed form"]


def test_masked_is_adaptive_where_nothing_clamps_and_has_the_shapes_of_max(data: dict[str, Any]) -> None:
    for tokens in BUDGETS:
        full, masked = (held_out(data, tokens, f"masked, {name}") for name in ("full capacity", "calibrated"))
        assert (full["clamped"], set(full["each"])) == (0, {1.0})
        assert result(data, tokens, "masked, full capacity")["scenes"] == result(data, tokens, "adaptive")["scenes"]
        assert set(result(data, tokens, "masked, calibrated")["agreement"]["calibration"]["each"]) == {1.0}
        assert sum(one < 1 for one in masked["each"]) <= masked["clamped"] * masked["pictures"] <= 5
        assert result(data, tokens, "masked, calibrated")["counts"] == result(data, tokens, "static, max")["counts"]
        others = [end(data, tokens, name.partition(" ")[2]) for name in names(data, tokens) if "static" in name]
        assert end(data, tokens, "masked, calibrated") > max(others)


def names(data: dict[str, Any], tokens: int) -> list[str]:
    return [name for name in data["results"] if name.startswith(f"{tokens} ") and "draw" not in name]


def test_agreement_is_not_accuracy(written: ModuleType, data: dict[str, Any]) -> None:
    for tokens in BUDGETS:
        steep, adaptive = (result(data, tokens, label) for label in ("static, flops=0.5", "adaptive"))
        assert end(data, tokens, "static, flops=0.5") < 0.65
        assert -0.06 < written.more_right(steep, adaptive)[0] < 0


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
