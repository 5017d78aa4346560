"""docs/results/precision: the page is the .json, what the documents claim holds there, and the script runs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SCRIPT = "precision"
FLOAT = "decoder fp32, vision fp32"


def test_the_page_is_made_of_the_json(script: ModuleType, data: dict[str, Any]) -> None:
    assert (RESULTS / "precision.md").read_text(encoding="utf-8") == script.page(data["results"], data["scenes"])


def test_every_setting_is_there(script: ModuleType, data: dict[str, Any]) -> None:
    tiny = {script.name_of(tokens, row) for tokens in script.BUDGETS for row in script.ROWS}
    assert {name for name in data["results"] if name.startswith("tiny ")} == tiny
    assert len([name for name in data["results"] if name.startswith("width ")]) == 7


def test_float16_loses_nothing_measurable(data: dict[str, Any]) -> None:
    for tokens in ("all", 16):
        own, exact = (data["results"][f"tiny {name}, {tokens}"] for name in ("decoder fp16, vision fp16", FLOAT))
        assert own["answers_equal"] > 0.995
        assert abs(own["accuracy"] - exact["accuracy"]) < 0.005


@pytest.mark.parametrize("setting", ["decoder int4, vision fp16, AWQ", "decoder int4, vision int8, AWQ"])
def test_int4_loses_at_most_a_point(setting: str, data: dict[str, Any]) -> None:
    for tokens in ("all", 16):
        own, exact = (data["results"][f"tiny {name}, {tokens}"] for name in (setting, FLOAT))
        assert own["accuracy"] >= exact["accuracy"] - 0.01


def test_errors_at_a_7bs_width_are_ordered_as_bits_are(data: dict[str, Any]) -> None:
    width = {r["setting"]: r["error"] for n, r in data["results"].items() if n.startswith("width ")}
    assert width["fp32"] < width["fp16"] < width["bf16"] < width["int8"] < width["fp8"] < width["int4, AWQ"]
    assert width["int4, AWQ"] <= width["int4, to nearest"]


@pytest.mark.long
def test_the_script_runs(script: ModuleType, tmp_path: Path) -> None:
    script.main(["--only", "tiny", "--scenes", "2", "--out", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precision_2_scenes.json", "precision_2_scenes.md"]
