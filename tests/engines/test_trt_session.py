"""TensorRT sessions on a stand-in for GPU and library (tests/fake_gpu.py), which runs the ONNX files themselves."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
import recipe
from fake_gpu import FakeGpu
from tiny_engine import LIMITS, TinyEngine, write_engine

from engines.backends import gpu_present
from engines.cuda_device import CudaDevice
from engines.ort_session import OrtSession
from engines.trt_session import TrtSession
from engines.widen import widened, widened_contract
from flowcut.aliases import resolve
from flowcut.contract import GraphContract, language_contract, vision_contract
from flowcut.errors import EngineError, FlowCutError

Feeds = dict[str, np.ndarray]
Open = Callable[[str], TrtSession]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("trt") / "engine", precision="fp16", backend="rtx")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def open_session(tiny: TinyEngine, gpu: FakeGpu) -> Open:
    device = CudaDevice("rtx")
    return lambda graph: TrtSession(tiny.directory / f"{graph}.engine", contract_of(tiny, graph), "rtx", device)


def contract_of(tiny: TinyEngine, graph: str) -> GraphContract:
    make = {"vision": vision_contract, "language": language_contract}[graph]
    return make(tiny.model.config, tiny.schedule.tokens, "fp16", LIMITS)


def reference(tiny: TinyEngine, graph: str) -> OrtSession:
    return OrtSession(tiny.directory / f"{graph}.onnx", contract_of(tiny, graph))


def pixels(tiny: TinyEngine, images: int, seed: int = 0) -> Feeds:
    size = tiny.model.config.vision.image_size
    return {"pixel_values": recipe.pixels(size, images, seed).astype(np.float16)}


def prompts(batch: int = 2, length: int = 24, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    rows = np.full((batch, length), -1)
    rows[0, 2:18] = np.arange(16)
    return {
        "input_ids": rng.integers(3, 448, (batch, length)),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
        "image_rows": rows,
        "last_token": np.arange(batch) + length - batch,
        "image_embeds": rng.standard_normal((1, 16, 192)).astype(np.float16),
    }


def next_tokens(feeds: Feeds, step: int) -> Feeds:
    batch = len(feeds["last_token"])
    return feeds | {
        "input_ids": np.full((batch, 1), 5 + step),
        "position_ids": (feeds["last_token"] + 1 + step)[:, None],
        "image_rows": np.full((batch, 1), -1),
        "last_token": np.zeros(batch, np.int64),
    }


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    return float(np.abs(got - expected).max()) <= 1e-3 * float(np.abs(expected).max())


def test_vision_returns_what_the_graph_computes(tiny: TinyEngine, open_session: Open) -> None:
    feeds = pixels(tiny, 3)
    got = open_session("vision").run(feeds, keep=["image_embeds"])
    expected = reference(tiny, "vision").run(feeds)
    np.testing.assert_array_equal(got.arrays["kept"], expected.arrays["kept"])
    assert close(got.kept["image_embeds"].numpy(), expected.arrays["image_embeds"])
    assert got.device_ms == 1  # one event apart: nothing but the execution is between the two


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_prefill_and_decode_equal_onnx_runtime(tiny: TinyEngine, open_session: Open, batch: int) -> None:
    answers = []
    for session in (open_session("language"), reference(tiny, "language")):
        feeds, state = prompts(batch), session.allocate_state(batch)
        steps = [feeds, *(next_tokens(feeds, i) for i in range(4))]
        answers.append([session.run(step, state).arrays["logits"] for step in steps])
    assert all(map(close, *answers))


def test_embeddings_go_from_vision_to_language_on_the_device(
    tiny: TinyEngine, gpu: FakeGpu, open_session: Open
) -> None:
    vision, language = open_session("vision"), open_session("language")
    first = vision.run(pixels(tiny, 1), keep=["image_embeds"]).kept["image_embeds"]
    vision.run(pixels(tiny, 1, seed=1), keep=["image_embeds"])  # must not touch what the first one kept
    state = language.allocate_state(2)
    gpu.calls.clear()
    got = language.run(prompts() | {"image_embeds": first}, state).arrays["logits"]
    assert gpu.calls == ["copy"] * 4 + ["record", "execute", "record", "copy", "sync"]
    embeds = reference(tiny, "vision").run(pixels(tiny, 1)).arrays["image_embeds"]
    other = reference(tiny, "language")
    assert close(got, other.run(prompts() | {"image_embeds": embeds}, other.allocate_state(2)).arrays["logits"])


def test_memory_is_allocated_once(gpu: FakeGpu, open_session: Open) -> None:
    session = open_session("language")

    def request(batch: int) -> None:
        feeds, state = prompts(batch), session.allocate_state(batch)
        for step in [feeds, *(next_tokens(feeds, i) for i in range(3))]:
            session.run(step, state)
        del state
        gc.collect()

    request(1)
    before = gpu.allocations
    for batch in (3, 2, 1):
        request(batch)
    assert gpu.allocations == before


def test_no_more_is_copied_than_the_request_needs(gpu: FakeGpu, open_session: Open) -> None:
    session, feeds = open_session("language"), prompts(1, length=20)
    state = session.allocate_state(1)
    gpu.copied_bytes = 0
    logits = session.run(feeds, state).arrays["logits"]
    assert gpu.copied_bytes == sum(array.nbytes for array in feeds.values()) + logits.nbytes


def test_kept_outputs_are_freed_with_their_last_reference(tiny: TinyEngine, gpu: FakeGpu, open_session: Open) -> None:
    session = open_session("vision")
    before = gpu.device_bytes
    for _ in range(3):
        session.run(pixels(tiny, 2), keep=["image_embeds"])
    gc.collect()
    session.run(pixels(tiny, 2))  # a freed buffer goes in the order of the stream
    assert gpu.device_bytes == before


def test_a_used_cache_is_cleared_before_it_is_used_again(open_session: Open) -> None:
    session, feeds = open_session("language"), prompts()
    spoiled = session.run(
        feeds | {"image_embeds": feeds["image_embeds"] * np.float16(np.nan)}, session.allocate_state(2)
    )
    assert np.isnan(spoiled.arrays["logits"]).any()
    gc.collect()
    again = session.run(feeds, session.allocate_state(2)).arrays["logits"]
    assert np.isfinite(again).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_bf16_decoder_exchanges_float32_and_keeps_its_cache_in_two_bytes(
    gpu: FakeGpu, tmp_path: Path, batch: int
) -> None:
    directory = write_engine(tmp_path / "engine", precision="bf16", backend="rtx").directory
    contract = language_contract(resolve("llava-tiny").config, 16, "bf16", LIMITS)
    session = TrtSession(directory / "language.engine", contract, "rtx", CudaDevice("rtx"))
    with widened(directory / "language.onnx") as path:
        other = OrtSession(path, widened_contract(contract))
    feeds = prompts(batch)
    feeds["image_embeds"] = feeds["image_embeds"].astype(np.float32)
    state, alone = session.allocate_state(batch), other.allocate_state(batch)
    greatest = LIMITS.max_batch * 4 * LIMITS.cache_rows * 48  # heads, rows, size
    assert {buffer.size for buffer in state.buffers.values()} == {2 * greatest}
    for step in [feeds, *(next_tokens(feeds, i) for i in range(3))]:
        got, expected = (s.run(step, own).arrays["logits"] for s, own in ((session, state), (other, alone)))
        assert got.dtype == np.float32
        assert float(np.abs(got - expected).max()) <= 0.02 * float(np.abs(expected).max())  # the cache's rounding
    assert not np.array_equal(got, expected)  # which there was


@pytest.mark.parametrize("batches", [(2, 1), (2, 2)])
def test_two_requests_may_alternate(tiny: TinyEngine, open_session: Open, batches: tuple[int, int]) -> None:
    session, other = open_session("language"), reference(tiny, "language")
    requests = [prompts(batch, seed=seed) for seed, batch in enumerate(batches)]
    states = [session.allocate_state(batch) for batch in batches]
    for feeds, state in zip(requests, states, strict=True):
        session.run(feeds, state)
    for feeds, state in zip(requests, states, strict=True):
        got = session.run(next_tokens(feeds, 0), state).arrays["logits"]
        alone = other.allocate_state(state.batch)
        other.run(feeds, alone)
        assert close(got, other.run(next_tokens(feeds, 0), alone).arrays["logits"])


def test_any_thread_may_call(tiny: TinyEngine, open_session: Open) -> None:
    session, expected = open_session("vision"), reference(tiny, "vision")
    found: dict[int, np.ndarray] = {}

    def look(seed: int) -> None:
        result = session.run(pixels(tiny, 1, seed), keep=["image_embeds"])
        found[seed] = result.kept["image_embeds"].numpy()

    threads = [threading.Thread(target=look, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == set(range(4))
    assert all(close(got, expected.run(pixels(tiny, 1, seed)).arrays["image_embeds"]) for seed, got in found.items())


def test_a_refused_execution_is_an_error_with_the_librarys_reason(gpu: FakeGpu, open_session: Open) -> None:
    session = open_session("language")
    state = session.allocate_state(2)
    gpu.fail_execution = True
    with pytest.raises(EngineError, match="language: tensorrt_rtx did not execute: cannot execute"):
        session.run(prompts(), state)


def test_feeds_are_checked_before_anything_is_copied(gpu: FakeGpu, open_session: Open) -> None:
    session = open_session("vision")
    gpu.calls.clear()
    with pytest.raises(EngineError, match=r"pixel_values must be float16\[images 1\.\.4, 3, 168, 168\]"):
        session.run({"pixel_values": np.zeros((5, 3, 168, 168), np.float16)})
    assert gpu.calls == []


def test_a_full_gpu_is_an_error(gpu: FakeGpu, open_session: Open) -> None:
    gpu.free_bytes = 1 << 14
    with pytest.raises(EngineError, match=r"the GPU must have \d+ bytes free, got: out of memory\. .*--max-batch"):
        open_session("language").allocate_state(2)


def test_a_plan_that_the_library_refuses_is_an_error(tiny: TinyEngine, gpu: FakeGpu, tmp_path: Path) -> None:
    path = tmp_path / "vision.engine"
    path.write_bytes(b"no plan")
    with pytest.raises(
        EngineError, match=r"vision\.engine could not be loaded by tensorrt_rtx: .*magicTag.*backend ort"
    ):
        TrtSession(path, contract_of(tiny, "vision"), "rtx", CudaDevice("rtx"))


def test_an_engine_of_another_contract_is_refused(tiny: TinyEngine, gpu: FakeGpu) -> None:
    contract = language_contract(tiny.model.config, 9, "fp16", LIMITS)
    with pytest.raises(EngineError, match="difference: changed image_embeds"):
        TrtSession(tiny.directory / "language.engine", contract, "rtx", CudaDevice("rtx"))


def test_an_engine_that_copies_its_cache_is_refused(gpu: FakeGpu, open_session: Open) -> None:
    gpu.updates_in_place = False
    with pytest.raises(EngineError, match=r"present\.0\.key must be updated in place of past\.0\.key, got None"):
        open_session("language")
    open_session("vision")  # which has none


def test_without_cuda_core_the_extra_is_named(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(FlowCutError, match=r"cuda\.core cannot be imported .*pip install -e '\.\[rtx\]'"):
        CudaDevice("rtx")


@pytest.mark.skipif(gpu_present(), reason="there is a GPU here")
def test_without_a_gpu_the_real_cuda_core_leads_to_onnx_runtime() -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(
        EngineError, match=r"no CUDA GPU is present\. .* --backend ort \(load_engine\(dir, backend='ort'\)\)"
    ):
        CudaDevice("rtx")


@pytest.mark.skipif(gpu_present(), reason="there is a GPU here")
def test_without_a_gpu_the_real_tensorrt_refuses_the_plan(tiny: TinyEngine, gpu: FakeGpu, tmp_path: Path) -> None:
    real = pytest.importorskip("tensorrt_rtx_bindings").tensorrt_rtx
    path = tmp_path / "vision.engine"
    path.write_bytes(bytes(4096))
    sys.modules["tensorrt_rtx"] = real  # `gpu` puts it back
    with pytest.raises(EngineError, match=r"Serialization assertion .* The same directory runs on ONNX Runtime"):
        TrtSession(path, contract_of(tiny, "vision"), "rtx", CudaDevice("rtx"))
