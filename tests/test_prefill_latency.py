"""docs/results/prefill_latency: the page is the .json, what was promised is kept, and the script still runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SCRIPT = "prefill_latency"
SCHEDULES = ("closed form", "calibrated median", "calibrated flops=0.7")


def test_the_page_is_made_of_the_json(script: ModuleType, data: dict[str, Any]) -> None:
    assert data.keys() == script.PARTS.keys()
    assert (RESULTS / "prefill_latency.md").read_text(encoding="utf-8") == script.page(data)


def test_the_decoder_is_as_much_faster_as_it_has_fewer_operations(data: dict[str, Any]) -> None:
    found = data["language"]["fp32"]
    assert list(found["comparisons"]) == ["64", "128", "192"]
    for each in found["comparisons"].values():
        assert each["ratios"]["prefill"]["share_of_flop_ratio"] >= 0.9
        assert each["ratios"]["prefill"]["n"] >= 10


def test_the_pruned_tower_is_faster_whatever_the_schedule(data: dict[str, Any]) -> None:
    found = data["vision"]
    for name in SCHEDULES:
        ratio = found["comparisons"][name]["ratios"]["vision"]
        assert ratio["low"] > 1
        assert ratio["share_of_flop_ratio"] >= 0.9
        assert 0 < found["agreement"][name]["jaccard"] <= 1


def test_a_trained_tower_has_its_agreement_beside_each_speed(data: dict[str, Any]) -> None:
    assert list(data["tiny"]["comparisons"]) == list(data["tiny"]["agreement"]) == list(SCHEDULES)


def test_onnx_runtime_is_no_slower_than_eager_pytorch_on_the_same_shapes(data: dict[str, Any]) -> None:
    found = data["peers"]
    against = {each["against"]: each["ratios"]["prefill"] for each in found["comparisons"]}
    assert {"baseline", "transformers-sdpa", "eager-adaptive", "eager-static"} <= against.keys()
    assert against["eager-static"]["ratio"] >= 1
    assert against["eager-static"]["n"] >= 10
    static = next(peer for peer in found["peers"] if peer["name"] == "eager-static")
    assert static["batches"][0]["prompt_tokens"] == found["pruned"]["batches"][0]["prompt_tokens"]


def test_what_was_measured_says_where(data: dict[str, Any]) -> None:
    for section in (*data["language"].values(), data["vision"], data["tiny"], data["peers"]):
        machine = section["machine"]
        assert {"python", "numpy", "onnxruntime", "torch"} <= machine["versions"].keys()
        assert machine["roof"]["flops_per_s"] > 1e9
        assert machine["load_before"] >= 0


def test_what_did_not_run_is_called_extrapolated(script: ModuleType, data: dict[str, Any]) -> None:
    text = script.page(data)
    ran = [found for found in data["language"].values() if found["layers"] is not None]
    assert text.count("**Extrapolated, not measured:**") == len(ran) > 0
    for found in ran:
        assert 1 < min(found["whole"].values()) <= 32 / found["layers"]


def test_a_missed_figure_is_called_missed(script: ModuleType, data: dict[str, Any]) -> None:
    worse = json.loads(json.dumps(data["language"]))
    worse["fp32"]["comparisons"]["64"]["ratios"]["prefill"]["share_of_flop_ratio"] = 0.89
    assert "missed" in script.page({"language": worse})


@pytest.mark.long
def test_every_part_still_measures(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On llava-tiny, where nothing of the .json depends on it but its shape."""
    monkeypatch.setattr(script, "PATH", tmp_path / "prefill_latency.json")
    script.main(["--quick", "--threads", "1"])
    assert not list(tmp_path.iterdir())
