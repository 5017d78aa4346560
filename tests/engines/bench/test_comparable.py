"""What may be compared, and what is asked for in vain: known before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import write_engine

from engines.bench.comparable import check_out, manifests, mismatches
from engines.bench.settings import BenchSettings
from flowcut.artifacts import Manifest, read_manifest
from flowcut.contract import Limits
from flowcut.errors import ConfigError, EngineError

LIMITS = Limits(max_batch=2, max_images=2, max_prompt=200, max_new_tokens=4)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("comparable") / "pruned", limits=LIMITS).directory


@pytest.fixture(scope="module")
def manifest(pruned: Path) -> Manifest:
    return read_manifest(pruned)


def test_pruned_and_unpruned_of_one_model_may_be_compared(manifest: Manifest) -> None:
    whole = {"kind": "off", "patches": 144, "tokens": 144, "counts": [], "selector": "flowcut"}
    room = replace(LIMITS, max_prompt=200 + 144 - 16)
    baseline = replace(manifest, tokens=144, schedule=whole, limits=room, sha256="f" * 64)
    assert mismatches(manifest, baseline, "auto") == []


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "other"}, "model is other, not llava-tiny"),
    "precision": ({"precision": "fp16"}, "precision is fp16, not fp32"),
    "vision precision": ({"vision_precision": "int8"}, "vision precision is int8, not fp32"),
    "weights": ({"source_sha256": "abc"}, "weights is checkpoint abc, not checkpoint "),
    "random weights": ({"weights": "random", "seed": 3}, "weights is random seed 3, not checkpoint "),
    "calibration": ({"calibration": {"sha256": "f" * 64, "pictures": 3}}, "calibration is ffffffffffff, not none"),
    "stages": ({"stages": 2}, "stages is 2, not 1"),
    "cache": ({"limits": replace(LIMITS, max_prompt=300)}, "room for text is 284, not 184"),
    "answer": ({"limits": replace(LIMITS, max_new_tokens=9)}, "room for the answer is 9, not 4"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_is_named(manifest: Manifest, name: str) -> None:
    change, said = DIFFERENCES[name]
    whole = replace(manifest, tokens=144, sha256="f" * 64)
    room = {"limits": replace(LIMITS, max_prompt=200 + 144 - 16)}
    if "limits" in change:
        own = change["limits"]
        room = {"limits": replace(own, max_prompt=own.max_prompt + 144 - 16)}
    assert mismatches(manifest, replace(whole, **(change | room)), "auto") == [said]


def test_fewer_decoder_layers_are_another_geometry(manifest: Manifest) -> None:
    text = replace(manifest.geometry.text, num_hidden_layers=2)
    other = replace(manifest, geometry=replace(manifest.geometry, text=text))
    line, *_ = mismatches(manifest, other, "auto")
    assert line.startswith("geometry is 12 x 128 of 168 px and 2 x ")


def test_a_baseline_that_prunes_is_no_baseline_unless_allowed(manifest: Manifest) -> None:
    other = replace(manifest, tokens=48, limits=replace(LIMITS, max_prompt=200 + 48 - 16), sha256="f" * 64)
    assert mismatches(manifest, other, "auto") == ["visual tokens is 48 of 144, not all of them"]
    assert mismatches(manifest, manifest, "auto")[-1] == "engine is this very one, not another"


def test_a_mismatch_is_refused_unless_it_is_allowed(pruned: Path, tmp_path: Path) -> None:
    other = write_engine(tmp_path / "other", precision="fp16", limits=LIMITS).directory
    with pytest.raises(ConfigError, match=r"precision is fp16, not fp32; .*--allow-mismatch"):
        manifests(BenchSettings(pruned, other, new_tokens=4))
    _, _, found = manifests(BenchSettings(pruned, other, allow_mismatch=True, new_tokens=4))
    assert found[:2] == ["precision is fp16, not fp32", "vision precision is fp16, not fp32"]


def test_a_batch_beyond_the_profile_is_refused(pruned: Path) -> None:
    manifests(BenchSettings(pruned, batches=(1, 2), new_tokens=4))
    with pytest.raises(ConfigError, match=r"batch must be at most 2 .*got 4\. Build it again with --max-batch 4"):
        manifests(BenchSettings(pruned, batches=(1, 4), new_tokens=4))


def test_a_baselines_profile_counts_too(pruned: Path, tmp_path: Path) -> None:
    small = write_engine(tmp_path / "small", limits=replace(LIMITS, max_batch=1)).directory
    with pytest.raises(ConfigError, match=f"{small} was built for"):
        manifests(BenchSettings(pruned, small, batches=(2,), new_tokens=4))


def test_an_answer_beyond_the_cache_is_refused(pruned: Path) -> None:
    with pytest.raises(ConfigError, match=r"new_tokens must be at most 4 .*got 5"):
        manifests(BenchSettings(pruned, new_tokens=5))


def test_right_answers_of_random_weights_are_not_counted(tmp_path: Path) -> None:
    random = write_engine(tmp_path / "random", random=True, limits=LIMITS).directory
    with pytest.raises(ConfigError, match=r"scenes must be 0 with random weights"):
        manifests(BenchSettings(random, scenes=3, new_tokens=2))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no repeats": ({"repeats": 0}, "repeats must be a whole number, at least 1, got 0"),
    "negative warm-up": ({"warmup": -1}, "warmup must be a whole number, at least 0, got -1"),
    "no tokens": ({"new_tokens": 0}, "new_tokens must be"),
    "no threads": ({"threads": 0}, "threads must be"),
    "no prompt": ({"prompt_tokens": 0}, "prompt_tokens must be"),
    "batch of none": ({"batches": (0,)}, "batch must be a whole number, at least 1, got 0"),
    "no batch": ({"batches": ()}, "batch must be one number or several"),
    "a batch twice": ({"batches": (2, 2)}, "batch must be one number or several"),
    "no picture": ({"pictures": ()}, "image must be at least one"),
    "cuda graphs": ({"cuda_graphs": "maybe"}, "cuda_graphs must be one of both, on, off"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    change, said = BAD[name]
    with pytest.raises(ConfigError, match=said):
        BenchSettings(Path("engine"), **change)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(EngineError, match="backend must be one of"):
        BenchSettings(Path("engine"), backend="cuda")


def test_results_lie_beside_the_engine_directory(pruned: Path) -> None:
    settings = BenchSettings(pruned)
    assert settings.results == pruned.with_name("pruned.bench")
    check_out(settings)


def test_results_may_replace_results_and_nothing_else(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    settings = BenchSettings(pruned, out=out)
    check_out(settings)
    (out / "bench.json").write_text("{}")
    check_out(settings)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"out must be new, empty or hold results of flowcut bench.*thesis\.tex"):
        check_out(settings)


def test_an_engine_directory_is_no_place_for_results(pruned: Path) -> None:
    with pytest.raises(ConfigError, match="which is sealed"):
        check_out(BenchSettings(pruned, out=pruned))


def test_a_place_that_cannot_be_is_refused(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out must be in an existing directory"):
        check_out(BenchSettings(pruned, out=tmp_path / "none" / "out"))
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="out must be a directory, got the file"):
        check_out(BenchSettings(pruned, out=tmp_path / "file"))
