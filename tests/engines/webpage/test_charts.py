"""Points of charts lie where their numbers say, measured here from the drawing's own ticks."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench_files import bench, write_bench
from hypothesis import given
from hypothesis import strategies as st

from engines.webpage.axes import Chart, Tick, from_zero, staggered
from engines.webpage.bars import bullets, longest_ratio, stage_bars
from engines.webpage.curves import latency_curve, limit_chart, speedup_curve
from engines.webpage.groups import Group, grouped
from engines.webpage.results import read_runs

BUDGETS = (64, 128, 192)


@pytest.fixture
def group(tmp_path: Path) -> Group:
    runs = [write_bench(tmp_path / str(tokens), bench(tokens, accuracy=True)) for tokens in BUDGETS]
    (found,) = grouped(read_runs(runs))
    return found


def _value(ticks: tuple[Tick, ...], at: float) -> float:
    """What a place on an axis means, by two of its labels."""
    first, last = ticks[0], ticks[-1]
    share = (at - first.at) / (last.at - first.at)
    return float(first.text) + share * (float(last.text) - float(first.text))


def _centre(path: str) -> float:
    """The height of a circle's middle."""
    found = re.match(r"M[\d.-]+ ([\d.-]+)a", path)
    assert found, path
    return float(found[1])


def _total(tokens: int, name: str = "pruned") -> dict[str, Any]:
    found: dict[str, Any] = bench(tokens)[name]["batches"][0]["stages"]["total"]
    return found


def test_latency_is_at_its_median_with_the_baseline_at_all_tokens(group: Group) -> None:
    chart = latency_curve(group.series[0], "x")
    totals = [mark for mark in chart.marks if mark.kind == "total"]
    assert [mark.hollow for mark in totals] == [False] * 3 + [True] * 3
    for mark, tokens in zip(totals, BUDGETS, strict=False):
        assert _value(chart.y_ticks, _centre(mark.path)) == pytest.approx(_total(tokens)["median"], rel=0.02)
        assert _value(chart.y_ticks, mark.low) == pytest.approx(_total(tokens)["min"], rel=0.02)
        assert _value(chart.y_ticks, mark.high) == pytest.approx(_total(tokens)["p90"], rel=0.02)
        assert next(tick.at for tick in chart.x_ticks if tick.text == str(tokens)) == mark.x
    whole = _value(chart.y_ticks, _centre(totals[-1].path))
    assert whole == pytest.approx(_total(64, "baseline")["median"], rel=0.02)


def test_solid_lines_join_measured_budgets_and_only_dots_lead_to_the_baseline(group: Group) -> None:
    lines = [line for line in latency_curve(group.series[0], "x").lines if line.kind == "total"]
    assert [(line.style, len(line.points.split())) for line in lines] == [("", 3), ("guide", 2)]


def test_every_budget_of_the_speedup_curve_has_its_cost_below(group: Group) -> None:
    chart = speedup_curve(group.series[0], "x")
    assert chart is not None
    rights = [f"right {bench(tokens, accuracy=True)['accuracy']['pruned']['accuracy']:.1%}" for tokens in BUDGETS]
    assert [(tick.text, tick.note) for tick in chart.x_ticks] == list(zip(map(str, BUDGETS), rights, strict=True))
    for mark in chart.marks:
        assert re.search(r"\d\.\d\d\N{MULTIPLICATION SIGN} \(95% .*% of the FLOP limit .*; accuracy \d", mark.title)


def test_speedups_and_their_limits_are_where_they_belong(group: Group) -> None:
    chart = speedup_curve(group.series[0], "x")
    assert chart is not None
    ratios = [bench(tokens)["comparisons"][0]["ratios"]["total"] for tokens in BUDGETS]
    solid, dashed = [line for line in chart.lines if line.kind == "total"]
    assert (solid.style, dashed.style) == ("", "limit")
    for line, key in ((solid, "ratio"), (dashed, "flop_ratio")):
        heights = [float(point.split(",")[1]) for point in line.points.split()]
        expected = [ratio[key] for ratio in ratios]
        assert [_value(chart.y_ticks, height) for height in heights] == pytest.approx(expected, rel=0.02)


