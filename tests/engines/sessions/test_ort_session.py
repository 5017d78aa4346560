"""ONNX Runtime sessions: what the contract allows, what stays in place, what is refused."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import recipe
from tiny_engine import LIMITS, TinyEngine, write_engine

from engines.options import Options
from engines.runtime.memory import process_bytes
from engines.sessions import ort_loading
from engines.sessions.ort_session import OrtSession, placed
from engines.sessions.session import feeds_of, results_of, state_pairs
from engines.sessions.stages import Chain
from export.builder import GraphBuilder, save
from flowcut.contract import (
    GraphContract,
    Limits,
    Range,
    TensorSpec,
    language_contract,
    language_contracts,
    vision_contract,
)
from flowcut.errors import EngineError

Feeds = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("session") / "engine")


def contract_of(tiny: TinyEngine, graph: str) -> GraphContract:
    make = {"vision": vision_contract, "language": language_contract}[graph]
    return make(tiny.model.config, tiny.schedule.tokens, "fp32", LIMITS)


@pytest.fixture(scope="module")
def open_session(tiny: TinyEngine) -> Callable[[str], OrtSession]:
    return lambda graph: OrtSession(tiny.directory / f"{graph}.onnx", contract_of(tiny, graph), Options(threads=1))


def pixels(tiny: TinyEngine, images: int) -> Feeds:
    return {"pixel_values": recipe.pixels(tiny.model.config.vision.image_size, images)}


def prompts(tiny: TinyEngine, batch: int = 2, length: int = 24) -> Feeds:
    rng = np.random.default_rng(0)
    rows = np.full((batch, length), -1)
    rows[0, 2 : 2 + tiny.schedule.tokens] = np.arange(tiny.schedule.tokens)
    return {
        "input_ids": rng.integers(3, 448, (batch, length)),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
        "image_rows": rows,
        "last_token": np.arange(batch) + length - batch,
        "image_embeds": rng.standard_normal((1, tiny.schedule.tokens, tiny.model.config.text.hidden_size)).astype(
            np.float32
        ),
    }


def next_tokens(feeds: Feeds, step: int) -> Feeds:
    return feeds | {
        "input_ids": np.array([[5 + step], [9]]),
        "position_ids": (feeds["last_token"] + 1 + step)[:, None],
        "image_rows": np.full((2, 1), -1),
        "last_token": np.zeros(2, np.int64),
    }


def plain(tiny: TinyEngine, graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 2
    return ort.InferenceSession(tiny.directory / f"{graph}.onnx", options, providers=["CPUExecutionProvider"])


def test_vision_returns_what_onnx_runtime_returns(tiny: TinyEngine, open_session: Callable[[str], OrtSession]) -> None:
    feeds = pixels(tiny, 3)
    result = open_session("vision").run(feeds, keep=["image_embeds"])
    embeds, kept = plain(tiny, "vision").run(["image_embeds", "kept"], feeds)
    assert result.arrays.keys() == {"kept"}
    assert result.device_ms > 0
    np.testing.assert_array_equal(result.arrays["kept"], kept)
    tensor = result.kept["image_embeds"]
    assert (tensor.shape, tensor.dtype) == (embeds.shape, embeds.dtype)
    np.testing.assert_allclose(tensor.numpy(), embeds, rtol=0, atol=1e-5 * np.abs(embeds).max())


def test_a_result_is_not_overwritten_by_the_next_run(
    tiny: TinyEngine, open_session: Callable[[str], OrtSession]
) -> None:
    session, feeds = open_session("language"), prompts(tiny)
    state = session.allocate_state(2)
    first = session.run(feeds, state).arrays["logits"]
    before = first.copy()
    second = session.run(next_tokens(feeds, 0), state).arrays["logits"]
    np.testing.assert_array_equal(first, before)
    assert not np.array_equal(first, second)


def test_cache_is_updated_in_place_and_equals_the_copied_one(
    tiny: TinyEngine, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "flowcut.onnxruntime")  # lets ONNX Runtime's warnings through
    contract = contract_of(tiny, "language")
    session = OrtSession(tiny.directory / "language.onnx", contract)
    state, feeds = session.allocate_state(2), prompts(tiny)
    steps = [feeds, *(next_tokens(feeds, i) for i in range(3))]
    got = [session.run(step, state).arrays["logits"] for step in steps]
    assert "copying past_cache" not in capfd.readouterr().err
    other = plain(tiny, "language")
    cache = {s.name: np.zeros(s.shape({"batch": 2}), np.float32) for s, _ in state_pairs(contract)}
    for step, logits in zip(steps, got, strict=True):
        expected, *present = other.run(["logits", *(p for _, p in state_pairs(contract))], step | cache)
        cache = dict(zip(cache, present, strict=True))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert "copying past_cache" in capfd.readouterr().err  # so the absence above means something


@pytest.mark.parametrize("stages", [1, 2])
def test_a_step_takes_no_memory_of_a_cache_s_size(stages: int, tmp_path: Path) -> None:
    """Whatever copies the cache, the tensor of one layer even, or writes more of it than a row, has to have memory for
    it: untouched zeros take none. A tensor is larger than what malloc would take from memory that was freed."""
    batch, limits = 12, Limits(max_batch=12, max_images=1, max_prompt=3000, max_new_tokens=1000)
    engine = write_engine(tmp_path / "engine", limits=limits, stages=stages)
    config, kept = engine.model.config, engine.schedule.tokens
    contracts = language_contracts(config, kept, "fp32", limits, stages, None)
    sessions = [OrtSession(engine.directory / f"{c.name}.onnx", c, Options(threads=1)) for c in contracts]
    whole = language_contract(config, kept, "fp32", limits)
    session = sessions[0] if stages == 1 else Chain(whole, sessions)
    feeds = next_tokens(prompts(engine), 0) | {"input_ids": np.full((batch, 1), 5), "last_token": np.zeros(batch, int)}
    feeds |= {"image_rows": np.full((batch, 1), -1)}
    shape = state_pairs(whole)[0][0].shape({"batch": batch})
    tensor = 4 * math.prod(shape)
    assert tensor > 32 << 20
    with small_pages():
        state = session.allocate_state(batch)
        with peak_growth() as growth:
            for step in range(3):
                session.run(feeds | {"position_ids": np.full((batch, 1), step)}, state)
        assert growth[0] < tensor / 4
        copying = plain(engine, contracts[0].name)
        past = {s.name: np.zeros(s.shape({"batch": batch}), np.float32) for s, _ in state_pairs(contracts[0])}
        known = feeds | {"position_ids": np.zeros((batch, 1), int)}
        taken = {s.name: known[s.name] for s in feeds_of(contracts[0])}
        with peak_growth() as growth:
            presents = copying.run([present for _, present in state_pairs(contracts[0])], taken | past)
    assert growth[0] > sum(present.nbytes for present in presents) * 0.9  # so the bound above means something


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """Bytes that the block had in memory at its peak, beyond what was there before; known when it is over."""
    status, growth = Path("/proc/self/status"), [0]

    def read(name: str) -> int:
        return int(re.search(rf"^{name}:\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    except OSError as error:
        pytest.skip(f"the system does not tell peaks of a block: {error}")
    before = read("VmRSS")
    yield growth
    growth[0] = read("VmHWM") - before


@contextmanager
def small_pages() -> Iterator[None]:
    """With pages of 2 MB, the first byte of a row would take all rows beside it."""
    disable = 41  # PR_SET_THP_DISABLE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(disable, 1, 0, 0, 0) != 0:
        pytest.skip(f"pages of 2 MB cannot be turned off: {os.strerror(ctypes.get_errno())}")
    yield
    libc.prctl(disable, 0, 0, 0, 0)


def test_outputs_of_the_cache_are_where_its_inputs_are(
    tiny: TinyEngine, open_session: Callable[[str], OrtSession]
) -> None:
    session, feeds = open_session("language"), prompts(tiny)
    state = session.allocate_state(2)
    caches = [cache.data_ptr() for cache in state.caches]
    for step in (feeds, next_tokens(feeds, 0)):
        session.run(step, state)
        pointers = {output.data_ptr() for output in state.binding.get_outputs()}
        assert pointers >= set(caches)
    assert len(set(caches)) == len(state_pairs(session.contract))


def test_two_thousand_steps_do_not_add_up_in_memory(
    tiny: TinyEngine, open_session: Callable[[str], OrtSession]
) -> None:
    """A step that kept its logits would add 8 kB each, one that kept a cache a MB."""
    session, feeds = open_session("language"), next_tokens(prompts(tiny), 0)
    state = session.allocate_state(2)
    taken = []
    for _ in range(2):
        for _ in range(2000):
            session.run(feeds, state)
        gc.collect()
        taken.append(process_bytes()[0])
    assert taken[1] - taken[0] < 2000 * 1024


def test_a_cache_on_a_device_is_zero_though_its_zeros_are_sent_there_once(
    tiny: TinyEngine, open_session: Callable[[str], OrtSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is played by the CPU's memory, full of what an earlier request left there."""
    sent, make, allocate = [], ort.OrtValue.ortvalue_from_numpy, ort.OrtValue.ortvalue_from_shape_and_type

    def send(array: np.ndarray, device: str) -> ort.OrtValue:
        sent.append(array.shape)
        return make(array.copy(), "cpu")

    def full(shape: tuple[int, ...], dtype: type, device: str) -> ort.OrtValue:
        value = allocate(shape, dtype, "cpu")
        value.update_inplace(np.full(shape, np.nan, dtype))
        return value

    session = open_session("language")
    monkeypatch.setattr(session, "device", "cuda")
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", send)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", full)
    states = [session.allocate_state(2) for _ in range(2)]
    for cache in states[1].caches:
        np.testing.assert_array_equal(cache.numpy(), np.zeros(cache.shape(), np.float32))
    pointers = {cache.data_ptr() for state in states for cache in state.caches}
    assert len(pointers) == 2 * len(state_pairs(session.contract))
    assert len(sent) == 1
    assert session.memory_bytes()["zeros"] == 4 * math.prod(sent[0])


