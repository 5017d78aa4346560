"""docs/results/llava_next_flops: the page is the .json, the .json is what the graphs count to, and the claim holds."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flowcut.aliases import resolve

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SCRIPT = "llava_next_flops"


def test_the_page_is_made_of_the_json(script: ModuleType, data: dict[str, Any]) -> None:
    assert (RESULTS / "llava_next_flops.md").read_text(encoding="utf-8") == script.page(data)


@pytest.mark.parametrize("tokens", ["all", 160])
def test_the_graphs_of_today_count_to_the_same_at_full_size(
    script: ModuleType, data: dict[str, Any], tokens: int | str
) -> None:
    assert script.measured(resolve(data["model"], random=True), tokens) == data["rows"][str(tokens)]


def test_at_160_of_2880_tokens_the_published_ratio_is_reached(script: ModuleType, data: dict[str, Any]) -> None:
    published = data["published"]["before_tflops"] / data["published"]["after_tflops"]
    times = script.ratios(data, 160)
    assert 7.2 < published < times["total"] < times["language"]
    assert published < times["language_causal"]


def test_unpruned_totals_are_a_closed_form(data: dict[str, Any]) -> None:
    """CLIP-L/14 over 5 tiles of 577 rows, and Vicuna-7B over 2928 + 80 rows of 3009 in its cache, by hand."""
    row = data["rows"]["all"]
    assert (row["tiles"], row["visual"], row["sequence"]) == (5, 2880 + 48, 2928 + 80)
    layer = 4 * 1024**2 + 2 * 1024 * 4096
    outside = 576 * (1024 * 3 * 14**2 + 1024 * 4096 + 4096**2)
    assert row["vision"]["linear"] == 2 * 5 * (23 * 577 * layer + outside)
    assert row["vision"]["attention"] == 5 * 23 * 4 * 577**2 * 1024
    assert row["language"]["linear"] == 2 * (32 * 3008 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064)
    assert row["language"]["attention"] == 32 * 4 * 3008 * 3009 * 4096
    assert row["vision"]["scoring"] == row["language"]["scoring"] == 0


def test_pruned_layers_see_the_rows_that_are_left(data: dict[str, Any]) -> None:
    """Two layers see 400 + 80 rows, thirty 160 + 80."""
    row = data["rows"]["160"]
    assert (row["per_tile"], row["visual"], row["sequence"], row["pruned_sequence"]) == (80, 400, 480, 240)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    assert row["language"]["linear"] == 2 * ((2 * 480 + 30 * 240) * layer + 4096 * 32064)
    assert row["language"]["attention"] == pytest.approx(4 * 4096 * (2 * 480**2 + 30 * 240**2), rel=0.01)
    assert 0 < row["language"]["scoring"] < 1e-4 * row["language"]["total"]


def test_every_budget_is_there(script: ModuleType, data: dict[str, Any]) -> None:
    assert list(data["rows"]) == ["all", "640", "320", "160"]
    totals = [script.total(row) for row in data["rows"].values()]
    assert totals == sorted(totals, reverse=True)
