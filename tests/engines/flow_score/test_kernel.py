"""The kernels in Triton's interpreter against a float64 reading of the specification, ordinary and hostile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import references
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engines.flow_score.run import Launch, interpreter, score

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LARGEST = {"fp16": 65504, "bf16": 65280, "fp32": 65504}  # up to 65504, as that type holds it
TINY = np.finfo(np.float32).tiny
EXAMPLES = settings(
    deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)  # no shrinking: an example takes up to a second


@pytest.fixture(scope="module")
def launch() -> Launch:
    return interpreter()


@dataclass
class Case:
    """One image batch as [B, heads, rows, d] float32; `score` rounds it to `dtype`."""

    q: np.ndarray  # [B, H * G, 1, d]
    v_source: np.ndarray  # [B, H, 1, d]
    k: np.ndarray  # [B, H, S, d]
    v: np.ndarray
    dtype: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = {"logit_scale": self.k.shape[-1] ** -0.5} | self.options
        self.source_in_keys = self.options.get("source_in_keys", 1)

    def tensors(self) -> list[Any]:
        tensors = [torch.from_numpy(np.ascontiguousarray(x)).to(DTYPES[self.dtype]) for x in self.parts()]
        group = self.options.get("group", 1)
        if group > 1:
            batch, heads, _, size = self.k.shape
            tensors[0] = tensors[0].reshape(batch, heads, group, size)
        if self.options.get("token_major"):
            tensors = [x.transpose(1, 2).contiguous() for x in tensors]
        return tensors

    def parts(self) -> tuple[np.ndarray, ...]:
        return self.q, self.v_source, self.k, self.v

    def score(self, launch: Launch, **options: Any) -> tuple[np.ndarray, np.ndarray | None]:
        running, entropy_ratio = score(launch, *self.tensors(), **(self.options | options))
        return running.numpy(), None if entropy_ratio is None else entropy_ratio.numpy()

    def expected(self, image: int, valid: np.ndarray | None = None, selector: str = "flowcut") -> references.Score:
        q, source, k, v = (torch.from_numpy(x[image]).to(DTYPES[self.dtype]).double().numpy() for x in self.parts())
        scales = [self.options["logit_scale"], self.options.get("semantic_scale", 1.0)]
        scales = [float(np.float32(x)) for x in scales]
        return references.key_scores(q[:, 0], source[:, 0], k, v, *scales, self.source_in_keys, valid, selector)


def random_case(seed: int = 0, shape: tuple[int, ...] = (1, 2, 17, 32), v_scale: float = 1.0, **options: Any) -> Case:
    """Normal values. The source is the first key unless source_in_keys=0."""
    rng = np.random.default_rng(seed)
    batch, heads, _, size = shape
    dtype = options.pop("dtype", "fp32")
    q = rng.standard_normal((batch, heads * options.get("group", 1), 1, size), np.float32)
    k, v = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32) * np.float32(v_scale)
    source = v[:, :, :1] if options.get("source_in_keys", 1) else v[:, :, -1:] + 1
    return Case(q, source, k, v, dtype, options)


def constant_rows(case: Case) -> None:
    for x in case.parts():
        x[:] = x[..., :1]


def equal(case: Case) -> None:
    for x in case.parts():
        x[:] = 0.5


def one_huge_value(which: int) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        x = case.parts()[which]
        x[0, -1, x.shape[2] // 2, 3] = LARGEST[case.dtype]

    return change


def all_huge(case: Case) -> None:
    for x in case.parts():
        x[:] = np.copysign(LARGEST[case.dtype], x)


def any_size(case: Case) -> None:
    """Magnitudes from 1e-30 (0 in float16) to the largest."""
    for i, x in enumerate(case.parts()):
        power = np.random.default_rng(i).uniform(-30, 1, x.shape)
        x[:] = np.copysign((LARGEST[case.dtype] * 10**power).clip(0, LARGEST[case.dtype]), x)


def large_keys(case: Case) -> None:
    case.k[:] *= 30


def dwarfed(case: Case) -> None:
    """A source that is far larger than any key."""
    case.v[:] = case.v * 0.1
    case.v_source[:] = 10


def cancelling_terms(case: Case) -> None:
    """Two terms of each logit that nearly cancel, a thousand times the others."""
    for x in (case.k, case.v):
        x[..., 5] = x[..., 3]
    for x in (case.q, case.v_source):
        x[..., 3], x[..., 5] = 1000, -1000


def cancelling_heads(case: Case) -> None:
    """A mean value of which little is left."""
    half = case.v.shape[1] // 2
    case.v[:, :half] = 500 - case.v[:, half : 2 * half]


ADVERSARIAL = {
    "constant-rows": constant_rows,
    "equal": equal,
    "huge-q": one_huge_value(0),
    "huge-source": one_huge_value(1),
    "huge-k": one_huge_value(2),
    "huge-v": one_huge_value(3),
    "all-huge": all_huge,
    "any-size": any_size,
    "large-keys": large_keys,
    "dwarfed": dwarfed,
    "cancelling-terms": cancelling_terms,
    "cancelling-heads": cancelling_heads,
}


def assert_close(case: Case, got: np.ndarray, image: int = 0, **how: Any) -> references.Score:
    """One image's scores [N] against the reference: the values and, for every k, the k that are kept."""
    expected = case.expected(image, **how)
    assert np.isfinite(got).all()
    assert (got >= 0).all()
    if (tolerance := expected.tolerance) > 0.01:
        return expected
    values = torch.from_numpy(case.v[image]).to(DTYPES[case.dtype]).double().abs().sum().item()
    floor = TINY * max(1.0, values)  # shares below float32's least number become 0, whatever the logits
    allowed = tolerance * expected.score + floor + expected.rounding
    assert (np.abs(got - expected.score) <= allowed).all()
    order = np.argsort(-got, kind="stable")
    best = np.argsort(-expected.score, kind="stable")
    for k in {1, len(got) // 3, len(got) // 2, len(got) - 1} - {0}:
        kth = expected.score[best[k - 1]]
        swapped = list(set(order[:k]) ^ set(best[:k]))
        assert (np.abs(expected.score[swapped] - kth) <= allowed[swapped] + allowed[best[k - 1]]).all()
    return expected


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads = draw(st.sampled_from([1, 2, 3, 5, 15, 16, 17]))
    keys = draw(st.one_of(st.integers(2, 12), st.sampled_from([64, 65, 66, 67, 90] if heads < 9 else [20])))
    group = draw(st.sampled_from([1, 1, 1, 2, 3])) if heads < 9 else 1
    case = random_case(
        draw(st.integers(0, 2**32 - 1)),
        (draw(st.integers(1, 2)) if keys < 30 else 1, heads, keys, 8 * draw(st.integers(4, 16))),
        draw(st.sampled_from([1.0, 1.0, 1e-4, 0.1, 3.0, 1e3])),
        dtype=draw(st.sampled_from(list(DTYPES))),
        group=group,
        token_major=group == 1 and draw(st.booleans()),
        source_in_keys=draw(st.sampled_from([1, 1, 0])),
        semantic_scale=draw(st.sampled_from([1.0, 0.125])),
    )
    change = draw(st.sampled_from([None, None, *ADVERSARIAL.values()]))
    if change is not None:
        change(case)
    return case


@settings(EXAMPLES, max_examples=50)
@given(case=cases())
def test_matches_the_float64_reference_at_any_shape_type_and_layout(launch: Launch, case: Case) -> None:
    got, entropy_ratio = case.score(launch)
    assert entropy_ratio is None
    for image, row in enumerate(got):
        assert_close(case, row, image)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_matches_the_float64_reference_on_hostile_inputs(
    launch: Launch, dtype: str, change: Callable[[Case], None]
) -> None:
    case = random_case(dtype=dtype)
    change(case)
    assert_close(case, case.score(launch)[0][0])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 2880, 64), "fp16"),
        ((1, 2, 131, 72), "bf16"),
        ((1, 2, 130, 32), "fp32"),
        ((1, 3, 2, 40), "fp16"),
        ((1, 18, 65, 32), "fp32"),
    ],
    ids=str,
)
def test_matches_at_the_ends_of_every_tile(launch: Launch, shape: tuple[int, ...], dtype: str) -> None:
    """N = 2879, 130, 129, 1 and 64; 18 heads, more than one block of them."""
    case = random_case(1, shape, dtype=dtype)
    assert_close(case, case.score(launch)[0][0])


