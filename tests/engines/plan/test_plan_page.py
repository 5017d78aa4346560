"""docs/results/plan: the page is the .json, and the .json is what the commands that it names print today."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RESULTS = Path(__file__).parents[3] / "docs" / "results"
SCRIPT = "plan"


def test_the_page_is_made_of_the_json(script: ModuleType, data: dict[str, Any]) -> None:
    assert (RESULTS / "plan.md").read_text(encoding="utf-8") == script.page(data)


def test_both_models_are_there_at_both_precisions_with_their_commands(script: ModuleType, data: dict[str, Any]) -> None:
    assert tuple(each["command"] for each in data["plans"]) == script.COMMANDS
    found = [(each["plan"]["model"], each["plan"]["precision"]) for each in data["plans"]]
    models = ("llava-1.5-7b", "llava-v1.6-vicuna-7b")
    assert found == [(model, precision) for model in models for precision in ("fp16", "int4")]
    for each in data["plans"]:
        assert each["plan"]["decoder_layers"] == 32
        assert [gpu["gpu"] for gpu in each["plan"]["gpus"]] == ["A100 SXM 80GB", "H100 SXM"]
        assert each["command"] in (RESULTS / "plan.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("index", [0, 3])
def test_the_commands_print_the_same_today(script: ModuleType, data: dict[str, Any], index: int) -> None:
    """Without the target, which is bisected at length."""
    command = data["plans"][index]["command"].split(" --target-ms")[0]
    expected, got = data["plans"][index]["plan"], script.made(command)
    assert close(without_targets(got), without_targets(expected))


def without_targets(plan: dict[str, Any]) -> dict[str, Any]:
    gpus = [{**gpu, "target": None} for gpu in plan["gpus"]]
    return {**plan, "gpus": gpus, "target_ms": None}


def close(a: Any, b: Any) -> bool:
    """Equal, but for the last digits of sums."""
    if isinstance(a, dict):
        return bool(a.keys() == b.keys()) and all(close(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(close, a, b))
    return bool(a == pytest.approx(b)) if isinstance(a, float) else bool(a == b)


def test_a_target_is_met_by_the_greatest_budget_alone(data: dict[str, Any]) -> None:
    for each in data["plans"]:
        for gpu in each["plan"]["gpus"]:
            target = gpu["target"]
            assert target["met"] == (target["total_ms"] <= each["plan"]["target_ms"])
            if target["met"]:
                slower = [row for row in gpu["budgets"] if row["tokens"] > target["tokens"]]
                assert all(row["times"]["total"]["roofline_ms"] > each["plan"]["target_ms"] for row in slower)


def test_in_fp16_an_h100_reads_weights_and_in_int4_it_computes(data: dict[str, Any]) -> None:
    """What the page says in words: pruned to 64, fp16 is bound by memory, so int4 gains more than pruning alone."""
    fp16, int4 = (each["plan"]["gpus"][1]["budgets"][1] for each in data["plans"][:2])
    assert (fp16["tokens"], int4["tokens"]) == (64, 64)
    assert fp16["shares"]["memory_bound"] > 0.9
    assert int4["shares"]["memory_bound"] < 0.1
    assert fp16["speedup"]["total"]["roofline"] < 0.5 * int4["speedup"]["total"]["roofline"]


def test_where_arithmetic_and_reading_take_as_long_is_the_gpus_ratio(script: ModuleType, data: dict[str, Any]) -> None:
    """Of float16 weights 2 bytes and 2 operations each: peak over bandwidth, and a little more for the rest."""
    found = data["plans"][0]["plan"]
    for gpu in found["gpus"]:
        ratio = gpu["flops_per_s"] / gpu["bytes_per_s"]
        assert script.ridge(found, gpu, 1) == pytest.approx(ratio, rel=0.03)
