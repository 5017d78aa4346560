"""The ONNX function bodies of FlowScore and FlowScoreMasked, run by ONNX Runtime, against a float64 reading of SPEC."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import references

from export.builder import GraphBuilder, save
from export.flow_score import ATTRIBUTES, DOMAIN, INPUTS, flow_score_function, op_name
from flowcut.contract import Dim, GraphContract, TensorSpec

Qkv = tuple[np.ndarray, np.ndarray, np.ndarray]
Run = Callable[..., list[np.ndarray]]
HEADS, SIZE = 4, 16
TINY = np.finfo(np.float32).tiny


def contract(dtype: str, masked: bool) -> GraphContract:
    row, keys, score = ("b", HEADS, 1, SIZE), ("b", HEADS, "s", SIZE), ("b", "n")
    dims: dict[str, tuple[Dim, ...]] = {
        "q_row": row,
        "v_row": row,
        "k": keys,
        "v": keys,
        "rows": ("n",),
        "running": score,
    }
    types = {"rows": "int64", "running": "float32"}
    inputs = [TensorSpec(name, types.get(name, dtype), dims[name]) for name in INPUTS]
    outputs = [TensorSpec("running_out", "float32", score)]
    if masked:
        inputs.append(TensorSpec("key_valid", "bool", ("b", 1, 1, "s")))
        outputs.append(TensorSpec("entropy_ratio", "float32", ("b", 1)))
    return GraphContract("flow_score", tuple(inputs), tuple(outputs))


PARTS = {"flowcut": (True, True), "no-semantic": (False, True), "no-strength": (True, False), "cls": (False, False)}


def write(path: Path, dtype: str, masked: bool, history: float, selector: str = "flowcut") -> None:
    """A graph of one node, flowcut::FlowScore or another form."""
    made = contract(dtype, masked)
    b = GraphBuilder(made.name)
    outputs = b.ops(
        op_name(masked, *PARTS[selector]),
        *(b.input(spec) for spec in made.inputs),
        domain=DOMAIN,
        outputs=len(made.outputs),
        logit_scale=SIZE**-0.5,
        semantic_scale=1.0,
        history=history,
    )
    named = dict(zip((spec.name for spec in made.outputs), outputs, strict=True))
    save(b.model(made, named, {}, [flow_score_function(masked, *PARTS[selector])]), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(q, k, v [B, H, N+1, d], running=None, valid=None [B, N], history=0.0, selector=..) -> the node's outputs."""
    directory = tmp_path_factory.mktemp("flow_score")

    @cache
    def session(dtype: str, masked: bool, history: float, selector: str) -> ort.InferenceSession:
        path = directory / f"{dtype}-{masked}-{history}-{selector}.onnx"
        write(path, dtype, masked, history, selector)
        onnx.checker.check_model(path, full_check=True)
        return ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def call(
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        running: np.ndarray | None = None,
        valid: np.ndarray | None = None,
        history: float = 0.0,
        selector: str = "flowcut",
    ) -> list[np.ndarray]:
        batch, _, keys, _ = k.shape
        rows = np.arange(1, keys)
        running = np.zeros((batch, keys - 1), np.float32) if running is None else running
        feed = {"q_row": q[:, :, :1], "v_row": v[:, :, :1], "k": k, "v": v, "rows": rows, "running": running}
        if valid is not None:
            feed["key_valid"] = np.pad(valid, ((0, 0), (1, 0)), constant_values=True)[:, None, None]
        return list(session(k.dtype.name, valid is not None, history, selector).run(None, feed))

    return call