@settings(EXAMPLES, max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=2),
    dtype=st.sampled_from(list(DTYPES)),
    garbage=st.sampled_from([65504.0, np.nan, np.inf]),
)
def test_keys_that_do_not_exist_change_nothing_and_score_zero(
    launch: Launch, seed: int, counts: list[int], dtype: str, garbage: float
) -> None:
    case = random_case(seed, (len(counts), 2, 21, 32), dtype=dtype)
    valid = np.arange(21) < 1 + np.array(counts)[:, None]
    for b, row in enumerate(valid):
        case.k[b, :, ~row], case.v[b, :, ~row] = garbage, -garbage
    got, entropy_ratio = case.score(launch, key_valid=torch.from_numpy(valid))
    assert entropy_ratio is not None
    for b, n in enumerate(counts):
        assert (got[b, n:] == 0).all()
        only = Case(case.q[b : b + 1], case.v_source[b : b + 1], *(x[b : b + 1, :, : n + 1] for x in (case.k, case.v)))
        only.dtype = dtype
        expected = assert_close(only, got[b, :n]) if n else references.Score(got, 1.0, 0.0)
        assert entropy_ratio[b, 0] == pytest.approx(expected.entropy_ratio, rel=expected.tolerance, abs=1e-6)


def test_keys_that_do_not_exist_may_be_anywhere_and_the_entropy_is_over_several_programs(launch: Launch) -> None:
    case = random_case(3, (2, 3, 140, 32))
    valid = np.random.default_rng(0).random((2, 140)) < 0.6
    valid[:, 0] = True
    got, entropy_ratio = case.score(launch, key_valid=torch.from_numpy(valid))
    assert entropy_ratio is not None
    for image in range(2):
        expected = assert_close(case, got[image], image, valid=valid[image])
        assert entropy_ratio[image, 0] == pytest.approx(expected.entropy_ratio, rel=1e-5)


