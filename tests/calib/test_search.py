"""The search within a budget, with scores that need no tower."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from calib.flops import flops, flops_share, least_share
from calib.search import REFINEMENTS, TRIED_FIRST, best_within
from flowcut.config import VisionConfig
from flowcut.errors import ConfigError
from flowcut.schedule import Schedule

VISION = VisionConfig(64, 128, 12, 4, 84, 7)  # 144 patches, 5 pruning points
TOKENS = 16
ADAPTIVE = np.array([[130, 110, 90, 70, 16], [120, 105, 92, 66, 16], [126, 100, 80, 60, 16], [140, 120, 99, 80, 16]])

Score = Callable[[tuple[int, ...]], float]


def near(*target: int) -> Score:
    return lambda counts: -sum(abs(a - b) for a, b in zip(counts, target, strict=True))


@pytest.mark.parametrize("share", [0.27, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_result_is_a_schedule_within_the_budget(share: float) -> None:
    tried = []

    def score(counts: tuple[int, ...]) -> float:
        tried.append(counts)
        return near(126, 108, 90, 68, 16)(counts)

    best = best_within(VISION, TOKENS, share, ADAPTIVE, score)
    Schedule("static", 144, TOKENS, best)  # falls, and ends at the budget
    assert flops_share(VISION, best) <= share
    assert all(flops(VISION, counts) <= share * flops(VISION) for counts in tried)
    assert len(tried) == len(set(tried)) <= TRIED_FIRST + REFINEMENTS
    assert best == max(tried, key=near(126, 108, 90, 68, 16))


def test_refinement_improves_on_the_families() -> None:
    target = (140, 139, 60, 20, 16)  # of no family
    tried: list[float] = []

    def score(counts: tuple[int, ...]) -> float:
        tried.append(near(*target)(counts))
        return tried[-1]

    best = best_within(VISION, TOKENS, 1.0, ADAPTIVE, score)
    assert near(*target)(best) > max(tried[:TRIED_FIRST])


def test_the_same_counts_and_scores_give_the_same_schedule() -> None:
    found = {best_within(VISION, TOKENS, 0.6, ADAPTIVE, near(100, 90, 70, 60, 16)) for _ in range(3)}
    assert len(found) == 1


def test_a_larger_budget_is_used_where_agreement_grows_with_it() -> None:
    shares = [flops_share(VISION, best_within(VISION, TOKENS, x, ADAPTIVE, sum)) for x in (0.3, 0.5, 0.7, 0.9)]
    assert all(b > a for a, b in pairwise(shares))


def test_the_least_share_is_met_and_less_is_refused_naming_it() -> None:
    least = least_share(VISION, TOKENS)
    assert best_within(VISION, TOKENS, least, ADAPTIVE, sum) == (16,) * 5
    with pytest.raises(ConfigError, match=r"X at least 0\.\d+ for 16 of 144 patches, got flops=0\.2") as error:
        best_within(VISION, TOKENS, 0.2, ADAPTIVE, sum)
    named = float(str(error.value).partition("at least ")[2].split()[0])
    assert least <= named < least + 1e-4
    assert best_within(VISION, TOKENS, named, ADAPTIVE, sum)[-1] == 16


def test_counts_that_never_fall_before_the_last_point_still_meet_a_budget() -> None:
    flat = np.array([[144, 144, 144, 144, 16]] * 3)
    assert flops_share(VISION, best_within(VISION, TOKENS, 0.4, flat, sum)) <= 0.4
