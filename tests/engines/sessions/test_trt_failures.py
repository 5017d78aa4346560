"""What goes wrong in one request on the fake GPU is that request's error and nobody else's."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import fake_gpu
import numpy as np
import pytest
from fake_gpu import CudaError, FakeGpu, GraphBuilder, WatchedLock
from tiny_engine import TinyEngine, write_engine
from trt_feeds import close, contract_of, follow, pixels, prompts, reference, session_of

from engines.listeners import KEPT
from engines.options import Options
from engines.sessions import trt_session
from engines.sessions.cuda_buffers import Slot, placed
from engines.sessions.cuda_device import CudaDevice
from engines.sessions.trt_session import TrtSession
from flowcut.errors import EngineError

LOST = r"failed on the GPU: the device is lost\.$"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("failures") / "engine", precision="fp16", backend="rtx")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(trt_session, "WAIT_S", 0)
    return fake_gpu.install(monkeypatch)


@dataclass
class Foreign:
    """A tensor of another backend, which is only found once copies are under way."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.float16]


def lose(*_: object, **__: object) -> None:
    raise CudaError("the device\nis lost")


def on_device(tiny: TinyEngine, graph: str, device: CudaDevice, backend: str = "rtx", **options: object) -> TrtSession:
    path = tiny.directory / f"{graph}.engine"
    return TrtSession(path, contract_of(tiny, graph), backend, device, Options.make(options))


