"""TensorRT sessions on a stand-in for GPU and library (tests/fake_gpu.py), which runs the ONNX files themselves."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
from fake_gpu import CudaError, FakeGpu, Stream
from tiny_engine import LIMITS, TinyEngine, write_engine
from trt_feeds import close, contract_of, follow, next_tokens, pixels, prompts, reference, steps_of

from engines.backends import gpu_present
from engines.options import Options
from engines.sessions import trt_session
from engines.sessions.cuda_device import CudaDevice
from engines.sessions.ort_session import OrtSession
from engines.sessions.session import bytes_of
from engines.sessions.trt_session import TrtSession
from engines.widen import widened, widened_contract
from flowcut.aliases import resolve
from flowcut.contract import language_contract
from flowcut.errors import EngineError, FlowCutError

Open = Callable[..., TrtSession]
EXECUTED = ["record", "execute", "record"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("trt") / "engine", precision="fp16", backend="rtx")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(trt_session, "WAIT_S", 0)
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def open_session(tiny: TinyEngine, gpu: FakeGpu) -> Open:
    device = CudaDevice("rtx")

    def session(graph: str, **options: object) -> TrtSession:
        path, chosen = tiny.directory / f"{graph}.engine", Options.make(options)
        return TrtSession(path, contract_of(tiny, graph), "rtx", device, chosen)

    return session


def test_vision_returns_what_the_graph_computes(tiny: TinyEngine, open_session: Open) -> None:
    feeds = pixels(tiny, 3)
    got = open_session("vision").run(feeds, keep=["image_embeds"])
    expected = reference(tiny, "vision").run(feeds)
    np.testing.assert_array_equal(got.arrays["kept"], expected.arrays["kept"])
    assert close(got.kept["image_embeds"].numpy(), expected.arrays["image_embeds"])
    assert got.device_ms == 1  # one event apart: nothing but the execution is between the two


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_prefill_and_decode_equal_onnx_runtime(tiny: TinyEngine, open_session: Open, batch: int) -> None:
    got, expected = (
        follow(session, prompts(batch)) for session in (open_session("language"), reference(tiny, "language"))
    )
    assert close(got, expected)


def test_embeddings_go_from_vision_to_language_on_the_device(
    tiny: TinyEngine, gpu: FakeGpu, open_session: Open
) -> None:
    vision, language = open_session("vision"), open_session("language")
    first = vision.run(pixels(tiny, 1), keep=["image_embeds"]).kept["image_embeds"]
    vision.run(pixels(tiny, 1, seed=1), keep=["image_embeds"])  # must not touch what the first one kept
    state = language.allocate_state(2)
    gpu.log.clear()
    gpu.copied_bytes = 0
    feeds = prompts() | {"image_embeds": first}
    got = language.run(feeds, state).arrays["logits"]
    host = sum(array.nbytes for name, array in feeds.items() if name != "image_embeds")
    assert gpu.copied_bytes == host + bytes_of(first) + got.nbytes  # once within the device, none by way of the host
    compute = language.device.compute
    assert [what for what, stream in gpu.log if stream is compute] == ["wait", "record", "execute", "record"]
    copying = [what for what, stream in gpu.log if stream is not compute]
    assert copying == ["copy"] * 5 + ["record", "wait", "copy", "sync"]
    embeds = reference(tiny, "vision").run(pixels(tiny, 1)).arrays["image_embeds"]
    other = reference(tiny, "language")
    assert close(got, other.run(prompts() | {"image_embeds": embeds}, other.allocate_state(2)).arrays["logits"])


def test_no_more_is_copied_than_the_request_needs(gpu: FakeGpu, open_session: Open) -> None:
    session, feeds = open_session("language"), prompts(1, length=20)
    state = session.allocate_state(1)
    gpu.copied_bytes = 0
    logits = session.run(feeds, state).arrays["logits"]
    assert gpu.copied_bytes == sum(array.nbytes for array in feeds.values()) + logits.nbytes


def test_a_used_cache_is_cleared_before_it_is_used_again(open_session: Open) -> None:
    session, feeds = open_session("language", concurrency=1), prompts()
    spoiled = follow(session, feeds | {"image_embeds": feeds["image_embeds"] * np.float16(np.nan)})
    assert np.isnan(spoiled).any()
    assert np.isfinite(follow(session, feeds)).all()


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
    pairs = len(contract.inputs) - len(feeds)
    assert session.memory_bytes()["cache"] == 2 * 2 * greatest * pairs  # two bytes, two requests
    for step in steps_of(feeds, 3):
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
    session, expected = open_session("vision", concurrency=4), reference(tiny, "vision")
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
    gpu.fail_execution = False  # and copies that were under way do not disturb the next one
    assert close(session.run(prompts(seed=1), state).arrays["logits"], follow(session, prompts(seed=1), 0)[0])


def test_an_error_of_cuda_is_an_error_of_the_engine(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session("vision")

    def lost(event: object) -> None:
        raise CudaError("an illegal memory access was encountered")

    monkeypatch.setattr(session.device.compute, "wait", lost)
    feeds = {"pixel_values": np.zeros((1, 3, 168, 168), np.float16)}
    with pytest.raises(EngineError, match=r"vision failed on the GPU: an illegal memory access was encountered\."):
        session.run(feeds)


def test_a_state_of_another_session_is_refused(open_session: Open) -> None:
    session, other = open_session("language"), open_session("language")
    with pytest.raises(EngineError, match="language must be run with a state that it allocated, got another's"):
        session.run(prompts(), other.allocate_state(2))


def test_one_computes_while_the_inputs_of_the_next_are_copied(
    tiny: TinyEngine, gpu: FakeGpu, open_session: Open
) -> None:
    """The first request is held where it waits for its results. The second goes through from beginning to end."""
    session = open_session("language")
    states, got = [session.allocate_state(2) for _ in range(2)], dict[int, np.ndarray]()
    waits, may_go, first = threading.Event(), threading.Event(), threading.Thread(target=lambda: ask(0))

    def ask(number: int) -> None:
        got[number] = session.run(prompts(seed=number), states[number]).arrays["logits"]

    def hold(stream: Stream) -> None:
        if threading.current_thread() is first:
            waits.set()
            assert may_go.wait(60)

    gpu.before_sync = hold
    first.start()
    assert waits.wait(60)
    gpu.log.clear()
    ask(1)
    assert 0 not in got
    assert [what for what, _ in gpu.log] == [*["copy"] * 5, "record", "wait", *EXECUTED, "wait", "copy", "sync"]
    may_go.set()
    first.join()
    for number, logits in got.items():
        assert close(logits, follow(reference(tiny, "language"), prompts(seed=number), 0)[0])


def test_nobody_waits_for_the_device_with_the_lock_in_hand(gpu: FakeGpu, open_session: Open) -> None:
    vision, language = open_session("vision"), open_session("language")
    held = []
    gpu.before_sync = lambda stream: held.append(vision.device.lock.locked())
    follow(language, prompts(3))
    vision.run({"pixel_values": np.zeros((2, 3, 168, 168), np.float16)}, keep=["image_embeds"]).kept[
        "image_embeds"
    ].split()
    assert held
    assert not any(held)


def test_work_is_put_on_the_stream_that_computes_with_the_lock_in_hand(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or another thread's would come between an execution and the events around it."""
    session = open_session("language")
    compute, lock, locked = session.device.compute, session.device.lock, []
    put = compute.put
    monkeypatch.setattr(compute, "put", lambda op: (locked.append(lock.locked()), put(op)))
    follow(session, prompts(), 3)
    assert locked == [True] * 4 * 4  # wait, record, execute, record


