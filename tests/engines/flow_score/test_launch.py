"""Numbers that travel to a kernel as integers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engines.flow_score.launch import float_bits
from flowcut.errors import EngineError


@pytest.mark.parametrize("x", [0.0, 1e-45, 0.125, 128**-0.5, 0.5, 1.0, 3.4028234663852886e38])
def test_a_float_travels_as_its_bits(x: float) -> None:
    assert np.array(float_bits(x), np.int32).view(np.float32) == np.float32(x)


def test_minus_zero_is_zero() -> None:
    assert float_bits(-0.0) == 0


@pytest.mark.parametrize("x", [-1.0, -1e-45, math.inf, -math.inf, math.nan, 1e39])
def test_what_is_no_weight_and_no_scale_is_refused(x: float) -> None:
    with pytest.raises(EngineError, match="must be finite and 0 or more, got"):
        float_bits(x)
