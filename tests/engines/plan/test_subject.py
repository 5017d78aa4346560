"""What is planned: budgets, lengths and graphs, of models and of engine directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import WriteCheckpoint
from tiny_engine import write_engine

from engines.plan.settings import PlanSettings
from engines.plan.stages import directory_costs
from engines.plan.subject import Row, Subject, find_subject
from flowcut.artifacts import read_manifest
from flowcut.budget import Budget
from flowcut.config import Precision
from flowcut.contract import Limits
from flowcut.errors import ConfigError, EngineError


def subject(model: str | Path = "llava-tiny", **given: Any) -> Subject:
    return find_subject(PlanSettings(str(model), **given))


def only(found: Subject) -> Row:
    (budget,) = found.budgets()
    return found.row(budget)


def test_budgets_are_those_asked_for_without_the_baseline() -> None:
    assert subject().budgets() == [Budget(16)]
    assert subject(tokens=[64, "all", 16, 64]).budgets() == [Budget(64), Budget(16)]
    assert subject(tokens=["all"]).budgets() == []
    assert subject(tokens=["all", 64], llm_tokens=8).budgets() == [Budget(144, 8), Budget(64, 8)]
    assert subject("llava-v1.6-vicuna-7b", tokens=[160]).budgets() == [Budget(80, 160)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": [0]}, r"tokens must be in 1\.\.144"),
        ({"tokens": [145]}, r"tokens must be in 1\.\.144"),
        ({"tokens": [16], "llm_tokens": 16}, r"llm_tokens must be in 1\.\.15"),
        ({"decoder_layers": 5}, r"decoder_layers must be in 1\.\.4"),
        ({"model": "llava-2"}, "model must be one of llava-tiny"),
    ],
)
def test_what_the_model_does_not_have_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_subject(PlanSettings(**{"model": "llava-tiny", **given})).budgets()


def test_prompts_beyond_the_models_positions_are_refused() -> None:
    found = subject(text_tokens=4096 - 16 - 128 + 1)
    with pytest.raises(ConfigError, match=r"text_tokens must be at most 3824 \(4096 positions less one picture's 144"):
        found.check(found.baseline)
    with pytest.raises(ConfigError, match=r"text_tokens must be at most 3952"):
        found.check(Budget(16))
    subject(text_tokens=3824).check(found.baseline)


def test_an_adaptive_schedule_has_no_graph() -> None:
    with pytest.raises(
        ConfigError, match=r"schedule must be static, masked or a \.json file where a graph is exported"
    ):
        subject(schedule="adaptive").check(Budget(16))


def test_a_schedules_file_is_for_one_budget(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"kind": "static", "patches": 144, "tokens": 16, "counts": [100, 80, 60, 40, 16]}))
    found = subject(schedule=str(path))
    assert only(found).counts == (100, 80, 60, 40, 16)
    with pytest.raises(ConfigError, match="must be made for"):
        subject(schedule=str(path), tokens=[8]).check(Budget(8))
    with pytest.raises(ConfigError, match="schedule must be static or masked where target_ms is given"):
        subject(schedule=str(path), target_ms=1.0)


def test_lengths_of_llava_next_follow_the_picture() -> None:
    found = subject("llava-v1.6-vicuna-7b", picture="640x480", batch=2, text_tokens=30)
    visual, lengths = found.lengths(found.baseline)
    rows, columns, newlines = 36, 48, 36
    assert visual == 576 + rows * columns + newlines
    assert (lengths.batch, lengths.images, lengths.tiles) == (2, 2, 10)
    assert (lengths.prompt, lengths.pruned) == (visual + 30, None)
    visual, lengths = found.lengths(Budget(80, 160))
    assert (visual, lengths.prompt, lengths.pruned) == (400, 430, 190)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_every_precision_can_be_counted(precision: Precision) -> None:
    row = only(subject(precision=precision))
    assert row.costs["prefill"].flops > 0
    whole = only(subject(precision="fp32")).weight_bytes
    share = {"fp32": 1, "fp16": 0.5, "bf16": 0.5, "int8": 0.3, "int4": 0.23, "fp8": 0.3}[precision]
    assert row.weight_bytes == pytest.approx(share * whole, rel=0.1)


def test_the_tower_of_int4_is_int8_unless_another_is_named() -> None:
    assert subject(precision="int4").vision == "int8"
    assert subject(precision="int4", vision_precision="fp16").vision == "fp16"
    assert subject().vision == "fp16"


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_is_keys_and_values_of_every_row(batch: int) -> None:
    row = only(subject(batch=batch, text_tokens=24, new_tokens=10, llm_tokens=5))
    layer = 2 * 2 * 192  # keys and values in float16
    assert row.cache_bytes == batch * layer * (2 * (16 + 24 + 10) + 2 * (5 + 24 + 10))


def test_weights_are_what_a_build_writes(tmp_path: Path) -> None:
    made = write_engine(tmp_path / "engine", precision="fp16")
    written = sum(path.stat().st_size for path in made.directory.glob("*.data"))
    row = only(subject(tmp_path / "engine", text_tokens=24))
    assert row.weight_bytes == pytest.approx(written, rel=0.02), "files align their tensors"


# --- engine directories ---


@pytest.mark.parametrize(
    "built",
    [
        {"precision": "fp16"},
        {"precision": "int4", "vision_precision": "int8", "stages": 2},
        {"precision": "fp32", "schedule": "masked"},
        {"precision": "fp16", "tokens": 64, "llm_tokens": 16, "limits": Limits(3, 4, 120, 32)},
    ],
    ids=["fp16", "int4-stages", "masked", "inside"],
)
def test_an_engine_directory_is_planned_as_it_was_built(tmp_path: Path, built: dict[str, Any]) -> None:
    made = write_engine(tmp_path / "engine", **built)
    manifest = read_manifest(made.directory)
    limits = manifest.limits
    visual = manifest.tokens
    text = limits.max_prompt - visual
    row = only(subject(made.directory, text_tokens=text, new_tokens=limits.max_new_tokens))
    pruned = None if manifest.llm_tokens is None else manifest.llm_tokens + text
    assert row.costs == directory_costs(made.directory, manifest, 1, 1, limits.max_prompt, pruned)
    assert row.counts == tuple(manifest.schedule["counts"])


def test_what_an_engine_directory_says_itself_is_not_asked(tmp_path: Path) -> None:
    made = write_engine(tmp_path / "engine", precision="fp16")
    for name, value in {"tokens": [8], "precision": "int4", "schedule": "masked", "decoder_layers": 2}.items():
        with pytest.raises(ConfigError, match=f"{name} must be left out for an engine directory"):
            subject(made.directory, **{name: value})
    with pytest.raises(ConfigError, match=r"text_tokens must be in 1\.\.48 for this directory, got 49"):
        subject(made.directory, text_tokens=49)
    with pytest.raises(ConfigError, match=r"batch must be in 1\.\.3 \(the directory's\), got 4"):
        subject(made.directory, batch=4)


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(EngineError, match=r"manifest\.json"):
        subject(tmp_path)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_no_weight_is_read(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("flowcut.synthetic.RandomWeights.load", load)
    row = only(subject("llava-1.5-7b", decoder_layers=2, precision=precision))
    assert row.costs["vision"].flops > 0


def test_a_models_directory_needs_its_config_alone(checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint() / "config.json").read_bytes())
    assert only(subject(tmp_path, tokens=[9])).visual == 9
