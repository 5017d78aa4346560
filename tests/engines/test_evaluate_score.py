"""Intervals against numbers worked out elsewhere, and what counts as one question."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engines.evaluate_score import Answered, bootstrap, by_kind, by_selector, overall, wilson
from flowcut.tiny.questions import KINDS, Kind


def answered(
    scene: int, right: bool, kind: Kind = "color", question: str = "What?", selector: str = "flowcut"
) -> Answered:
    return Answered(scene, kind, question, "red", "red" if right else "blue", selector)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe (1998), table I, method 3, and the textbook's half of a hundred.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_equals_published_intervals(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1 - right / n, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_bootstrap_of_independent_questions_is_the_normal_interval() -> None:
    answers = [answered(scene, scene % 4 > 0) for scene in range(800)]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 800)
    assert bootstrap(answers) == pytest.approx((0.75 - half, 0.75 + half), abs=0.004)
    assert bootstrap(answers) == bootstrap(answers)
    assert bootstrap(answers, seed=1) != bootstrap(answers)


def test_bootstrap_counts_scenes_not_questions() -> None:
    alone = [answered(scene, scene % 2 == 0) for scene in range(100)]
    copied = [answered(scene, scene % 2 == 0, kind) for scene in range(100) for kind in KINDS]
    assert bootstrap(copied) == pytest.approx(bootstrap(alone))
    low, high = wilson(0.5, len(copied))
    assert bootstrap(copied)[1] - bootstrap(copied)[0] > 2 * (high - low)


def test_scenes_that_are_all_alike_are_not_taken_for_certainty() -> None:
    low, high = bootstrap([answered(7, right, kind) for right, kind in zip([True] * 5 + [False], KINDS, strict=True)])
    assert (low, high) == wilson(5 / 6, 1)
    assert high - low > 0.5


def test_bootstrap_weighs_scenes_by_their_questions() -> None:
    answers = [answered(0, True, kind) for kind in KINDS[:3]] + [answered(1, False)]
    # of two scenes the draws are both, the first alone or the second alone: 0.75, 1 and 0
    assert bootstrap(answers) == (0.0, 1.0)
    assert overall(answers).accuracy == 0.75


@pytest.mark.parametrize("right", [True, False])
def test_without_variation_scenes_are_trials(right: bool) -> None:
    answers = [answered(scene, right, kind) for scene in range(30) for kind in KINDS]
    assert bootstrap(answers) == wilson(float(right), 30)


def test_each_kind_has_its_own_score() -> None:
    rng = np.random.default_rng(0)
    answers = [answered(scene, bool(rng.random() < 0.7), kind) for scene in range(40) for kind in KINDS[1:]]
    scores = by_kind(answers)
    assert list(scores) == list(KINDS[1:])
    for kind, score in scores.items():
        right = sum(a.right for a in answers if a.kind == kind)
        assert (score.accuracy, score.n, score.interval) == (right / 40, 40, wilson(right / 40, 40))


def test_several_seeds_are_averaged_and_ask_no_more_questions() -> None:
    shares = {"random-0": 3, "random-1": 6, "random-2": 0}
    answers = [answered(scene, scene < right, selector=name) for name, right in shares.items() for scene in range(10)]
    assert by_selector(answers) == {"random-0": 0.3, "random-1": 0.6, "random-2": 0.0}
    assert overall(answers).accuracy == pytest.approx(0.3)
    assert overall(answers).n == 10
    assert by_kind(answers)["color"].interval == wilson(0.3, 10)


def test_only_the_exact_word_is_right() -> None:
    for got, right in {"red": True, "Red": False, "red.": False, "": False, "dark red": False}.items():
        assert Answered(0, "color", "What?", "red", got, "flowcut").right is right