def test_nothing_of_an_earlier_request_is_left_in_a_new_state(
    tiny: TinyEngine, open_session: Callable[[str], OrtSession]
) -> None:
    session, feeds = open_session("language"), prompts(tiny)
    spoiled = session.run(feeds | {"image_embeds": feeds["image_embeds"] * np.nan}, session.allocate_state(2))
    assert np.isnan(spoiled.arrays["logits"]).any()
    runs = [session.run(feeds, session.allocate_state(2)).arrays["logits"] for _ in range(2)]
    assert np.isfinite(runs[0]).all()
    np.testing.assert_array_equal(runs[0], runs[1])


def test_two_states_do_not_disturb_each_other(tiny: TinyEngine, open_session: Callable[[str], OrtSession]) -> None:
    session, feeds = open_session("language"), prompts(tiny)
    other = feeds | {"input_ids": feeds["input_ids"][::-1].copy()}

    def answer(first: Feeds, between: Feeds | None) -> np.ndarray:
        mine, theirs = session.allocate_state(2), session.allocate_state(2)
        session.run(first, mine)
        if between is not None:
            session.run(between, theirs)
        return session.run(next_tokens(first, 0), mine).arrays["logits"]

    np.testing.assert_array_equal(answer(feeds, other), answer(feeds, None))


