"""The ONNX function bodies of FlowScore's forms, run by ONNX Runtime, against a reading of the algorithm in float64.

Float32, float16 and bfloat16 inputs: the bodies cast them, so ONNX Runtime's CPU provider runs bfloat16 as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import references
from hypothesis import example, given, settings
from hypothesis import strategies as st

from export.builder import GraphBuilder
from export.flow_score import DOMAIN, INPUTS, Form, Source, flow_score, flow_score_function
from flowcut.contract import GraphContract, TensorSpec

Array = np.ndarray[Any, Any]
TINY = np.finfo(np.float32).tiny
FORMS = [Form(*parts) for parts in product((False, True), repeat=4)]
SELECTORS = {(True, True): "flowcut", (False, True): "no-semantic", (True, False): "no-strength", (False, False): "cls"}
DTYPES = ("float32", "float16", "bfloat16")
KINDS = (
    *("random", "constant-rows", "all-equal", "one-huge", "small-v", "large-v"),
    *("huge", "of-any-size", "source-dwarfs-keys", "cancelling-terms", "cancelling-heads"),
)


@dataclass(frozen=True)
class Step:
    """One call: q_row [B, H, G, d], v_row [B, H, 1, d], k and v [B, H, S, d], valid [B, S], running [B, N].

    rows: those that are scored; without, all but the source if it is a key.
    """

    form: Form
    q_row: Array
    v_row: Array
    k: Array
    v: Array
    valid: Array | None = None
    source_in_keys: int = 1
    running: Array | None = None
    history: float = 0.0
    rows: Array | None = None
    logit_scale: float = 0.125
    semantic_scale: float = 1.0

    def scored(self) -> Array:
        return np.arange(self.source_in_keys, self.k.shape[2]) if self.rows is None else self.rows


def reference(step: Step, image: int) -> references.Score:
    q, v_source, k, v = (x[image] for x in (step.q_row, step.v_row, step.k, step.v))
    return references.key_scores(
        q.reshape(-1, q.shape[-1]),
        v_source[:, 0],
        k,
        v,
        step.logit_scale,
        step.semantic_scale,
        step.source_in_keys,
        None if step.valid is None else step.valid[image],
        SELECTORS[step.form.semantic, step.form.strength],
    )


@cache
def session(form: Form, dtype: str, **attributes: Any) -> ort.InferenceSession:
    """A graph of one node that takes any batch, heads, keys and head size."""
    key, score = ("b", "h", "s", "d"), ("b", "n")
    shapes = {"q_row": ("b", "h", "g", "d"), "v_row": ("b", "h", 1, "d"), "k": key, "v": key, "rows": ("n",)}
    types = {"rows": "int64", "running": "float32"}
    inputs = [TensorSpec(name, types.get(name, dtype), shapes.get(name, ("any", "m"))) for name in INPUTS]
    outputs = [TensorSpec("running_out", "float32", score)]
    if form.masked:
        inputs.append(TensorSpec("key_valid", "bool", ("b", 1, 1, "s")))
        outputs.append(TensorSpec("entropy_ratio", "float32", ("b", 1)))
    b = GraphBuilder("step")
    got = b.ops(form.name, *(b.input(x) for x in inputs), domain=DOMAIN, outputs=len(outputs), **attributes)
    named = {spec.name: value for spec, value in zip(outputs, got, strict=True)}
    return opened(b.model(GraphContract("step", tuple(inputs), tuple(outputs)), named, {}, [flow_score_function(form)]))


def opened(model: ir.Model) -> ort.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def run(step: Step) -> list[Array]:
    """running' and, of masked forms, entropy_ratio."""
    feed = {name: getattr(step, name) for name in ("q_row", "v_row", "k", "v")}
    feed["rows"] = step.scored()
    feed["running"] = np.zeros((1, 1), np.float32) if step.running is None else step.running
    if step.valid is not None:
        feed["key_valid"] = step.valid[:, None, None]
    attributes = {n: getattr(step, n) for n in ("logit_scale", "semantic_scale", "history", "source_in_keys")}
    values = {name: ort_value(np.ascontiguousarray(x)) for name, x in feed.items()}
    outputs = session(step.form, step.k.dtype.name, **attributes).run_with_ort_values(None, values)
    return [x.numpy() for x in outputs]


def ort_value(x: Array) -> ort.OrtValue:
    if x.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(x)


