"""Constants from counts, and what --choose may say."""

from __future__ import annotations

import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calib.choice import Choice, constants, quantile, spread
from flowcut.errors import ConfigError

COUNTS = np.array([[50, 30, 8], [41, 30, 8], [45, 21, 8], [42, 22, 8]])


def test_constants_by_hand() -> None:
    assert constants(COUNTS, "median") == (44, 26, 8)  # 43.5 and 26.0: a half goes up
    assert constants(COUNTS, "p90") == (50, 30, 8)
    assert constants(COUNTS, "max") == (50, 30, 8)
    assert quantile(COUNTS, 0.5) == (42, 22, 8)


def test_p90_leaves_out_a_tenth() -> None:
    counts = np.arange(1, 11)[:, None]
    assert constants(counts, "p90") == (9,)
    assert constants(counts, "max") == (10,)
    assert constants(counts, "median") == (6,)


@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 6)), elements=st.integers(8, 600)))
def test_constants_fall_where_every_pictures_counts_do(drawn: np.ndarray) -> None:
    counts = -np.sort(-drawn, axis=1)
    for rule in ("median", "p90", "max"):
        assert all(a >= b for a, b in pairwise(constants(counts, rule)))  # type: ignore[arg-type]
    expected = [int(statistics.median(column) + 0.5) for column in counts.T.tolist()]
    assert list(constants(counts, "median")) == expected


def test_spread_of_each_point() -> None:
    assert spread(COUNTS, [1, 3, 5])[:2] == [
        {"layer": 1, "mean": 44.5, "min": 41, "max": 50},
        {"layer": 3, "mean": 25.75, "min": 21, "max": 30},
    ]


@pytest.mark.parametrize("text", ["median", "p90", "max", "flops=0.5", "flops=1"])
def test_a_choice_survives_being_written(text: str) -> None:
    assert str(Choice.parse(text)) == text
    assert Choice.parse("flops=.25") == Choice("flops", 0.25)


@pytest.mark.parametrize("text", ["flops=0", "flops=1.01", "flops=-1", "flops=1e999", "flops=..", "flops=1e-400"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"choose must be flops=X with X, .*in \(0, 1\], got 'flops="):
        Choice.parse(text)


@pytest.mark.parametrize("text", ["", "mean", "flops", "flops=", "flops=nan", "p95", "MEDIAN"])
def test_another_rule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"choose must be median, p90, max or flops=X, got"):
        Choice.parse(text)
