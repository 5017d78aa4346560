"""What a speed-up costs is said with the strongest evidence, and where there is none, why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_files import KEPT, SAME, bench, write_bench

from engines.webpage.quality import Quality, quality
from engines.webpage.results import read_run


def _quality(tmp_path: Path, subject: str = "pruned", **changes: Any) -> Quality:
    return quality(read_run(write_bench(tmp_path / "r", bench(**changes))).bench, subject)


def test_right_answers_come_first_with_interval_number_and_the_baseline_s(tmp_path: Path) -> None:
    pruned = {"accuracy": 0.83, "n": 300, "interval": [0.784, 0.869]}
    score = {"pruned": pruned, "baseline": {"accuracy": 0.993, "n": 300, "interval": [0.97, 0.998]}, "scenes": 50}
    document = bench() | {"accuracy": {**score, "split": "test"}}
    found = quality(read_run(write_bench(tmp_path / "s", document)).bench)
    assert found.short == "right 83.0%"
    assert found.lines[0] == (
        "accuracy 83.0% (95% 78.4% to 86.9%) of 300 questions, "
        "the baseline's 99.3% (95% 97.0% to 99.8%) of 300 questions"
    )
    assert "same first token 75%, cosine of logits 0.981 (4 prompts)" in found.lines[1]
    assert found.lines[2] == "kept patches overlap 0.87 with adaptive, fp32, PyTorch (4 pictures)"
    assert found.known


def test_agreement_stands_in_where_accuracy_is_not_known(tmp_path: Path) -> None:
    found = _quality(tmp_path)
    assert found.short == "agree 75%"
    assert found.lines[-1] == "accuracy not known: its bench.json holds none"


def test_overlap_stands_in_where_there_is_no_baseline(tmp_path: Path) -> None:
    found = _quality(tmp_path, baseline=False)
    assert found.short == "overlap 0.87"
    assert "baseline" not in found.text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weights": "random"}, "accuracy not known: the weights are random, so that no answer is right or wrong"),
        ({"accuracy_reason": "no questions for this model"}, "accuracy not known: no questions for this model"),
        ({}, "accuracy not known: its bench.json holds none"),
    ],
)
def test_nothing_known_gives_every_reason(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    agreement = {"kept": None, "kept_reason": "torch is not installed.", "baseline": None}
    found = _quality(tmp_path, agreement=agreement, **changes)
    assert not found.known
    assert found.short == "not known"
    assert found.lines == (
        why,
        "agreement with the baseline not known: its bench.json holds none",
        "overlap of the kept patches not known: torch is not installed",
    )


def test_a_peer_s_quality_is_not_the_pruned_engine_s(tmp_path: Path) -> None:
    found = _quality(tmp_path, "transformers-sdpa", peers=["transformers-sdpa"], accuracy=True)
    assert not found.known
    assert "transformers-sdpa not known" in found.text


def test_the_baseline_s_own_answers_are_known_where_they_were_counted(tmp_path: Path) -> None:
    assert _quality(tmp_path, "baseline", accuracy=True).short == "right 99.3%"


def test_the_figures_are_those_of_the_files() -> None:
    assert (SAME["same_first_token"], SAME["logits_cosine"], KEPT["jaccard"]) == (0.75, 0.981, 0.87)
