"""What is drawn from, against transformers' processors; and the draws."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engines.runtime.sampling import Sampler, Sampling, distribution, penalized
from flowcut.errors import ConfigError, EngineError

processes = pytest.importorskip("transformers.generation.logits_process")

LOGITS = st.lists(
    st.one_of(st.integers(-960, 960).map(lambda x: x / 32), st.just(float("-inf"))), min_size=1, max_size=40
).filter(lambda values: max(values) > float("-inf"))
SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.9, 30.0]),
        "top_k": st.one_of(st.none(), st.integers(1, 45)),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.6, 5.0]),
    }
)


def theirs(logits: np.ndarray, prompt: list[int], sampling: Sampling) -> np.ndarray:
    """Probabilities [vocab] by transformers, in its order, in float64."""
    scores, ids = torch.from_numpy(logits).double()[None], torch.tensor([prompt])
    chain: list[Any] = []
    if sampling.repetition_penalty != 1:
        chain.append(processes.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(processes.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        chain.append(processes.TopKLogitsWarper(sampling.top_k, min_tokens_to_keep=1))
    if sampling.top_p < 1:
        chain.append(processes.TopPLogitsWarper(sampling.top_p, min_tokens_to_keep=1))
    for process in chain:
        scores = process(ids, scores)
    result: np.ndarray = scores.softmax(-1)[0].numpy()
    return result


def ours(logits: np.ndarray, prompt: list[int], sampling: Sampling) -> np.ndarray:
    scores = penalized(logits, np.unique(prompt), sampling.repetition_penalty)
    tokens, shares = distribution(scores, sampling)
    result = np.zeros(len(logits))
    result[tokens] = shares
    return result


@settings(max_examples=400, deadline=None)
@given(LOGITS, SETTINGS, st.data())
def test_the_distribution_equals_transformers(values: list[float], chosen: dict[str, Any], data: st.DataObject) -> None:
    logits = np.array(values, np.float32)
    prompt = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=8))
    sampling = Sampling(**chosen)
    expected, got = theirs(logits, prompt, sampling), ours(logits, prompt, sampling)
    without = np.sort(ours(logits, prompt, Sampling(**chosen | {"top_p": 1.0})))
    sums = np.cumsum(without)
    assume(sampling.top_p == 1 or np.abs(sums - (1 - sampling.top_p)).min() > 1e-6)  # where rounding decides
    if len(set(without[without > 0])) == np.count_nonzero(without):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    else:  # which of several alike is left out at the edge is nobody's promise
        np.testing.assert_allclose(np.sort(got), np.sort(expected), atol=1e-6)


def test_a_large_vocabulary_equals_transformers() -> None:
    logits = np.random.default_rng(0).normal(0, 4, 32064).astype(np.float32)
    for sampling in (Sampling(temperature=0.8, top_p=0.9), Sampling(temperature=2.0, top_k=300, top_p=0.95)):
        expected, got = theirs(logits, [0], sampling), ours(logits, [0], sampling)
        assert (got > 0).tolist() == (expected > 0).tolist()
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-9, 1.0, 1e300])
def test_no_temperature_overflows(temperature: float) -> None:
    logits = np.array([-np.inf, 3e38, -3e38, 2.0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens, shares = distribution(logits, Sampling(temperature=temperature))
        token = Sampler(Sampling(temperature=temperature, seed=1), [0]).next(logits)
    assert np.isfinite(shares).all()
    assert shares.sum() == pytest.approx(1)
    assert token in tokens
    if temperature < 1e200:
        assert token == 1


@given(st.lists(st.integers(-10_000, 10_000), min_size=2, max_size=30, unique=True), st.floats(1e-6, 1e6))
def test_the_likeliest_alone_is_greedy_at_any_temperature(values: list[int], temperature: float) -> None:
    logits = np.array(values, np.float32) / 16
    assert Sampler(Sampling(temperature=temperature, top_k=1), [0]).next(logits) == int(logits.argmax())
    assert Sampler(Sampling(temperature=temperature, top_p=1e-30), [0]).next(logits) == int(logits.argmax())


def test_without_a_temperature_the_rest_is_ignored() -> None:
    logits = np.random.default_rng(1).normal(0, 1, 50).astype(np.float32)
    for seed in range(5):
        assert Sampler(Sampling(top_k=9, top_p=0.5, seed=seed), [0]).next(logits) == int(logits.argmax())


def test_a_penalty_counts_prompt_and_answer() -> None:
    logits = np.array([4.0, 3.0, 2.5, -1.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    assert [sampler.next(logits) for _ in range(4)] == [1, 2, 0, 0]
    np.testing.assert_array_equal(logits, [4.0, 3.0, 2.5, -1.0])


def draws(sampling: Sampling, logits: np.ndarray, count: int) -> list[int]:
    sampler = Sampler(sampling, [0])
    return [sampler.next(logits) for _ in range(count)]


def test_draws_follow_the_distribution() -> None:
    """Pearson's statistic of 20,000 draws, for fixed seeds; with 7 degrees of freedom 1 in 10,000 exceeds 29.9."""
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, -np.inf, 1.5, 0.2], np.float32)
    for seed in range(3):
        sampling, count = Sampling(temperature=1.3, seed=seed), 20_000
        seen, expected = Counter(draws(sampling, logits, count)), theirs(logits, [0], sampling) * count
        assert 6 not in seen
        statistic = sum((seen[i] - e) ** 2 / e for i, e in enumerate(expected) if e > 0)
        assert statistic < 29.9


