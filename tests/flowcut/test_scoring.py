"""Flow scores against a float64 reading of the specification, ordinary inputs and hostile ones."""

from __future__ import annotations

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcut.schedule import Schedule
from flowcut.scoring import accumulate, flow_score, running_score, token_score

TINY = np.finfo(np.float32).tiny
Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_qkv(shape: tuple[int, int, int], seed: int = 0, scale: float = 1.0) -> Inputs:
    """q, k, v [H, N+1, d], float32; v multiplied by `scale`."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape, np.float32) for _ in range(3))
    return q, k, v * np.float32(scale)


def one_huge_value(where: int) -> Inputs:
    qkv = random_qkv((4, 17, 16))
    qkv[where][1, 0 if where == 0 else 5, 3] = 65504
    return qkv


def everything_huge() -> Inputs:
    q, k, v = random_qkv((4, 17, 16))
    return tuple(np.sign(x) * np.float32(65504) for x in (q, k, v))  # type: ignore[return-value]


HOSTILE = {
    "huge-q": one_huge_value(0),
    "huge-k": one_huge_value(1),
    "huge-v": one_huge_value(2),
    "all-65504": everything_huge(),
    "all-equal": tuple(np.full((4, 17, 16), 0.5, np.float32) for _ in range(3)),
    "constant-rows": tuple(np.repeat(x[:, :, :1], 16, 2) for x in random_qkv((4, 17, 16))),
    "small-v": random_qkv((4, 17, 16), scale=1e-4),
    "large-v": random_qkv((4, 17, 16), scale=1e3),
    "one-patch": random_qkv((4, 2, 16)),
    "one-head": random_qkv((1, 17, 16)),
}


def scored(qkv: Inputs, valid: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """score [N] and entropy ratio of one image."""
    q, k, v = (torch.from_numpy(np.ascontiguousarray(x))[None] for x in qkv)
    result = flow_score(q, k, v, None if valid is None else torch.from_numpy(valid)[None])
    return result.score[0].numpy(), float(result.entropy_ratio[0])


def assert_close_to_reference(score: np.ndarray, entropy_ratio: float, qkv: Inputs) -> None:
    expected = references.flow_score(*qkv)
    tolerance = expected.tolerance
    assert np.isfinite(score).all()
    assert (score >= 0).all()
    # Shares below float32's least number become 0, whatever the logits.
    floor = TINY * np.abs(qkv[2]).sum()
    np.testing.assert_allclose(score, expected.score, rtol=tolerance, atol=floor)
    assert entropy_ratio == pytest.approx(expected.entropy_ratio, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("qkv", HOSTILE.values(), ids=HOSTILE.keys())
def test_matches_the_float64_reference_on_hostile_inputs(qkv: Inputs) -> None:
    assert_close_to_reference(*scored(qkv), qkv)


@pytest.mark.parametrize("qkv", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("name", ["no-semantic", "no-strength", "cls"])
def test_a_score_less_a_part_matches_the_float64_reference(name: str, qkv: Inputs) -> None:
    q, k, v = (torch.from_numpy(np.ascontiguousarray(x))[None] for x in qkv)
    result = running_score(Schedule("static", 64, 8, (8,), name), None, q, k, v)
    expected = references.flow_score(*qkv, name)
    tolerance = expected.tolerance
    floor = TINY * max(1.0, np.abs(qkv[2]).sum())
    np.testing.assert_allclose(result.score[0], expected.score, rtol=tolerance, atol=floor)
    assert float(result.entropy_ratio[0]) == pytest.approx(expected.entropy_ratio, rel=tolerance, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 6),
    patches=st.integers(1, 70),
    size=st.sampled_from([1, 8, 33]),
    exponent=st.floats(-4, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_the_float64_reference_at_any_shape_and_scale(
    heads: int, patches: int, size: int, exponent: float, seed: int
) -> None:
    qkv = random_qkv((heads, patches + 1, size), seed, 10.0**exponent)
    expected = references.flow_score(*qkv)
    score, entropy_ratio = scored(qkv)
    assert np.isfinite(score).all()
    assert (score >= 0).all()
    tolerance = expected.tolerance
    # Few heads of one element each may cancel in the mean value: measure against the largest score.
    assert np.abs(score - expected.score).max() <= tolerance * expected.score.max() + TINY
    assert entropy_ratio == pytest.approx(expected.entropy_ratio, rel=tolerance, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), magnitude=st.sampled_from([1e-30, 1e-4, 1.0, 1e2, 65504.0]))
def test_is_finite_and_non_negative_whatever_the_magnitude(seed: int, magnitude: float) -> None:
    rng = np.random.default_rng(seed)
    qkv = tuple(rng.uniform(-1, 1, (3, 9, 8)).astype(np.float32) * np.float32(magnitude) for _ in range(3))
    score, entropy_ratio = scored(qkv)  # type: ignore[arg-type]
    assert np.isfinite(score).all()
    assert (score >= 0).all()
    assert -1e-6 <= entropy_ratio <= 1 + 1e-6


def test_semantic_share_survives_a_cls_that_dwarfs_every_patch() -> None:
    """v[0].v[0] = 6400 against about 0 leaves patches exp(-6400): 0 in any float format, unlike their ratios."""
    q, k, v = random_qkv((4, 33, 64))
    q[:] = 0  # attention is flat, so only the semantic share tells patches apart
    v[:, 0] = 10
    score, _ = scored((q, k, v))
    expected = references.flow_score(q, k, v).score
    assert expected.max() / expected.min() > 5
    np.testing.assert_allclose(score, expected, rtol=references.score_tolerance(6400.0))


def test_semantic_logits_are_not_scaled_by_the_head_size() -> None:
    q, k, v = random_qkv((2, 9, 16))
    q[:] = 0
    share = np.exp(np.einsum("hd,hjd->hj", v[:, 0], v).astype(np.float64))
    share = (share / share.sum(1, keepdims=True)).mean(0)[1:]
    expected = (1 / 8 + share / share.sum()) * np.abs(v.mean(0)[1:]).sum(-1)
    np.testing.assert_allclose(scored((q, k, v))[0], expected, rtol=1e-4)


def test_cls_counts_in_the_denominator_of_each_head() -> None:
    """A head that CLS takes for itself must weigh less than one it leaves to the patches."""
    q, k, v = np.zeros((3, 2, 4, 1), np.float32)
    q[:, 0], v[:] = 1, 1
    k[0] = np.array([9, 0, 1, 2])[:, None]  # nearly all of head 0 goes to CLS
    k[1] = np.array([-9, 2, 1, 0])[:, None]
    score, _ = scored((q, k, v))
    assert score[0] > score[1] > score[2]
    np.testing.assert_allclose(score, references.flow_score(q, k, v).score, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_is_float32_whatever_the_input_type(dtype: torch.dtype) -> None:
    q, k, v = (torch.from_numpy(x).to(dtype) for x in random_qkv((4, 33, 16), scale=3))
    result = flow_score(q[None], k[None], v[None])
    assert result.score.dtype == torch.float32
    rounded = tuple(x.float().numpy() for x in (q, k, v))
    assert_close_to_reference(result.score[0].numpy(), float(result.entropy_ratio[0]), rounded)  # type: ignore[arg-type]


def test_invalid_patches_change_nothing_and_score_zero() -> None:
    q, k, v = random_qkv((4, 33, 16))
    valid = np.arange(32) < 20
    k[:, 21:], v[:, 21:] = 65504, -65504
    score, entropy_ratio = scored((q, k, v), valid)
    assert (score[20:] == 0).all()
    assert_close_to_reference(score[:20], entropy_ratio, (q[:, :21], k[:, :21], v[:, :21]))


def test_valid_counts_are_per_image() -> None:
    images = [random_qkv((4, 17, 16), seed) for seed in range(3)]
    counts = np.array([1, 9, 16])
    q, k, v = (torch.from_numpy(np.stack(x)) for x in zip(*images, strict=True))
    result = flow_score(q, k, v, torch.from_numpy(np.arange(16) < counts[:, None]))
    for b, n in enumerate(counts):
        only = tuple(x[:, : n + 1] for x in images[b])
        assert_close_to_reference(result.score[b, :n].numpy(), float(result.entropy_ratio[b]), only)  # type: ignore[arg-type]


def test_entropy_ratio_is_one_when_flat_and_zero_when_one_patch_has_all() -> None:
    q, k, v = np.ones((3, 2, 9, 4), np.float32)
    assert scored((q, k, v))[1] == pytest.approx(1)
    k[:, 3] = 1000
    assert scored((q, k, v))[1] == pytest.approx(0, abs=1e-6)


def test_running_score_is_the_first_score_then_the_mean_of_old_and_new() -> None:
    first, second, third = torch.tensor([[1.0, 8.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    running = accumulate(None, first)
    assert torch.equal(running, first)
    running = accumulate(accumulate(running, second), third)
    assert torch.equal(running, torch.tensor([[1.0, 2.5]]))


def test_without_history_the_running_score_is_the_last_one_even_where_it_was_minus_infinity() -> None:
    assert torch.equal(
        accumulate(torch.tensor([[-torch.inf, 2.0]]), torch.tensor([[3.0, 1.0]]), 0.0), torch.tensor([[3.0, 1.0]])
    )


def assert_tokens_are_scored(q: np.ndarray, source: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """q [H * G, d], the source's value [H, d], k and v [H, M, d]: against docs/algorithm.md 5 in float64."""
    score = token_score(*(torch.from_numpy(x)[None] for x in (q[:, None], source[:, None], k, v)))[0].numpy()
    scale = 1 / np.sqrt(np.longdouble(q.shape[-1]))
    expected = references.key_scores(q, source, k, v, scale, scale, source_in_keys=0)
    assert np.isfinite(score).all()
    assert (score >= 0).all()
    difference = np.abs(score - expected.score)
    assert (difference <= expected.tolerance * expected.score.max() + expected.rounding + TINY * np.abs(v).sum()).all()


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 4),
    group=st.integers(1, 4),
    tokens=st.integers(1, 70),
    size=st.sampled_from([2, 8, 32]),
    exponent=st.floats(-4, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_visual_tokens_match_the_float64_reference_for_grouped_queries(
    heads: int, group: int, tokens: int, size: int, exponent: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q, source = (rng.standard_normal((n, size), np.float32) for n in (heads * group, heads))
    k, v = (rng.standard_normal((heads, tokens, size), np.float32) for _ in range(2))
    assert_tokens_are_scored(q, source * np.float32(10**exponent), k, v * np.float32(10**exponent))


@pytest.mark.parametrize("qkv", HOSTILE.values(), ids=HOSTILE.keys())
def test_visual_tokens_match_the_float64_reference_on_hostile_inputs(qkv: Inputs) -> None:
    q, k, v = (np.ascontiguousarray(x) for x in qkv)
    assert_tokens_are_scored(q[:, 0], v[:, 0], k[:, 1:], v[:, 1:])


def test_semantic_logits_of_visual_tokens_are_scaled_by_the_head_size() -> None:
    _, k, v = random_qkv((2, 9, 16))
    source = v[:, 0]
    share = np.exp(np.einsum("hd,hjd->hj", source, v).astype(np.float64) / 4)
    share = (share / share.sum(1, keepdims=True)).mean(0)
    expected = (1 / 9 + share) * np.abs(v.mean(0)).sum(-1)
    flat = torch.zeros(1, 4, 1, 16)
    score = token_score(flat, *(torch.from_numpy(x)[None] for x in (source[:, None], k, v)))
    np.testing.assert_allclose(score[0], expected, rtol=1e-4)
