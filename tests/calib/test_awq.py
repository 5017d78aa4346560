"""AWQ's search: what it claims is what float64 finds, and it helps where some channels are large."""

from __future__ import annotations

import numpy as np
import pytest

from calib import awq
from calib.awq import search
from calib.rounding import round_weight

Array = np.ndarray

pytestmark = pytest.mark.usefixtures("one_thread")


def layers(*outputs: int, inputs: int = 256, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [0.05 * rng.standard_normal((n, inputs), dtype=np.float32) for n in outputs]


def tokens(large: int = 0, times: float = 20, inputs: int = 256, seed: int = 1) -> Array:
    """[96, inputs], of whose channels the first `large` are so many times as large."""
    x = np.random.default_rng(seed).standard_normal((96, inputs), dtype=np.float32)
    x[:, :large] *= times
    return x


def error(weights: list[Array], x: Array, scale: Array) -> float:
    """In float64: the root of the mean, over layers and tokens, of squared error over squared output."""
    shares = []
    for w in weights:
        rounded = round_weight(w * scale, "int4").widened().astype(np.float64) / scale
        y = x.astype(np.float64) @ w.T.astype(np.float64)
        wrong = x.astype(np.float64) @ rounded.T - y
        shares.append(np.mean(np.square(wrong).sum(1) / np.square(y).sum(1)))
    return float(np.sqrt(np.mean(shares)))


def found_for(weights: list[Array], x: Array) -> awq.Found:
    return search(weights, x, np.abs(x).mean(0))


@pytest.mark.parametrize("outputs", [(64,), (96, 64, 32)])
@pytest.mark.parametrize("large", [0, 5])
def test_errors_are_those_of_the_scale(outputs: tuple[int, ...], large: int) -> None:
    weights, x = layers(*outputs), tokens(large)
    found = found_for(weights, x)
    assert found.before == pytest.approx(error(weights, x, np.ones(256)), rel=1e-4)
    assert found.after == pytest.approx(error(weights, x, found.scale), rel=1e-4)
    assert found.after <= found.before


def test_large_channels_are_protected() -> None:
    weights, x = layers(128), tokens(large=1, times=100)
    found = found_for(weights, x)
    assert found.after < 0.75 * found.before
    assert found.scale[0] > 2 * found.scale[1:].max()
    unseen = tokens(large=1, times=100, seed=2)
    assert error(weights, unseen, found.scale) < 0.75 * error(weights, unseen, np.ones(256))


def test_nothing_tried_is_better() -> None:
    """The search takes the best of a grid that is made anew here."""
    weights, x = layers(128), tokens(large=5)
    mean, size = np.abs(x).mean(0, dtype=np.float64), np.abs(weights[0]).mean(0, dtype=np.float64)
    grid = [mean ** (a / 10) / size**b for a in range(11) for b in (0, 0.5)]
    assert found_for(weights, x).after <= min(error(weights, x, s / np.sqrt(s.max() * s.min())) for s in grid) * 1.0001


def test_one_huge_token_does_not_decide_alone() -> None:
    """The channels that are large in it alone must not take resolution from those that all other tokens use."""
    weights, x = layers(128), tokens()
    x[0] = 0
    x[0, 200:205] = 1e5
    found = found_for(weights, x)
    assert error(weights, x[1:], found.scale) < 1.03 * error(weights, x[1:], np.ones(256))


def test_where_nothing_is_gained_nothing_is_scaled() -> None:
    found = found_for(layers(32), np.zeros((4, 256), np.float32))
    assert (found.before, found.after) == (0.0, 0.0)
    assert np.array_equal(found.scale, np.ones(256))


def test_channels_of_zeros_get_a_scale_that_float16_holds() -> None:
    weights, x = layers(64), tokens(large=5)
    x[:, 100:120] = 0
    weights[0][:, 50:60] = 0
    scale = found_for(weights, x).scale
    assert scale.dtype == np.float32
    assert 1e-4 < scale.min() <= scale.max() < 1e4
    assert scale.max() * scale.min() == pytest.approx(1, rel=1e-4)


def test_some_outputs_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = layers(700, 500), tokens(large=5)
    of_all = found_for(weights, x)
    monkeypatch.setattr(awq, "TRIED_ROWS", 64)
    monkeypatch.setattr(awq, "_CHUNK", 100)
    of_some = found_for(weights, x)
    assert of_some.before == pytest.approx(of_all.before, rel=1e-6)
    assert of_some.after < 1.02 * of_all.after


def test_same_inputs_same_scale() -> None:
    first, second = (found_for(layers(64), tokens(large=3)) for _ in range(2))
    assert np.array_equal(first.scale, second.scale)