def test_with_nothing_or_one_key_to_score_the_result_is_finite_and_the_entropy_flat(launch: Launch) -> None:
    """70 scores take two programs, which together must say 1."""
    case, valid = random_case(shape=(2, 2, 70, 32), source_in_keys=0), torch.zeros(2, 70, dtype=torch.bool)
    valid[1, 66] = True
    got, entropy_ratio = case.score(launch, key_valid=valid)
    assert entropy_ratio is not None
    assert (entropy_ratio == 1).all()
    assert (got[~valid.numpy()] == 0).all()
    assert_close(case, got[1], 1, valid=valid[1].numpy())


def test_a_mask_of_all_keys_changes_no_bit(launch: Launch) -> None:
    case = random_case(shape=(1, 3, 70, 40), dtype="fp16")
    masked, entropy_ratio = case.score(launch, key_valid=torch.ones(1, 70, dtype=torch.bool))
    np.testing.assert_array_equal(masked, case.score(launch)[0])
    assert entropy_ratio is not None
    assert entropy_ratio[0, 0] == pytest.approx(case.expected(0).entropy_ratio, rel=1e-5)


def test_entropy_ratio_is_one_when_flat_and_zero_when_one_key_has_all(launch: Launch) -> None:
    case, valid = random_case(shape=(2, 2, 9, 32)), torch.ones(2, 9, dtype=torch.bool)
    case.q[:], case.k[:] = 1, 1
    case.k[1, :, 3] = 1000
    _, entropy_ratio = case.score(launch, key_valid=valid)
    np.testing.assert_allclose(entropy_ratio, [[1], [0]], atol=1e-6)