def test_layers_are_timed_where_that_is_asked_for(open_session: Open) -> None:
    assert open_session("language").layer_times() == []
    session = open_session("language", profile=True)
    follow(session, prompts(), 2)
    first, second = session.layer_times()
    assert (first.graph, first.name, first.op, first.calls, first.total_ms) == ("language", "attention", "", 3, 2.25)
    assert (second.name, second.total_ms) == ("mlp", 0.75)
    assert session.layer_times() == []
    follow(session, prompts(), 2)
    session.forget_times()
    assert session.layer_times() == []


def test_after_close_nothing_runs_and_memory_is_free(gpu: FakeGpu, tiny: TinyEngine) -> None:
    device = CudaDevice("rtx")
    before = gpu.device_bytes
    sessions = [
        TrtSession(tiny.directory / f"{g}.engine", contract_of(tiny, g), "rtx", device) for g in ("vision", "language")
    ]
    for session in sessions:
        assert gpu.device_bytes > before
        session.close()
        session.close()  # again does no harm
    with pytest.raises(EngineError, match=r"vision must be open, got a request after its close\(\)"):
        sessions[0].run(pixels(tiny, 1))
    with pytest.raises(EngineError, match="language must be open"):
        sessions[1].allocate_state(1)
    assert gpu.device_bytes == before


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
