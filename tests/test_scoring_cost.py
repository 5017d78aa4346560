"""docs/results/scoring_cost: the page is the .json, its arithmetic can be repeated, its measurements are described."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest
import recipe
import torch
from onnx_ir.passes import Sequential, common

from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.schedule import make_schedule
from flowcut.scoring import flow_score
from flowcut.vision import VisionModel

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SCRIPT = "scoring_cost"
PARTS = {"roofline", "agreement", "cpu"}
SMALL = LlavaConfig(
    VisionConfig(
        image_size=56,
        patch_size=7,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
    ),
    TextConfig(64, 128, 1, 4, 4, 512),
    image_token_id=448,
)
MADE_BY_SCORING = {"Exp", "Log", "ReduceL1", "ReduceMax", "ReduceMean", "ReduceSum", "Div"}


def test_the_page_is_made_of_the_json(script: ModuleType, data: dict[str, Any]) -> None:
    assert set(data) == PARTS
    assert (RESULTS / "scoring_cost.md").read_text(encoding="utf-8") == script.page(data)


def test_the_predicted_part_is_what_its_arithmetic_gives_today(script: ModuleType, data: dict[str, Any]) -> None:
    assert json.loads(json.dumps(script.roofline())) == data["roofline"]


def test_the_range_encloses_what_moves_and_what_is_launched(data: dict[str, Any]) -> None:
    for batch in data["roofline"]["batches"]:
        for gpu in batch["gpus"].values():
            low, high = gpu["designs"]["two launches"]
            cheap, dear = gpu["launches_us"]
            assert low >= cheap + (gpu["kv_l2_us"] or 0)
            assert high >= dear + gpu["kv_device_us"]
            assert gpu["layer_us"] == max(gpu["arithmetic_us"], gpu["weights_us"])
            for other in ("fused into attention", "one launch and a zeroing"):
                assert all(a <= b for a, b in zip(gpu["designs"][other], (low, high), strict=True))


def test_agreement_names_its_model_its_scenes_and_both_accuracies(data: dict[str, Any]) -> None:
    found = data["agreement"]
    assert found["model"] == "llava-tiny"
    assert (found["points"], found["scored"]) == (5, 10)
    assert {row["schedule"] for row in found["rows"]} == {"adaptive", "static"}
    for row in found["rows"]:
        assert row["every_layer"]["n"] == row["at_points"]["n"] >= 2000
        assert 0 <= row["jaccard"] <= 1
        assert row["equal_counts"] == 1 or row["schedule"] == "adaptive"


def test_what_a_cpu_took_comes_with_number_spread_and_versions(data: dict[str, Any]) -> None:
    found = data["cpu"]
    assert {"onnxruntime", "numpy", "processor"} <= {key for key, value in found.items() if value}
    assert found["threads"] == 2
    for row in found["precisions"].values():
        assert row["n"] >= 15
        assert row["interval"][0] <= row["overhead"] <= row["interval"][1]
        assert row["range"][0] <= row["quartiles"][0] <= row["overhead"] <= row["quartiles"][1] <= row["range"][1]
        assert 0 < row["profile"]["share"] <= 0.03
        assert row["interval"][0] <= 0.03, "pairs scatter by more than what is measured, so they can only refute"


def test_scoring_at_points_alone_leaves_out_the_layers_between(script: ModuleType) -> None:
    schedule = make_schedule("static", SMALL.vision, 9)
    some = script.AtPoints(**vars(schedule))
    assert list(schedule.scored_layers(12)) == list(range(10))
    assert list(some.scored_layers(12)) == [1, 3, 5, 7, 9]
    vision = VisionModel.from_weights(random_weights(SMALL))
    pixels = torch.from_numpy(recipe.pixels(56, 1, 3))
    with torch.inference_mode():
        kept = vision.features(pixels, some).trace[0][1][0]
        tower = vision.vision_tower["vision_model"]
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        first, second = tower.encoder["layers"][0], tower.encoder["layers"][1]
        hidden = first(hidden, *first.project(hidden), None)
        score = flow_score(*second.project(hidden)).score[0]
    assert kept.tolist() == sorted(score.topk(schedule.counts[0]).indices.tolist())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_with_constants_the_shapes_are_the_same_and_no_scoring_is_left(
    script: ModuleType, tmp_path: Path, precision: str
) -> None:
    paths = script.write_graphs(tmp_path, SMALL, 9, precision)
    ops = [op_types(path) for path in paths]
    assert ops[0].keys() >= MADE_BY_SCORING
    assert not ops[1].keys() & MADE_BY_SCORING
    for op in ("Attention", "TopK", "GatherND", "LayerNormalization"):
        assert ops[0][op] == ops[1][op] > 0
    scored, constant = (script.runner(path, SMALL, precision) for path in paths)
    assert [x.shape for x in scored()] == [x.shape for x in constant()]
    assert constant()[1][0].tolist() != scored()[1][0].tolist()


def op_types(path: Path) -> dict[str, int]:
    """How many nodes of each type there are once functions are inlined and what nothing needs is gone."""
    model = ir.load(path)
    Sequential(common.InlinePass(), common.RemoveUnusedNodesPass())(model)
    found: dict[str, int] = {}
    for node in model.graph:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def test_pairs_are_timed_in_turn(script: ModuleType) -> None:
    calls: list[str] = []
    for swap in (False, True):
        first, second = script.timed_pair(lambda: calls.append("scored"), lambda: calls.append("constant"), swap)
        assert first > 0
        assert second > 0
    assert calls == ["scored", "constant", "constant", "scored"]


@pytest.mark.long
def test_a_small_tower_can_be_measured(script: ModuleType) -> None:
    found = script.cpu(["fp32"], pairs=4, config=SMALL, tokens=9)
    row = found["precisions"]["fp32"]
    assert row["n"] == 4
    assert row["scored_ms"] > 0
    assert 0 < row["profile"]["share"] < 1
    assert script.page({"cpu": found}).count("| fp32 | 4 |") == 1
