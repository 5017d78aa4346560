"""Only runs of one model, machine, library and precision share an axis, and only budgets of one kind a line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from bench_files import MACHINE, bench, write_bench

from engines.webpage.groups import Group, differing, grouped
from engines.webpage.results import read_runs


def _groups(tmp_path: Path, *documents: dict[str, Any]) -> tuple[Group, ...]:
    return grouped(read_runs([write_bench(tmp_path / f"r{i}", each) for i, each in enumerate(documents)]))


def _changed(tokens: int = 64, machine: dict[str, Any] | None = None, **pruned: Any) -> dict[str, Any]:
    document = copy.deepcopy(bench(tokens))
    document["pruned"] |= pruned
    document["machine"] = {**MACHINE, **(machine or {})}
    return document


def test_budgets_of_one_model_and_machine_are_one_line_in_their_order(tmp_path: Path) -> None:
    (group,) = _groups(tmp_path, bench(192), bench(64), bench(128))
    (series,) = group.series
    assert [point.tokens for point in series.points] == [64, 128, 192]
    assert [point.baseline_tokens for point in series.points] == [576] * 3
    assert group.title == "llava-1.5-7b, ONNX Runtime fp32, AMD EPYC 7B13"


@pytest.mark.parametrize(
    ("other", "fact"),
    [
        (bench(128, model="llava-1.5-13b"), "model"),
        (bench(128, backend="rtx"), "library"),
        (bench(128, weights="random", note="random weights"), "weights"),
        (_changed(128, precision="int4"), "precision"),
        (_changed(128, vision_precision="int8"), "vision precision"),
        (_changed(128, decoder_layers=32), "decoder layers"),
        (_changed(128, source_sha256="6" * 64), "checkpoint"),
        (_changed(128, cuda_graphs=True), "CUDA graphs"),
        (_changed(128, {"device": "Apple M4"}), "device"),
        (_changed(128, {"threads": 1}), "threads"),
        (_changed(128, {"versions": {**MACHINE["versions"], "onnxruntime": "1.30.0"}}), "version of onnxruntime"),
    ],
)
def test_what_cannot_be_compared_is_apart_and_says_by_what(tmp_path: Path, other: dict[str, Any], fact: str) -> None:
    groups = _groups(tmp_path, bench(64), other, bench(192))
    assert [[run.bench.pruned.tokens for run in group.runs] for group in groups] == [[64, 192], [128]]
    assert differing(groups) == [fact]
    assert len({group.title for group in groups}) == 2


def test_load_and_clocks_set_nothing_apart(tmp_path: Path) -> None:
    other = _changed(128, {"load_before": 2.0, "clocks_mhz": [3000, 3100]})
    assert len(_groups(tmp_path, bench(64), other)) == 1


@pytest.mark.parametrize("change", [{"schedule": "masked"}, {"selector": "cls"}, {"llm_tokens": 16}])
def test_another_schedule_or_selector_is_another_line(tmp_path: Path, change: dict[str, Any]) -> None:
    (group,) = _groups(tmp_path, bench(64), _changed(128, **change), bench(192))
    assert sorted([point.batch.visual_tokens for point in s.points] for s in group.series) == [[64, 192], [128]]
    assert len({series.title for series in group.series}) == 2


def test_every_batch_size_is_a_line(tmp_path: Path) -> None:
    (group,) = _groups(tmp_path, bench(64, batches=(1, 4)), bench(128, batches=(1, 4)))
    assert [(s.points[0].batch.batch, [p.tokens for p in s.points]) for s in group.series] == [
        (1, [64, 128]),
        (4, [64, 128]),
    ]


def test_tokens_dropped_in_the_decoder_are_said(tmp_path: Path) -> None:
    (group,) = _groups(tmp_path, _changed(192, llm_tokens=64))
    (point,) = group.series[0].points
    assert (point.budget, point.tokens) == ("192→64", 64)


def test_a_line_takes_the_latest_of_two_runs_of_one_budget(tmp_path: Path) -> None:
    early, late = bench(64, created="2026-01-01T00:00:00+00:00"), bench(64, created="2026-01-02T00:00:00+00:00")
    (group,) = _groups(tmp_path, late, early, bench(128))
    (series,) = group.series
    assert len(series.points) == 3
    assert [point.run.bench.created for point in series.line] == [late["created"], bench(128)["created"]]