def test_a_failing_request_leaves_the_graph_that_another_captures_alone(
    tiny: TinyEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One is held while it captures, until the other waits for its lock or, wrongly, is done without."""
    session, feeds, expected = session_of(tiny, "language", "trt"), prompts(), reference(tiny, "language")
    captures, may_go, errors = threading.Event(), threading.Event(), list[Exception]()
    got: list[np.ndarray] = []

    def fail() -> None:
        bad = prompts() | {"image_embeds": Foreign((1, 16, 192), np.dtype(np.float16))}
        state = session.allocate_state(2)
        assert captures.wait(60)
        try:
            session.run(bad, state)
        except Exception as error:
            errors.append(error)
        may_go.set()

    def end_building(builder: GraphBuilder) -> GraphBuilder:
        captures.set()
        assert may_go.wait(60)
        return ended(builder)

    ended = GraphBuilder.end_building
    monkeypatch.setattr(GraphBuilder, "end_building", end_building)
    capturing = threading.Thread(target=lambda: got.append(follow(session, feeds, 4)))
    failing = threading.Thread(target=fail)
    session.device.lock = WatchedLock(  # type: ignore[assignment]
        session.device.lock, lambda: may_go.set() if threading.current_thread() is failing else None
    )
    for thread in (failing, capturing):
        thread.start()
    for thread in (failing, capturing):
        thread.join()
    (error,) = errors
    assert "image_embeds must be arrays or tensors of this backend, got Foreign" in str(error)
    assert gpu.graphs == 1
    assert "without a CUDA graph" not in caplog.text
    assert close(got[0], follow(expected, feeds, 4))


@pytest.mark.parametrize("breaks", ["fetch", "keep"])
def test_a_place_is_given_back_with_nothing_under_way(
    tiny: TinyEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    """Behind the execution. The fake refuses the next request the use of what another stream has under way."""
    session = session_of(tiny, "vision", concurrency=1)
    with monkeypatch.context() as patched:
        patched.setattr(Slot, breaks, lose)
        with pytest.raises(EngineError, match=f"^vision {LOST}"):
            session.run(pixels(tiny, 2), keep=["image_embeds"])
    assert all(stream.done == len(stream.ops) for stream in gpu.streams)
    got = session.run(pixels(tiny, 2)).arrays["image_embeds"]
    assert close(got, reference(tiny, "vision").run(pixels(tiny, 2)).arrays["image_embeds"])


def test_copies_are_waited_for_whatever_else_fails(
    tiny: TinyEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(tiny, "vision", concurrency=1)
    compute, slot = session.device.compute, session._places[0].slot
    monkeypatch.setattr(compute, "record", lose)
    gpu.log.clear()
    with pytest.raises(EngineError, match=f"^vision {LOST}"):
        session.run(pixels(tiny, 1))
    assert ("sync", slot.copies) in gpu.log
    assert ("sync", compute) not in gpu.log


def test_memory_allocated_while_others_compute_waits_for_its_own(tiny: TinyEngine, gpu: FakeGpu) -> None:
    device = CudaDevice("rtx")
    gpu.log.clear()
    placed(device, np.zeros(3))
    assert ("sync", device.compute) not in gpu.log


Act = Callable[[TrtSession, TrtSession], object]
ACTS: dict[str, tuple[str, str, Act]] = {
    "clear": ("Buffer.fill", "clearing the KV cache", lambda _, language: language.allocate_state(1)),
    "place": ("Buffer.copy_from", "copying an array", lambda _, language: language.place(np.zeros(2, np.float32))),
    "pinned": ("FakeGpu.allocate", "pinning 64 bytes", lambda _, language: language.device.pinned(64)),
    "event": ("FakeGpu.require_current", "making an event", lambda _, language: language.device.event()),
    "stream": ("FakeGpu.require_current", "making a stream", lambda _, language: language.device.stream()),
    "current": ("FakeGpu.make_current", "making the device current", lambda _, language: language.allocate_state(1)),
}


@pytest.mark.parametrize("name", ACTS)
def test_any_error_of_cuda_is_the_engines(
    tiny: TinyEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, said, act = ACTS[name]
    sessions = [session_of(tiny, graph) for graph in ("vision", "language")]
    owner, method = where.split(".")
    with monkeypatch.context() as patched:
        patched.setattr(getattr(fake_gpu, owner), method, lose)
        with pytest.raises(EngineError, match=f"^{said}.* {LOST}"):
            act(*sessions)


@pytest.mark.parametrize("method", ["split", "numpy"])
def test_an_error_behind_a_run_is_the_engines(
    tiny: TinyEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    kept = session_of(tiny, "vision").run(pixels(tiny, 2), keep=["image_embeds"]).kept["image_embeds"]
    with monkeypatch.context() as patched:
        patched.setattr(fake_gpu.Buffer, "copy_from", lose)
        with pytest.raises(EngineError, match=f"^copying a tensor.* {LOST}"):
            getattr(kept, method)()


def test_other_errors_stay_what_they_are(tiny: TinyEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(tiny, "vision")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Slot, "fetch", stop)
    with pytest.raises(KeyboardInterrupt):
        session.run(pixels(tiny, 1))


def test_each_error_has_its_own_reasons(tiny: TinyEngine, gpu: FakeGpu) -> None:
    session = session_of(tiny, "language")
    state = session.allocate_state(2)
    gpu.fail_execution = True
    for _ in range(3):
        with pytest.raises(EngineError) as caught:
            session.run(prompts(), state)
        assert str(caught.value).count("told to fail") == 1


def test_what_the_library_says_does_not_pile_up(tiny: TinyEngine, gpu: FakeGpu) -> None:
    session = session_of(tiny, "language")
    for i in range(10 * KEPT):
        session._engine.logger.log(1, f"an error that stopped nothing, {i}")
    assert len(session._log.errors) == KEPT


def test_a_process_has_one_logger_and_a_device_one_runtime(
    tiny: TinyEngine, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    devices = [CudaDevice("rtx"), CudaDevice("rtx")]
    sessions = [on_device(tiny, graph, device) for device in devices for graph in ("vision", "language")]
    assert "createInferRuntime" not in caplog.text
    assert len({id(session._runtime) for session in sessions}) == 2
    assert on_device(tiny, "vision", devices[0], "trt")._runtime is not sessions[0]._runtime
    sessions[0]._engine.logger.log(2, "a warning")
    (said,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert said.getMessage() == "a warning"


@pytest.mark.parametrize("comes_back", [False, True])
def test_close_wakes_whoever_waits_for_a_place(
    tiny: TinyEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """Three wait while the only place is taken, or come to wait only after the close, which is the same to them."""
    session = session_of(tiny, "vision", concurrency=1)
    place, errors = session._idle.get(), list[Exception]()
    asked = threading.Semaphore(0)
    check = session._check_open
    monkeypatch.setattr(session, "_check_open", lambda: (check(), asked.release()))

    def look() -> None:
        try:
            session.run(pixels(tiny, 1))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert asked.acquire(timeout=60)
    idle = session._idle
    session.close()
    if comes_back:
        idle.put(place)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [str(error) for error in errors] == [
        "vision must be open, got a request after its close(). Load it again."
    ] * 3


def test_a_closed_session_takes_no_place_back(tiny: TinyEngine, gpu: FakeGpu) -> None:
    device = CudaDevice("rtx")
    before = gpu.device_bytes
    session = on_device(tiny, "language", device)
    state = session.allocate_state(1)
    session.close()
    assert gpu.device_bytes > before  # somebody still has it
    del state
    gc.collect()
    assert gpu.device_bytes == before