def test_a_state_holds_the_memory_of_its_cache(
    tiny: TinyEngine, open_session: Callable[[str], OrtSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, make = [], ort.OrtValue.ortvalue_from_numpy

    def watched(array: np.ndarray, device: str) -> ort.OrtValue:
        value = make(array, device)
        values.append(weakref.ref(value))
        return value

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", watched)
    state = open_session("language").allocate_state(2)
    for held in ("_bound_inputs", "_bound_outputs"):
        getattr(state.binding, held, {}).clear()  # a binding of ONNX Runtime before 1.30 holds nothing
    gc.collect()
    assert len(values) == 2 * tiny.model.config.text.num_hidden_layers
    assert all(value() is not None for value in values)
    del state
    gc.collect()
    assert all(value() is None for value in values)


def test_the_cache_is_told_from_the_other_tensors(tiny: TinyEngine) -> None:
    language, vision = contract_of(tiny, "language"), contract_of(tiny, "vision")
    pairs = state_pairs(language)
    assert [(past.name, present) for past, present in pairs][:3] == [
        ("past.0.key", "present.0.key"),
        ("past.0.value", "present.0.value"),
        ("past.1.key", "present.1.key"),
    ]
    assert [*feeds_of(language), *(past for past, _ in pairs)] == list(language.inputs)
    assert [s.name for s in results_of(language)] + [present for _, present in pairs] == [
        s.name for s in language.outputs
    ]
    assert (state_pairs(vision), feeds_of(vision), results_of(vision)) == ([], [*vision.inputs], [*vision.outputs])


def test_a_bf16_cache_is_bound_in_place(tmp_path: Path) -> None:
    """As a provider with bf16 kernels would be given it; the CPU's has those of Cast."""
    cache = TensorSpec("past.0.key", "bfloat16", ("batch", 1, 2, 3))
    present = replace(cache, name="present.0.key")
    values = (replace(cache, name="past.0.value"), replace(cache, name="present.0.value"))
    row, out = TensorSpec("row", "float32", ("batch",)), TensorSpec("seen", "float32", ("batch", 1, 2, 3))
    contract = GraphContract("language", (row, cache, values[0]), (out, present, values[1]), {"batch": Range(1, 1, 4)})
    b = GraphBuilder("language")
    fed, past, value = (b.input(spec) for spec in contract.inputs)
    seen = b.cast(past, "bfloat16", "float32")
    added = b.op("Add", seen, b.op("Reshape", fed, b.const([-1, 1, 1, 1], "int64")))
    outputs = {"seen": b.op("Identity", seen), present.name: b.cast(added, "float32", "bfloat16")}
    outputs[values[1].name] = b.cast(b.cast(value, "bfloat16", "float32"), "float32", "bfloat16")
    save(b.model(contract, outputs, {}), tmp_path / "language.onnx")
    session = OrtSession(tmp_path / "language.onnx", contract)
    state, feeds = session.allocate_state(2), {"row": np.array([1.5, -2], np.float32)}
    for step in range(3):
        got = session.run(feeds, state).arrays["seen"]
        np.testing.assert_array_equal(got, np.broadcast_to(step * feeds["row"][:, None, None, None], got.shape))


def test_cuda_computes_without_tf32_and_the_cpu_is_used_where_it_does_not_start(
    open_session: Callable[[str], OrtSession], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, make = [], ort.InferenceSession

    def without_cuda(path: Path, options: ort.SessionOptions, providers: list[object]) -> ort.InferenceSession:
        asked.extend(providers)
        return make(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", without_cuda)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort_loading, "gpu_present", lambda: True)
    assert open_session("vision").device == "cpu"
    (name, settings), after = asked
    assert (name, after) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert settings["use_tf32"] == 0
    assert "vision: CUDA does not start here" in caplog.text


WRONG = {
    "missing": (lambda f: {n: f[n] for n in f if n != "last_token"}, "difference: last_token"),
    "unexpected": (lambda f: f | {"pixels": f["input_ids"]}, "difference: pixels"),
    "dtype": (lambda f: f | {"image_embeds": f["image_embeds"].astype(np.float16)}, r"image_embeds must be float32\["),
    "rank": (lambda f: f | {"last_token": f["last_token"][:, None]}, r"last_token must be int64\[batch 2\], got"),
    "fixed size": (
        lambda f: f | {"image_embeds": f["image_embeds"][:, 1:]},
        r"float32\[images 1\.\.4, 16, 192\]|images 1,",
    ),
    "range": (
        lambda f: f | {"image_embeds": np.zeros((5, 16, 192), np.float32)},
        r"images 1\.\.4, 16, 192\], got float32",
    ),
    "two batches": (lambda f: f | {"last_token": np.zeros(3, np.int64)}, r"batch 2\], got int64\[3\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_feeds_must_be_the_contracts(case: str, tiny: TinyEngine, open_session: Callable[[str], OrtSession]) -> None:
    change, message = WRONG[case]
    session = open_session("language")
    with pytest.raises(EngineError, match=message):
        session.run(change(prompts(tiny)), session.allocate_state(2))


def test_a_state_is_needed_exactly_where_there_is_a_cache(
    tiny: TinyEngine, open_session: Callable[[str], OrtSession]
) -> None:
    language, vision = open_session("language"), open_session("vision")
    with pytest.raises(EngineError, match="language must be run with a state"):
        language.run(prompts(tiny))
    with pytest.raises(EngineError, match="vision must be run without a state"):
        vision.run(pixels(tiny, 1), language.allocate_state(1))
    with pytest.raises(EngineError, match=r"int64\[batch 1, sequence 1\.\.64\], got int64\[2, 24\]"):
        language.run(prompts(tiny), language.allocate_state(1))


def test_a_run_that_fails_in_the_library_is_an_engine_error(
    tiny: TinyEngine, open_session: Callable[[str], OrtSession], capfd: pytest.CaptureFixture[str]
) -> None:
    session, feeds = open_session("language"), prompts(tiny)
    with pytest.raises(EngineError, match=r"language failed in ONNX Runtime: .*Gather") as caught:
        session.run(feeds | {"input_ids": feeds["input_ids"] + 10_000}, session.allocate_state(2))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # not printed as well


def test_a_file_that_is_no_graph_is_refused(tiny: TinyEngine, tmp_path: Path) -> None:
    path = tmp_path / "vision.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"vision\.onnx could not be loaded by ONNX Runtime: .*INVALID_PROTOBUF"):
        OrtSession(path, contract_of(tiny, "vision"))


def test_a_graph_of_another_contract_is_refused(tiny: TinyEngine) -> None:
    fewer = language_contract(tiny.model.config, 9, "fp32", LIMITS)
    with pytest.raises(EngineError, match="difference: changed image_embeds"):
        OrtSession(tiny.directory / "language.onnx", fewer)
    config = replace(tiny.model.config, text=replace(tiny.model.config.text, num_hidden_layers=5))
    with pytest.raises(EngineError, match=r"missing past\.4\.key, past\.4\.value"):
        OrtSession(tiny.directory / "language.onnx", language_contract(config, 16, "fp32", LIMITS))


@pytest.fixture
def on_both(
    tiny: TinyEngine, open_session: Callable[[str], OrtSession], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[OrtSession]]:
    """A graph on the CUDA provider and on the CPU's."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")

    def both(graph: str) -> list[OrtSession]:
        with monkeypatch.context() as patch:
            cuda = open_session(graph)
            patch.setattr(ort_loading, "gpu_present", lambda: False)
            sessions = [cuda, open_session(graph)]
        assert [session.device for session in sessions] == ["cuda", "cpu"]
        return sessions

    return both


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.gpu
def test_vision_on_the_cuda_provider_agrees_with_the_cpu(
    tiny: TinyEngine, on_both: Callable[[str], list[OrtSession]]
) -> None:
    cuda, cpu = (session.run(pixels(tiny, 4), keep=["image_embeds"]) for session in on_both("vision"))
    embeds = [result.kept["image_embeds"].numpy() for result in (cuda, cpu)]
    for image, (a, b) in enumerate(zip(cuda.arrays["kept"], cpu.arrays["kept"], strict=True)):
        both, rows_a, rows_b = np.intersect1d(a, b, return_indices=True)
        assert len(both) >= len(a) - 1  # the last two may have scores that are equal but for rounding
        assert_close(embeds[0][image, rows_a], embeds[1][image, rows_b])


@pytest.mark.gpu
def test_a_new_cache_on_the_cuda_provider_is_zero(tiny: TinyEngine, on_both: Callable[[str], list[OrtSession]]) -> None:
    session, feeds = on_both("language")[0], prompts(tiny)
    for _ in range(3):
        state = session.allocate_state(2)
        assert not any(cache.numpy().any() for cache in state.caches)
        assert {cache.device_name() for cache in state.caches} == {"cuda"}
        session.run(feeds | {"image_embeds": feeds["image_embeds"] * np.nan}, state)


@pytest.mark.gpu
def test_language_on_the_cuda_provider_agrees_with_the_cpu(
    tiny: TinyEngine, on_both: Callable[[str], list[OrtSession]]
) -> None:
    feeds, sessions = prompts(tiny), on_both("language")
    states = [session.allocate_state(2) for session in sessions]
    for step in [feeds, *(next_tokens(feeds, i) for i in range(8))]:
        cuda, cpu = (s.run(step, state).arrays["logits"] for s, state in zip(sessions, states, strict=True))
        assert_close(cuda, cpu)
        np.testing.assert_array_equal(cuda.argmax(-1), cpu.argmax(-1))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_exact_leaves_the_inputs_of_rounded_weights_as_they_are(precision: str, tmp_path: Path) -> None:
    """ONNX Runtime without optimizations joins no DequantizeLinear with its product, so it rounds no input."""
    engine = write_engine(tmp_path / "engine", precision=precision)  # type: ignore[arg-type]
    path, contract = tmp_path / "engine" / "vision.onnx", vision_contract(engine.model.config, 16, precision, LIMITS)
    feeds = {"pixel_values": pixels(engine, 1)["pixel_values"].astype(np.float16)}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    truth, kept = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)
    errors = {}
    for exact in (True, False):
        arrays = OrtSession(path, contract, Options(exact=exact)).run(feeds).arrays
        same = np.flatnonzero(np.isin(kept[0], arrays["kept"][0]))
        rows = np.searchsorted(arrays["kept"][0], kept[0][same])
        errors[exact] = np.abs(arrays["image_embeds"][0, rows] - truth[0, same]).mean() / np.abs(truth).mean()
    assert errors[True] < 5e-3
    assert errors[False] > 3 * errors[True]


def test_rows_and_constants_have_memory_of_their_own() -> None:
    """A cache keeps one row of a batch and counts that row: no more may stay because of it."""
    batch = np.arange(12, dtype=np.float32).reshape(3, 4)
    whole = placed(batch, "cpu")
    batch[:] = -1
    rows = whole.split()
    np.testing.assert_array_equal([row.numpy()[0] for row in rows], np.arange(12).reshape(3, 4))
    memory = [row.value.data_ptr() for row in rows]  # type: ignore[attr-defined]
    start = whole.value.data_ptr()
    assert not [at for at in memory if start <= at < start + whole.value.tensor_size_in_bytes()]