@pytest.mark.parametrize("token_major", [False, True])
def test_an_image_scores_in_a_batch_what_it_scores_alone_bit_for_bit(launch: Launch, token_major: bool) -> None:
    options = {"dtype": "fp16", "token_major": token_major}
    case = random_case(5, (3, 2, 11, 32), **options)
    together, again = case.score(launch)[0], case.score(launch)[0]
    np.testing.assert_array_equal(together, again)
    for b in range(3):
        alone = Case(*(x[b : b + 1] for x in case.parts()), "fp16", {"token_major": token_major})
        np.testing.assert_array_equal(alone.score(launch)[0][0], together[b])


def test_the_source_may_be_the_first_row_of_a_longer_tensor(launch: Launch) -> None:
    case = random_case(6, (2, 3, 12, 32))
    alone = case.score(launch)[0]
    rows = np.random.default_rng(0).standard_normal((2, 3, 5, 32), np.float32)
    case.q, case.v_source = np.concatenate([case.q, rows], 2), case.v
    np.testing.assert_array_equal(case.score(launch)[0], alone)
    case.options["token_major"] = True
    np.testing.assert_array_equal(case.score(launch)[0], alone)


def test_running_score_is_the_weighted_mean_and_minus_infinity_stays(launch: Launch) -> None:
    case = random_case(7, (2, 2, 10, 32))
    fresh = case.score(launch)[0]
    before = np.random.default_rng(0).random((2, 9), np.float32)
    before[:, 6:] = -np.inf
    got, _ = case.score(launch, history=0.25, running=torch.from_numpy(before))
    np.testing.assert_allclose(got, 0.25 * before + 0.75 * fresh, rtol=1e-6)
    assert (got[:, 6:] == -np.inf).all()


@pytest.mark.parametrize("before", [np.nan, -np.inf, 7.0])
def test_without_history_the_running_score_is_not_read(launch: Launch, before: float) -> None:
    case = random_case(7, (2, 2, 10, 32))
    got, _ = case.score(launch, running=torch.full((2, 9), before))
    np.testing.assert_array_equal(got, case.score(launch)[0])


@pytest.mark.parametrize(("semantic", "strength"), [(False, True), (True, False), (False, False)])
def test_a_score_less_a_part_matches_the_float64_reference(launch: Launch, semantic: bool, strength: bool) -> None:
    case = random_case(8, (1, 3, 12, 32))
    selector = {(False, True): "no-semantic", (True, False): "no-strength", (False, False): "cls"}[semantic, strength]
    options: dict[str, Any] = {"semantic": semantic, "strength": strength}
    got, _ = case.score(launch, **options)
    assert_close(case, got[0], selector=selector)
    masked, entropy_ratio = case.score(launch, key_valid=torch.ones(1, 12, dtype=torch.bool), **options)
    np.testing.assert_array_equal(masked, got)
    assert entropy_ratio is not None
    assert entropy_ratio[0, 0] == pytest.approx(case.expected(0).entropy_ratio, rel=1e-5)


def test_semantic_share_survives_a_source_that_dwarfs_every_key(launch: Launch) -> None:
    """v[0].v[0] = 3200 against about 0 leaves keys exp(-3200): 0 in any float format, unlike their ratios."""
    case = random_case(9, (1, 4, 33, 32))
    case.q[:] = 0  # attention is flat, so only the semantic share tells keys apart
    case.v[:, :, 0] = 10
    expected = assert_close(case, case.score(launch)[0][0])
    assert expected.score.max() / expected.score.min() > 5