def test_a_seed_repeats_the_draws_and_none_does_not() -> None:
    logits = np.zeros(1000, np.float32)
    first, again, other = (draws(Sampling(temperature=1.0, seed=seed), logits, 20) for seed in (7, 7, 8))
    assert first == again != other
    unseeded = Sampling(temperature=1.0)
    assert draws(unseeded, logits, 20) != draws(unseeded, logits, 20)


@pytest.mark.parametrize(
    ("logits", "what"),
    [([0.0, float("nan"), 1.0], "nan for token 1"), ([0.0, float("inf")], "inf"), ([float("-inf")] * 3, "-inf")],
)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(repetition_penalty=2.0)])
def test_logits_that_are_no_numbers_are_an_error(logits: list[float], what: str, sampling: Sampling) -> None:
    with pytest.raises(EngineError, match=f"logits must be numbers .*, got {what}"):
        Sampler(sampling, [0]).next(np.array(logits, np.float32))


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1 or None, got 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be at least 1 or None, got True"),
        ({"temperature": -0.1}, r"temperature must be a number at least 0, got -0\.1"),
        ({"temperature": float("nan")}, "temperature must be a number at least 0, got nan"),
        ({"temperature": "1"}, "temperature must be a number at least 0, got '1'"),
        ({"top_k": 0}, "top_k must be at least 1 or None, got 0"),
        ({"top_p": 0.0}, r"top_p must be a number above 0 and at most 1, got 0\.0"),
        ({"top_p": 1.5}, r"top_p must be a number above 0 and at most 1, got 1\.5"),
        ({"temperature": 10**400}, "temperature must be a number at least 0, got 1000"),
        ({"temperature": True}, "temperature must be a number at least 0, got True"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 1e-06 to 1e[+]06, got 0"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty must be a number from 1e-06 to 1e[+]06, got 1e-300"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be a number from 1e-06 to 1e[+]06, got 1e[+]39"),
        ({"seed": -1}, "seed must be at least 0 or None, got -1"),
        ({"stop": ""}, "stop must be strings of at least one character"),
        ({"stop": ("a", "")}, "stop must be strings of at least one character"),
        ({"stop": (7,)}, "stop must be strings of at least one character"),
        ({"stop": 7}, "stop must be strings of at least one character, got 7"),
    ],
)
def test_settings_are_checked(setting: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Sampling(**setting)


def test_numbers_of_numpy_are_numbers() -> None:
    numbers: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "seed": 7}
    as_numpy = {name: np.array(value)[()] for name, value in numbers.items()}
    narrow = {
        name: np.array(value, np.float32 if isinstance(value, float) else np.int16)[()]
        for name, value in numbers.items()
    }
    assert Sampling(**numbers) == Sampling(**as_numpy) == Sampling(**narrow)
    assert {type(value) for value in vars(Sampling(**narrow)).values()} == {int, float, tuple}


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_greatest_penalties_stay_numbers(penalty: float, temperature: float) -> None:
    logits = np.array([65504.0, -65504.0, 0.0, 1.0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token = Sampler(Sampling(repetition_penalty=penalty, temperature=temperature, seed=1), [0, 1, 2]).next(logits)
    assert token == (0 if penalty < 1 else 3) or (temperature and penalty > 1 and token == 2)


def test_one_stop_string_may_be_given_as_it_is() -> None:
    assert Sampling(stop="red").stop == ("red",)  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