def random_qkv(batch: int = 1, keys: int = 17, seed: int = 0, scale: float = 1.0, dtype: str = "float32") -> Qkv:
    """q, k, v [B, H, N+1, d]; v multiplied by `scale`."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((batch, HEADS, keys, SIZE), np.float32) for _ in range(3))
    return q.astype(dtype), k.astype(dtype), (v * np.float32(scale)).astype(dtype)


def one_huge_value(where: int, dtype: str) -> Qkv:
    qkv = random_qkv(dtype=dtype)
    qkv[where][0, 1, 0 if where == 0 else 5, 3] = 65504
    return qkv


def hostile(name: str, dtype: str) -> Qkv:
    match name:
        case "huge-q" | "huge-k" | "huge-v":
            return one_huge_value("qkv".index(name[-1]), dtype)
        case "all-65504":
            q, k, v = random_qkv(dtype=dtype)
            return tuple((np.sign(x) * np.float32(65504)).astype(dtype) for x in (q, k, v))  # type: ignore[return-value]
        case "all-equal":
            q, k, v = np.full((3, 1, HEADS, 17, SIZE), 0.5, dtype)
            return q, k, v
        case "constant-rows":
            q, k, v = (np.repeat(x[:, :, :1], 17, 2) for x in random_qkv(dtype=dtype))
            return q, k, v
        case "one-patch":
            return random_qkv(keys=2, dtype=dtype)
        case "cls-dwarfs-patches":
            q, k, v = random_qkv(dtype=dtype)
            v[:, :, 0] = 20
            return q, k, v
        case _:
            return random_qkv(scale={"small-v": 1e-4, "large-v": 1e3}[name], dtype=dtype)


HOSTILE = [
    *("huge-q", "huge-k", "huge-v", "all-65504", "all-equal", "constant-rows"),
    *("one-patch", "cls-dwarfs-patches", "small-v", "large-v"),
]


def assert_close_to_reference(
    score: np.ndarray, qkv: Qkv, image: int = 0, selector: str = "flowcut"
) -> references.Score:
    expected = references.flow_score(*(x[image] for x in qkv), selector)
    assert np.isfinite(score).all()
    assert (score >= 0).all()
    tolerance = references.score_tolerance(expected.largest_logit)
    floor = TINY * max(1.0, np.abs(qkv[2][image]).sum(dtype=np.float64))  # shares below float32's least number become 0
    np.testing.assert_allclose(score, expected.score, rtol=tolerance, atol=floor)
    return expected


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", HOSTILE)
def test_flow_score_matches_the_reference_on_hostile_inputs(run: Run, name: str, dtype: str) -> None:
    qkv = hostile(name, dtype)
    (score,) = run(*qkv)
    assert_close_to_reference(score[0], qkv)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", HOSTILE)
def test_masked_form_with_every_key_valid_matches_the_reference(run: Run, name: str, dtype: str) -> None:
    qkv = hostile(name, dtype)
    score, entropy_ratio = run(*qkv, valid=np.ones((1, qkv[1].shape[2] - 1), bool))
    expected = assert_close_to_reference(score[0], qkv)
    tolerance = references.score_tolerance(expected.largest_logit)
    assert entropy_ratio[0, 0] == pytest.approx(expected.entropy_ratio, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("selector", ["no-semantic", "no-strength", "cls"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_score_less_a_part_matches_the_reference_in_both_forms(run: Run, name: str, selector: str) -> None:
    qkv = hostile(name, "float16")
    (plain,) = run(*qkv, selector=selector)
    masked, entropy_ratio = run(*qkv, valid=np.ones((1, qkv[1].shape[2] - 1), bool), selector=selector)
    expected = assert_close_to_reference(plain[0], qkv, selector=selector)
    assert_close_to_reference(masked[0], qkv, selector=selector)
    tolerance = references.score_tolerance(expected.largest_logit)
    assert entropy_ratio[0, 0] == pytest.approx(expected.entropy_ratio, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("selector", ["no-semantic", "no-strength", "cls"])
def test_a_score_less_a_part_is_mixed_and_masked_per_image(run: Run, selector: str) -> None:
    q, k, v = random_qkv(batch=2)
    valid, running = np.arange(16) < np.array([[16], [5]]), np.ones((2, 16), np.float32)
    score, entropy_ratio = run(q, k, v, running=running, valid=valid, history=0.5, selector=selector)
    for b, n in enumerate((16, 5)):
        expected = references.flow_score(*(x[b, :, : n + 1] for x in (q, k, v)), selector)
        np.testing.assert_allclose(score[b, :n], (1 + expected.score) / 2, rtol=1e-5)
        assert (score[b, n:] == 0.5).all()
        assert entropy_ratio[b, 0] == pytest.approx(expected.entropy_ratio, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_images_of_a_batch_are_scored_alone(run: Run, dtype: str) -> None:
    qkv = random_qkv(batch=3, keys=40, dtype=dtype)
    (score,) = run(*qkv)
    for b in range(3):
        assert_close_to_reference(score[b], qkv, b)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_keys_that_do_not_exist_change_nothing_and_score_zero(run: Run, dtype: str) -> None:
    qkv = random_qkv(batch=4, keys=31, dtype=dtype)
    counts = np.array([30, 12, 2, 1])
    valid = np.arange(30) < counts[:, None]
    garbage = np.pad(~valid, ((0, 0), (1, 0)))
    for x in qkv:
        x.swapaxes(1, 2)[garbage] = 65504
    score, entropy_ratio = run(*qkv, valid=valid)
    for b, n in enumerate(counts):
        only = tuple(x[:, :, : n + 1] for x in qkv)
        expected = assert_close_to_reference(score[b, :n], only, b)  # type: ignore[arg-type]
        assert entropy_ratio[b, 0] == pytest.approx(expected.entropy_ratio, rel=1e-5, abs=1e-6)
        assert (score[b, n:] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_running_score_is_mixed_with_the_layers_own(run: Run, masked: bool) -> None:
    qkv = random_qkv(batch=2)
    valid = np.ones((2, 16), bool) if masked else None
    running = np.random.default_rng(1).random((2, 16), np.float32)
    fresh = run(*qkv, running=running, valid=valid, history=0.0)[0]
    half = run(*qkv, running=running, valid=valid, history=0.5)[0]
    quarter = run(*qkv, running=running, valid=valid, history=0.25)[0]
    assert_close_to_reference(fresh[0], qkv)
    np.testing.assert_allclose(half, (running + fresh) / 2, rtol=1e-6)
    np.testing.assert_allclose(quarter, 0.25 * running + 0.75 * fresh, rtol=1e-6)


def test_a_running_score_of_minus_infinity_stays(run: Run) -> None:
    running = np.where(np.arange(16) < 10, 1, -np.inf).astype(np.float32)[None]
    score, _ = run(*random_qkv(), running=running, valid=np.arange(16)[None] < 10, history=0.5)
    assert (score[0, 10:] == -np.inf).all()
    assert np.isfinite(score[0, :10]).all()


def test_only_the_named_rows_are_scored_but_all_keys_share_the_softmax(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.onnx"
    write(path, "float32", masked=False, history=0.0)
    q, k, v = random_qkv()
    rows = np.array([2, 5, 11])
    feed = {"q_row": q[:, :, :1], "v_row": v[:, :, :1], "k": k, "v": v, "rows": rows}
    feed["running"] = np.zeros((1, 3), np.float32)
    (some,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)
    share = [softmax(x)[:, rows].mean(0) for x in (np.einsum("hd,hjd->hj", q[0, :, 0], k[0]) / 4, similarity(v[0]))]
    strength = np.abs(v[0].mean(0)[rows]).sum(-1)
    np.testing.assert_allclose(some[0], sum(s / s.sum() for s in share) * strength, rtol=1e-5)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def similarity(v: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("hd,hjd->hj", v[:, 0], v))


@pytest.mark.parametrize(
    ("selector", "name"),
    [("flowcut", ""), ("no-semantic", "NoSemantic"), ("no-strength", "NoStrength"), ("cls", "NoSemanticNoStrength")],
)
@pytest.mark.parametrize("masked", [False, True])
def test_signature_is_the_plugins(masked: bool, selector: str, name: str) -> None:
    function = flow_score_function(masked, *PARTS[selector])
    inputs = (*INPUTS, "key_valid") if masked else INPUTS
    outputs = ("running_out", "entropy_ratio") if masked else ("running_out",)
    assert (function.domain, function.name) == ("flowcut", f"FlowScore{name}{'Masked' if masked else ''}")
    assert tuple(value.name for value in function.inputs) == inputs
    assert tuple(value.name for value in function.outputs) == outputs
    assert tuple(function.attributes) == ATTRIBUTES
