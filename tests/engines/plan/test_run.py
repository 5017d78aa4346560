"""A plan from settings to JSON: what is in it, and that its figures hang together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from engines.flops import GROUPS
from engines.plan.predict import KINDS, TOTAL
from engines.plan.run import Plan, PlanSettings, plan
from engines.plan.stages import STAGES
from flowcut.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "plan.md"


def planned(model: str = "llava-tiny", **given: Any) -> Plan:
    with Progress(disable=True) as progress:
        return plan(PlanSettings(model, **given), progress)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        json.dumps(planned(tokens=[64, 16, "all"], gpu=["A100", "H100"], target_ms=1e-3).to_dict())
    )
    return found


def test_the_baseline_comes_first_then_the_budgets_as_asked(data: dict[str, Any]) -> None:
    assert [(row["tokens"], row["baseline"]) for row in data["budgets"]] == [(144, True), (64, False), (16, False)]
    assert [gpu["gpu"] for gpu in data["gpus"]] == ["A100 SXM 80GB", "H100 SXM"]
    for gpu in data["gpus"]:
        assert [row["tokens"] for row in gpu["budgets"]] == [144, 64, 16]


def test_everything_predicted_says_so(data: dict[str, Any]) -> None:
    assert data["label"] == "predicted"
    assert all(gpu["label"] == "predicted" and gpu["source"].startswith("published: ") for gpu in data["gpus"])


def test_counts_add_up_and_fall_with_the_budget(data: dict[str, Any]) -> None:
    for row in data["budgets"]:
        for stage in STAGES:
            flops, size = row["flops"][stage], row["bytes"][stage]
            assert sum(flops[group] for group in GROUPS) == flops["total"] >= flops["least"] > 0
            assert size["weights"] + size["cache"] + size["inputs_and_outputs"] == size["total"]
        assert row["cache_bytes"] + row["cache_bytes_saved"] == data["budgets"][0]["cache_bytes"]
        assert row["prompt_tokens"] == row["visual_tokens"] + data["text_tokens"]
    for figure in (lambda row: row["flops"]["prefill"]["total"], lambda row: row["cache_bytes"]):
        found = [figure(row) for row in data["budgets"]]
        assert found == sorted(found, reverse=True)
        assert found[0] > found[-1]


def test_a_speed_up_is_the_baselines_time_over_the_budgets(data: dict[str, Any]) -> None:
    for gpu in data["gpus"]:
        whole, *pruned = gpu["budgets"]
        assert all(value == 1 for ratios in whole["speedup"].values() for value in ratios.values())
        for row in pruned:
            for stage, ratios in row["speedup"].items():
                for name, ratio in ratios.items():
                    before, after = (each["times"][stage][f"{name}_ms"] for each in (whole, row))
                    assert ratio == pytest.approx(before / after)


def test_times_and_shares_have_every_stage_and_kind(data: dict[str, Any]) -> None:
    for gpu in data["gpus"]:
        for row in gpu["budgets"]:
            assert set(row["times"]) == {*STAGES, TOTAL}
            assert set(row["shares"]) == {"vision", "prefill", *KINDS, "memory_bound"}
            assert row["times"][TOTAL]["roofline_ms"] == pytest.approx(
                row["times"]["vision"]["roofline_ms"] + row["times"]["prefill"]["roofline_ms"]
            )


def test_a_target_is_answered_for_every_gpu(data: dict[str, Any]) -> None:
    assert data["target_ms"] == 1e-3
    assert [gpu["target"]["met"] for gpu in data["gpus"]] == [False, False]
    assert all(gpu["target"]["verdict"] == "no budget meets it, by the roofline" for gpu in data["gpus"])


def test_without_a_target_there_is_none_and_tiny_stands_beside_nothing() -> None:
    found = planned(gpu=["orin"]).to_dict()
    assert found["target_ms"] is None
    assert found["gpus"][0]["target"] is None
    assert found["published"] is None
    assert found["picture"] is None
    assert (found["tiles"], found["note"], found["notes"]) == (1, "", [])


def test_batches_share_the_weights() -> None:
    one, eight = (planned(batch=batch, gpu=["H100"]).to_dict() for batch in (1, 8))
    for a, b in zip(one["budgets"], eight["budgets"], strict=True):
        assert b["flops"]["vision"]["total"] == pytest.approx(8 * a["flops"]["vision"]["total"], rel=1e-3)
        assert b["cache_bytes"] == 8 * a["cache_bytes"]
        assert b["bytes"]["decode"]["weights"] < 1.2 * a["bytes"]["decode"]["weights"]


def test_gpus_that_lack_a_precision_are_left_out_with_a_note_or_refused_by_name() -> None:
    found = planned(precision="fp8").to_dict()
    assert len(found["gpus"]) == 5
    assert [note.split(" is")[0] for note in found["notes"]] == ["A100 SXM 80GB", "Jetson AGX Orin 64GB"]
    with pytest.raises(ConfigError, match="gpu must have fp8"):
        planned(precision="fp8", gpu=["A100"])


def test_all_is_checked_before_anything_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*_: object) -> None:
        raise AssertionError("counted")

    monkeypatch.setattr("engines.plan.subject.Subject.row", counted)
    for given in ({"tokens": [16, 145]}, {"gpu": ["V100"]}, {"text_tokens": 4000}, {"schedule": "adaptive"}):
        with pytest.raises(ConfigError):
            planned(**given)


def keys(data: Any) -> set[str]:
    """All keys of nested objects that are names, not values."""
    if isinstance(data, list):
        return set().union(*map(keys, data))
    if isinstance(data, dict):
        return {*data, *keys(list(data.values()))}
    return set()


def test_the_page_explains_every_key(data: dict[str, Any]) -> None:
    explained = set(re.findall(r"`([a-z0-9_]+)`", PAGE.read_text(encoding="utf-8")))
    assert keys(data) - explained == set()


def test_the_page_explains_every_key_of_the_published_comparison() -> None:
    explained = set(re.findall(r"`([a-z0-9_]+)`", PAGE.read_text(encoding="utf-8")))
    found = json.loads((PAGE.parent / "results" / "plan.json").read_text(encoding="utf-8"))
    assert keys([each["plan"]["published"] for each in found["plans"]]) - explained == set()
