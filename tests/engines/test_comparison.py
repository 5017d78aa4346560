"""What verify allows, and how it tells ties from errors where scores are at hand."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from engines.comparison import TOLERANCES, Judge, Led, Report, Row, tolerance, vision_tolerance
from flowcut.config import Precision

KEPT = np.arange(16)[None]
OTHER = np.append(np.arange(14), [20, 21])[None]  # two of sixteen: agreement 14 / 18
EMBEDS = np.random.default_rng(0).standard_normal((1, 16, 8)).astype(np.float32)
JUDGE = Judge("vision", "torch", "onnxruntime", TOLERANCES["fp16"])


def verdicts(led: Led, kept: np.ndarray = OTHER, judge: Judge = JUDGE) -> list[str]:
    """Of kept and image_embeds, where torch keeps KEPT and, led, returns `led`."""
    gaps = []

    def lead(wanted: np.ndarray, score_gap: float) -> Led:
        np.testing.assert_array_equal(wanted, kept)
        gaps.append(score_gap)
        return led

    got, expected = ({"kept": k, "image_embeds": EMBEDS} for k in (kept, KEPT))
    found = [r.verdict for r in judge.vision(got, expected, 144, lead)]
    assert gaps == [judge.tolerance.score_gap]
    return found


def test_equal_scores_are_a_tie_and_others_are_not() -> None:
    assert verdicts(Led(EMBEDS, 0.009, 0.009, 0.5)) == ["tie", "ok"]
    assert verdicts(Led(EMBEDS, 0.011, 0.011, 0.5)) == ["FAILED", "ok"]


def test_after_a_tie_later_gaps_tell_nothing_if_most_patches_agree() -> None:
    assert verdicts(Led(EMBEDS, 1.5, 0.0, 0.001)) == ["tie", "ok"]
    assert verdicts(Led(EMBEDS, 1.5, 0.02, 0.001)) == ["FAILED", "ok"]  # one was wrong before the tie
    few = np.append(np.arange(12), [20, 21, 22, 23])[None]  # agreement 12 / 20
    assert verdicts(Led(EMBEDS, 1.5, 0.0, 0.001), few) == ["FAILED", "ok"]


def test_after_a_tie_features_may_differ_by_more() -> None:
    off = EMBEDS * np.float32(1.05)
    assert verdicts(Led(off, 1.5, 0.0, 0.001)) == ["tie", "tie"]
    assert verdicts(Led(off, 0.0, 0.0, 0.5)) == ["tie", "FAILED"]
    assert verdicts(Led(EMBEDS * np.float32(1.2), 1.5, 0.0, 0.001)) == ["tie", "FAILED"]


def test_every_precision_has_a_tolerance() -> None:
    assert TOLERANCES.keys() == set(get_args(Precision))
    for precision in get_args(Precision):
        assert tolerance(precision, "tensorrt_rtx") == TOLERANCES[precision]
    assert tolerance("bf16", "onnxruntime").values < TOLERANCES["bf16"].values / 10  # computed in float32


@pytest.mark.parametrize(("vision", "language", "values"), [
    ("fp32", "fp32", 1e-4),
    ("fp32", "bf16", 1e-4),
    ("fp32", "fp16", 2e-2),
    ("fp32", "fp8", 2e-2),
    ("fp8", "fp16", 2e-1),
])  # fmt: skip
def test_image_embeddings_in_float16_lose_what_float16_does(vision: str, language: str, values: float) -> None:
    allowed = vision_tolerance(vision, language, "onnxruntime")
    assert allowed == replace(TOLERANCES[vision], values=values)


def test_every_graph_has_to_be_compared() -> None:
    rows = tuple(Row(g, "torch", "onnxruntime", "values", "ok", 0.0, 1.0) for g in ("vision", "language.0"))
    report = Report("d", "m", "", "int4", "int8", ("vision", "language.0", "language.1"), "", rows)
    assert not report.ok
    weights = Row("language.1", "checkpoint", "onnx", "weights", "ok", 0.0, 1e-6)
    assert not replace(report, rows=(*rows, weights)).ok  # what is stored has not been run
    assert replace(report, rows=(*rows, replace(rows[0], graph="language.1"))).ok
    data = report.to_dict()
    assert (data["tolerance"]["values"], data["vision_tolerance"]["values"]) == (2e-2, 2e-2)