def test_the_limit_chart_has_one_scale_each_way_and_its_diagonal(group: Group) -> None:
    chart = limit_chart(group.series[0].points, "x")
    assert chart is not None
    ends = [point.split(",") for point in chart.guides[0].points.split()]
    for x, y in ends:
        assert _value(chart.x_ticks, float(x)) == pytest.approx(_value(chart.y_ticks, float(y)), abs=0.01)
    (x, y) = chart.guides[1].points.split()[1].split(",")
    assert _value(chart.y_ticks, float(y)) == pytest.approx(0.9 * _value(chart.x_ticks, float(x)), rel=0.01)
    circles = [mark for mark in chart.marks if mark.kind == "total"]
    ratios = [bench(tokens)["comparisons"][0]["ratios"]["total"] for tokens in BUDGETS]
    assert [_value(chart.x_ticks, mark.x) for mark in circles] == pytest.approx(
        [ratio["flop_ratio"] for ratio in ratios], rel=0.02
    )


def test_one_budget_makes_no_curve_and_uncounted_operations_no_limit(tmp_path: Path) -> None:
    document = bench(64)
    for ratio in document["comparisons"][0]["ratios"].values():
        ratio["flop_ratio"] = ratio["share_of_flop_ratio"] = None
    (group,) = grouped(read_runs([write_bench(tmp_path / "r", document)]))
    assert speedup_curve(group.series[0], "x") is None
    assert limit_chart(group.series[0].points, "x") is None


def test_without_a_baseline_there_is_latency_but_no_speedup(tmp_path: Path) -> None:
    runs = [write_bench(tmp_path / str(tokens), bench(tokens, baseline=False)) for tokens in BUDGETS]
    (group,) = grouped(read_runs(runs))
    assert speedup_curve(group.series[0], "x") is None
    assert not any(mark.hollow for mark in latency_curve(group.series[0], "x").marks)
    assert bullets(group.series[0].points[0], 1.0) == ()


def test_stages_lie_end_to_end_on_one_scale(tmp_path: Path) -> None:
    runs = read_runs([write_bench(tmp_path / "r", bench(64, peers=["transformers-sdpa"]))])
    bars = stage_bars(runs, 1)
    assert [bar.subject.name for bar in bars] == ["pruned", "baseline", "transformers-sdpa"]
    for bar in bars:
        assert [part.stage for part in bar.segments] == ["preprocess", "vision", "prefill", "rest"]
        assert all(a.start + a.width == pytest.approx(b.start, abs=0.02) for a, b in pairwise(bar.segments))
        assert bar.segments[-1].start + bar.segments[-1].width == pytest.approx(bar.total, abs=0.03)
    longest = max(bar.batch.stages.total.median for bar in bars)
    assert [bar.total for bar in bars] == pytest.approx(
        [100 * bar.batch.stages.total.median / longest for bar in bars], abs=0.01
    )
    steps = [bar.decode.width for bar in bars if bar.decode]
    assert max(steps) == 100


def test_bullets_of_all_cards_share_a_scale(group: Group) -> None:
    points = [point for series in group.series for point in series.points]
    longest = longest_ratio(points)
    found = [bullet for point in points for bullet in bullets(point, longest)]
    assert len(found) == 12
    assert [bullet.value for bullet in found] == pytest.approx([100 * b.ratio.ratio / longest for b in found], abs=0.01)
    assert all(0 < bullet.value <= 100 and bullet.limit is not None and bullet.limit <= 100 for bullet in found)


@given(st.lists(st.floats(0, 1e9), max_size=8))
def test_an_axis_from_zero_holds_every_value_in_a_handful_of_ticks(values: list[float]) -> None:
    scale, ticks = from_zero(values, 0, 100)
    assert scale.low == 0
    assert all(value <= scale.high * (1 + 1e-9) for value in values)
    assert 2 <= len(ticks) <= 7


@given(st.lists(st.integers(0, 400), min_size=1, max_size=12, unique=True))
def test_labels_in_a_row_never_touch(places: list[int]) -> None:
    found = staggered([Tick(float(at), str(at)) for at in places], 40)
    assert sorted(tick.text for tick in found) == sorted(map(str, places))
    for level in {tick.level for tick in found}:
        row = sorted(tick.at for tick in found if tick.level == level)
        assert all(b - a >= 40 for a, b in pairwise(row))


def test_a_chart_is_taller_where_labels_need_rows() -> None:
    def chart(*ticks: Tick) -> int:
        return Chart("x", "", "", "", "", ticks, (), (), ()).height

    assert chart(Tick(0, "1")) < chart(Tick(0, "1", "note")) < chart(Tick(0, "1", "note", 1))