def rounded(x: Array, dtype: str) -> Array:
    """In that type, within +-65504."""
    greatest = {"bfloat16": 65280.0}.get(dtype, 65504.0)
    return np.clip(x, -greatest, greatest).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def make_step(
    form: Form,
    kind: str = "random",
    sizes: tuple[int, ...] = (2, 3, 4, 20, 32),
    dtype: str = "float32",
    source_in_keys: int = 1,
    seed: int = 0,
) -> Step:
    """A step of one of KINDS. sizes: batch, key heads, query heads of each, scored keys, head size."""
    batch, heads, group, scored, size = sizes
    rng, keys = np.random.default_rng(seed), scored + source_in_keys
    q = rng.standard_normal((batch, heads, group if form.grouped else 1, size))
    source, k, v = (rng.standard_normal((batch, heads, n, size)) for n in (1, keys, keys))
    if kind == "constant-rows":
        k[:], v[:] = k[:, :, :1], v[:, :, :1]
    elif kind == "all-equal":
        q[:], source[:], k[:], v[:] = 0.5, 0.5, 0.5, 0.5
    elif kind == "one-huge":
        x = (q, source, k, v)[rng.integers(4)]
        x.reshape(-1)[rng.integers(x.size)] = 65504
    elif kind in ("small-v", "large-v"):
        source, v = (x * {"small-v": 1e-4, "large-v": 1e3}[kind] for x in (source, v))
    elif kind == "huge":
        q, source, k, v = (np.sign(x) * 65504 for x in (q, source, k, v))
    elif kind == "of-any-size":
        q, source, k, v = (x * 10.0 ** rng.uniform(-4, rng.uniform(-4, 4), x.shape) for x in (q, source, k, v))
    elif kind == "cancelling-terms":
        k[..., 5], v[..., 5], q[..., 3], q[..., 5], source[..., 3], source[..., 5] = (
            k[..., 3],
            v[..., 3],
            *[1e3, -1e3] * 2,
        )
    elif kind == "cancelling-heads":
        v[:, : heads // 2] = 500 - v[:, heads - heads // 2 :]
    elif kind == "source-dwarfs-keys":
        source, v[:, :, :source_in_keys] = source * 20, v[:, :, :source_in_keys] * 20
    source = v[:, :, :1] if source_in_keys else source
    step = Step(form, *(rounded(x, dtype) for x in (q, source, k, v)), source_in_keys=source_in_keys)
    return with_mask(step, rng) if form.masked else step


def with_mask(step: Step, rng: np.random.Generator) -> Step:
    """With one scored key or more for each image, and garbage beyond."""
    batch, _, keys, _ = step.k.shape
    valid = np.arange(keys) < rng.integers(1 + step.source_in_keys, keys + 1, batch)[:, None]
    for x in (step.k, step.v):
        x.swapaxes(1, 2)[~valid] = rounded(rng.choice([-65504.0, 65504.0]), x.dtype.name)
    return replace(step, valid=valid)


def assert_right(step: Step) -> None:
    """Finite, not negative and, where what float32 logits allow is of use, that close to the reference."""
    score, *entropy_ratio = run(step)
    assert score.shape == (len(step.k), len(step.scored()))
    assert np.isfinite(score).all()
    assert (score >= 0).all()
    for b in range(len(score)):
        expected = reference(step, b)
        assert (score[b, expected.score == 0] == 0).all()
        if (tolerance := expected.tolerance) > 0.01:
            continue
        floor = TINY * max(1.0, np.abs(step.v[b].astype(float)).sum())  # shares below float32's least number become 0
        allowed = tolerance * expected.score + floor + expected.rounding
        assert (np.abs(score[b] - expected.score) <= allowed).all()
        assert_same_best(score[b], expected.score, allowed)
        if entropy_ratio:
            assert entropy_ratio[0][b, 0] == pytest.approx(expected.entropy_ratio, rel=tolerance, abs=1e-6)


def assert_same_best(got: Array, expected: Array, allowed: Array) -> None:
    """The same top-k for every k tried, but for keys whose scores are within `allowed` [N] of the k-th."""
    mine, theirs = (np.argsort(-x, kind="stable") for x in (got, expected))
    for k in {1, len(got) // 4, len(got) // 2, len(got) - 1} - {0}:
        kth = expected[theirs[k - 1]]
        swapped = sorted(set(mine[:k]) ^ set(theirs[:k]))
        assert (np.abs(expected[swapped] - kth) <= allowed[swapped] + allowed[theirs[k - 1]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_matches_the_reference_on_hostile_inputs(kind: str, dtype: str) -> None:
    for seed, (form, source_in_keys) in enumerate(product(FORMS, (0, 1))):
        assert_right(make_step(form, kind, (2, 3, 2, 19, 32), dtype, source_in_keys, seed))


SIZES = st.tuples(
    *(st.integers(1, 3), st.integers(1, 5), st.integers(2, 4)),
    *(st.sampled_from([1, 2, 3, 31, 63, 64, 65, 130]), st.sampled_from([32, 40, 64, 128])),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from(KINDS), SIZES, st.sampled_from(DTYPES), st.booleans(), st.integers(0))
@example(Form(), "random", (1, 16, 1, 2879, 64), "float16", True, 0)
@example(Form(masked=True), "small-v", (2, 3, 1, 2879, 32), "float32", True, 0)
@example(Form(grouped=True, masked=True), "random", (1, 2, 4, 2879, 128), "bfloat16", False, 0)
@example(Form(grouped=True, strength=False), "random", (1, 4, 4, 65, 128), "float32", True, 1)  # rounding of products
@example(Form(), "random", (1, 1, 1, 1, 128), "float32", False, 0)
def test_any_form_of_any_size_matches_the_reference(
    form: Form, kind: str, sizes: tuple[int, ...], dtype: str, source_in_keys: bool, seed: int
) -> None:
    assert_right(make_step(form, kind, sizes, dtype, int(source_in_keys), seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_is_the_plain_form_with_each_key_head_repeated(dtype: str) -> None:
    step = make_step(Form(grouped=True), dtype=dtype)
    repeated = [np.repeat(x, 4, 1) for x in (step.v_row, step.k, step.v)]
    plain = Step(Form(), step.q_row.reshape(2, 12, 1, 32), *repeated)
    np.testing.assert_allclose(run(step)[0], run(plain)[0], rtol=1e-5)


def test_only_the_named_rows_are_scored_but_all_keys_share_the_softmax() -> None:
    step = replace(make_step(Form(), sizes=(1, 3, 1, 20, 32)), rows=np.array([2, 5, 11]))
    attention = np.einsum("hd,hjd->hj", step.q_row[0, :, 0], step.k[0]) * step.logit_scale
    similarity = np.einsum("hd,hjd->hj", step.v_row[0, :, 0], step.v[0])
    rel, sem = (np.mean([softmax(x)[step.rows] for x in logits], 0) for logits in (attention, similarity))
    expected = (rel / rel.sum() + sem / sem.sum()) * np.abs(step.v[0].mean(0)).sum(-1)[step.rows]
    np.testing.assert_allclose(run(step)[0][0], expected, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_running_score_is_mixed_with_the_layers_own(form: Form) -> None:
    step = make_step(form)
    running = np.random.default_rng(1).random((2, 20), np.float32)
    fresh = run(step)[0]
    np.testing.assert_array_equal(run(replace(step, running=running))[0], fresh)
    for history in (0.5, 0.25):
        mixed = run(replace(step, running=running, history=history))[0]
        np.testing.assert_allclose(mixed, history * running + (1 - history) * fresh, rtol=1e-6)


def test_a_running_score_of_minus_infinity_stays() -> None:
    step = make_step(Form(masked=True))
    assert step.valid is not None
    exists = step.valid[:, 1:]
    score, _ = run(replace(step, running=np.where(exists, 1, -np.inf).astype(np.float32), history=0.5))
    assert (score[~exists] == -np.inf).all()
    assert np.isfinite(score[exists]).all()


@pytest.mark.parametrize("form", [form for form in FORMS if form.masked], ids=lambda form: form.name)
def test_an_image_without_any_key_harms_no_other_and_is_finite(form: Form) -> None:
    step = make_step(form, sizes=(3, 3, 4, 20, 32), source_in_keys=0)
    assert step.valid is not None
    step.valid[1] = False
    outputs = run(step)
    assert all(np.isfinite(x).all() for x in outputs)
    third = {name: getattr(step, name)[2:] for name in ("q_row", "v_row", "k", "v", "valid")}
    for got, alone in zip(outputs, run(replace(step, **third)), strict=True):
        np.testing.assert_allclose(got[2:], alone, rtol=1e-5)  # a product of several images sums in another order


# Emission: `flow_score`, as exporters use it


def emitted(step: Step, **options: Any) -> ir.Model:
    """A graph that scores the step's tensors, all of whose sizes are fixed."""
    b = GraphBuilder("emitted")
    names = ("q_row", "v_row", "k", "v")
    specs = [TensorSpec(name, "float32", getattr(step, name).shape) for name in names]
    source = Source(*(b.input(spec) for spec in specs), keys=step.k.shape[2])
    if step.valid is not None:
        specs.append(TensorSpec("key_valid", "bool", (len(step.k), 1, 1, step.k.shape[2])))
        options["key_valid"] = b.input(specs[-1])
    got = flow_score(b, step.form, source, source_in_keys=bool(step.source_in_keys), **options)
    named = {name: x for name, x in zip(("score", "entropy_ratio"), got, strict=True) if x is not None}
    shapes = {"score": (len(step.k), len(step.scored())), "entropy_ratio": (len(step.k), 1)}
    outputs = tuple(TensorSpec(name, "float32", shapes[name]) for name in named)
    return b.model(GraphContract("emitted", tuple(specs), outputs), named, {}, [flow_score_function(step.form)])


@pytest.mark.parametrize("group", [1, 4])
def test_visual_tokens_are_scored_against_the_instructions_last_token(group: int) -> None:
    """LLaVA-NeXT's step, of prompts with 12 and 7 visual tokens in 12 rows; head by head from docs/algorithm.md 5."""
    heads, size, length, rows, counts = 2, 32, 20, np.arange(3, 15), np.array([12, 7])
    scale, last = size**-0.5, length - 1
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, heads * group, length, size), np.float32)
    k, v = (rng.standard_normal((2, heads, length, size), np.float32) for _ in range(2))
    form = Form(masked=True, grouped=group > 1)
    valid = np.arange(12) < counts[:, None]
    q_row = q[:, :, last].reshape(2, heads, group, size)
    step = Step(form, q_row, v[:, :, [last]], k[:, :, rows], v[:, :, rows], valid, source_in_keys=0)
    feed = {"q_row": q_row, "v_row": step.v_row, "k": step.k, "v": step.v, "key_valid": valid[:, None, None]}
    score, ratio = opened(emitted(step, logit_scale=scale, semantic_scale=scale)).run(None, feed)
    for b, n in enumerate(counts):
        visual = rows[:n]
        rel = np.mean([softmax(k[b, h // group, visual] @ q[b, h, last] * scale) for h in range(heads * group)], 0)
        sem = np.mean([softmax(v[b, h, visual] @ v[b, h, last] * scale) for h in range(heads)], 0)
        strength = np.abs(v[b][:, visual].mean(0)).sum(-1)
        np.testing.assert_allclose(score[b, :n], (rel / rel.sum() + sem / sem.sum()) * strength, rtol=1e-5)
        assert (score[b, n:] == 0).all()
        assert ratio[b, 0] == pytest.approx(-(rel * np.log(rel)).sum() / np.log(n), rel=1e-5)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


@pytest.mark.parametrize("source_in_keys", [0, 1])
def test_rows_and_source_in_keys_say_the_same(source_in_keys: int) -> None:
    step = make_step(Form(), source_in_keys=source_in_keys)
    (node,) = emitted(step, logit_scale=0.5).graph
    rows, running = (x.const_value for x in node.inputs[4:6] if x is not None)
    assert rows is not None
    assert running is not None
    assert rows.numpy().tolist() == list(range(source_in_keys, step.k.shape[2]))
    assert (running.numpy().tolist(), running.dtype) == ([[0.0]], ir.DataType.FLOAT)
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert values == {"logit_scale": 0.5, "semantic_scale": 1.0, "history": 0.0, "source_in_keys": source_in_keys}


def test_history_counts_only_where_there_was_a_score() -> None:
    step, b = make_step(Form()), GraphBuilder("again")
    (first,) = emitted(step, logit_scale=0.5, history=0.5).graph
    assert first.attributes["history"].as_float() == 0
    running = b.const(np.ones((2, 20)), "float32")
    q_row, v_row, k, v = (x for x in first.inputs[:4] if x is not None)
    score, _ = flow_score(b, step.form, Source(q_row, v_row, k, v, 21), logit_scale=0.5, running=running, history=0.5)
    again = score.producer()
    assert again is not None
    assert again.inputs[5] is running
    assert again.attributes["history"].as_float() == 0.5


def test_a_mask_belongs_to_masked_forms() -> None:
    with pytest.raises(ValueError, match=r"key_valid must be given for masked forms alone, got .* for FlowScore\."):
        emitted(replace(make_step(Form(masked=True)), form=Form()), logit_scale=0.5)
    with pytest.raises(ValueError, match=r"alone, got None for FlowScoreNoSemanticMasked\."):
        emitted(replace(make_step(Form()), form=Form(masked=True, semantic=False)), logit_scale=0.5)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_signature_is_the_documented_one(form: Form) -> None:
    function = flow_score_function(form)
    parts = [("Grouped", form.grouped), ("NoSemantic", not form.semantic), ("NoStrength", not form.strength)]
    name = "FlowScore" + "".join(part for part, there in [*parts, ("Masked", form.masked)] if there)
    assert (function.domain, function.name) == ("flowcut", name)
    inputs = ["q_row", "v_row", "k", "v", "rows", "running", *(["key_valid"] if form.masked else [])]
    assert [value.name for value in function.inputs] == inputs
    outputs = ["running_out", *(["entropy_ratio"] if form.masked else [])]
    assert [value.name for value in function.outputs] == outputs
    kinds = {name: attribute.type.name for name, attribute in function.attributes.items()}
    assert kinds == {"logit_scale": "FLOAT", "semantic_scale": "FLOAT", "history": "FLOAT", "source_in_keys": "INT"}
    assert Form.named(name) == form


@pytest.mark.parametrize("name", ["FlowScores", "FlowScoreMaskedGrouped", "FlowScoreLogits", "flowscore", ""])
def test_other_names_are_no_forms(name: str) -> None:
    assert Form.named(name) is None
