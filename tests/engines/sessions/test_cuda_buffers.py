"""Memory of TensorRT sessions on the fake GPU: allocated when they are opened, lent out, given back."""

from __future__ import annotations

import gc
from collections.abc import Callable

import fake_gpu
import numpy as np
import pytest
from fake_gpu import FakeGpu
from tiny_engine import LIMITS, TinyEngine, write_engine
from trt_feeds import close, contract_of, follow, next_tokens, pixels, prompts, reference, session_of, steps_of

from engines.sessions import trt_session
from engines.sessions.cuda_buffers import Pool, Slab, placed
from engines.sessions.cuda_device import CudaDevice
from engines.sessions.session import DeviceTensor, bytes_of
from engines.sessions.trt_session import TrtSession
from flowcut.errors import EngineError

Open = Callable[..., TrtSession]
ROW = 16 * 192 * 2
"""Bytes of a picture's visual tokens in float16."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("buffers") / "engine", precision="fp16", backend="rtx")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(trt_session, "WAIT_S", 0)
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def device(gpu: FakeGpu) -> CudaDevice:
    return CudaDevice("rtx")


@pytest.fixture
def open_session(tiny: TinyEngine, gpu: FakeGpu) -> Open:
    return lambda graph, **options: session_of(tiny, graph, **options)


def test_places_of_a_slab_are_apart_and_aligned(device: CudaDevice) -> None:
    slab = Slab(device, {"a": 1, "b": 300, "c": 512})
    a, b, c = (slab.address(name) for name in "abc")
    assert all(address % 256 == 0 for address in (a, b, c))
    assert a + 1 <= b
    assert b + 300 <= c
    assert c + 512 <= a + slab.bytes


def test_a_slab_of_nothing_takes_no_memory(gpu: FakeGpu, device: CudaDevice) -> None:
    before = gpu.allocations
    assert Slab(device, {}).bytes == 0
    assert gpu.allocations == before


def test_a_pool_lends_each_piece_once(device: CudaDevice) -> None:
    pool = Pool(device, 100, 3, "things", "Wait.")
    lent = [pool.lend((100,), np.dtype(np.uint8)) for _ in range(3)]
    assert len({int(tensor.buffer.handle) for tensor in lent}) == 3
    with pytest.raises(EngineError, match=r"things on the GPU must be at most 3 at once, got one more\. Wait\."):
        pool.lend((1,), np.dtype(np.uint8))
    address = int(lent.pop().buffer.handle)
    assert int(pool.lend((5,), np.dtype(np.int32)).buffer.handle) == address


def test_what_hangs_in_a_cycle_comes_back_too(device: CudaDevice) -> None:
    pool = Pool(device, 8, 1, "things", "Wait.")
    cycle: list[object] = [pool.lend((8,), np.dtype(np.uint8))]
    cycle.append(cycle)
    del cycle
    pool.lend((8,), np.dtype(np.uint8))


def test_a_tensor_outlives_its_pool(gpu: FakeGpu, device: CudaDevice) -> None:
    pool = Pool(device, 8, 1, "things", "Wait.")
    tensor = pool.lend((8,), np.dtype(np.uint8))
    del pool
    tensor.buffer.fill(3, stream=device.side)
    assert tensor.numpy().tolist() == [3] * 8


def test_what_is_placed_comes_back(device: CudaDevice) -> None:
    for array in (np.arange(6, dtype=np.int64).reshape(2, 3), np.arange(12.0).reshape(3, 4).T):
        np.testing.assert_array_equal(placed(device, array).numpy(), array)


@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_requests_allocate_nothing(tiny: TinyEngine, gpu: FakeGpu, backend: str) -> None:
    """A whole request: vision, rows of its pictures, prefill with some of them, decoding."""
    vision, language = (session_of(tiny, graph, backend, picture_cache_mb=1) for graph in ("vision", "language"))
    blank = language.place(np.zeros((1, 16, 192), np.float16))

    def request(batch: int) -> None:
        rows = vision.run(pixels(tiny, 2), keep=["image_embeds"]).kept["image_embeds"].split()
        feeds, state = prompts(batch), language.allocate_state(batch)
        language.run(feeds | {"image_embeds": rows}, state)
        for step in range(4):
            language.run(next_tokens(feeds, step) | {"image_embeds": blank}, state)

    before = gpu.allocations, gpu.device_bytes, len(gpu.streams)
    for batch in (1, 3, 2, 1, 3):
        request(batch)
    assert (gpu.allocations, gpu.device_bytes, len(gpu.streams)) == before


@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_contexts_and_graphs_of_steps_are_made_once_for_each_place_and_batch_size(
    gpu: FakeGpu, tiny: TinyEngine, backend: str
) -> None:
    """They take memory of the device, the one thing that a request may still add."""
    session = session_of(tiny, "language", backend, concurrency=2)
    made, graphs, sizes = gpu.contexts_made, gpu.graphs, (1, 2, 3)
    for _ in range(3):
        for batch in sizes:
            states = [session.allocate_state(batch) for _ in range(2)]
            for feeds in steps_of(prompts(batch), 3):
                for state in states:
                    session.run(feeds, state)
            del state, states
            grown = gpu.contexts_made - made, gpu.graphs - graphs
    assert grown == (2 * len(sizes), 2 * len(sizes) if backend == "trt" else 0)
    assert made == 2  # those that do anything, of the two places


def test_memory_is_set_aside_only_for_what_other_graphs_take(tiny: TinyEngine, gpu: FakeGpu) -> None:
    vision, language = (session_of(tiny, graph, concurrency=1, picture_cache_mb=0) for graph in ("vision", "language"))
    assert list(vision._pools) == ["image_embeds"]
    assert list(language._pools) == []
    before = gpu.allocations
    kept = vision.run(pixels(tiny, 2), keep=["kept", "image_embeds"]).kept["kept"]
    assert gpu.allocations == before + 1
    expected = reference(tiny, "vision").run(pixels(tiny, 2)).arrays["kept"]
    np.testing.assert_array_equal(kept.numpy(), expected)
    np.testing.assert_array_equal(np.concatenate([row.numpy() for row in kept.split()]), expected)


def test_a_decode_step_copies_its_numbers_and_no_picture(gpu: FakeGpu, open_session: Open) -> None:
    session = open_session("language")
    feeds, state = prompts(2), session.allocate_state(2)
    blank = session.place(np.zeros((1, 16, 192), np.float16))
    session.run(feeds, state)
    copied = []
    for step in range(3):
        gpu.copied_bytes = 0
        logits = session.run(next_tokens(feeds, step) | {"image_embeds": blank}, state).arrays["logits"].nbytes
        copied.append(gpu.copied_bytes)
    numbers = 2 * 4 * 8  # of two sequences: token, position, row, last token
    assert copied == [numbers + logits + bytes_of(blank), numbers + logits, numbers + logits]


def test_another_picture_at_the_same_address_is_copied(tiny: TinyEngine, open_session: Open) -> None:
    """The pool gives the memory of the first picture to the second."""
    vision, language, other = open_session("vision"), open_session("language"), reference(tiny, "language")
    state, addresses = language.allocate_state(2), set()
    for seed in range(2):
        row = vision.run(pixels(tiny, 1, seed), keep=["image_embeds"]).kept["image_embeds"]
        addresses.add(int(row.buffer.handle))  # type: ignore[attr-defined]
        got = language.run(prompts() | {"image_embeds": row}, state).arrays["logits"]
        alone = other.run(prompts() | {"image_embeds": row.numpy()}, other.allocate_state(2)).arrays["logits"]
        assert close(got, alone)
        del row
    assert len(addresses) == 1


@pytest.mark.parametrize("between", ["array", "list", "tensor"])
def test_the_blank_picture_is_copied_again_once_another_took_its_place(
    tiny: TinyEngine, open_session: Open, between: str
) -> None:
    session = open_session("language", concurrency=1)
    feeds = prompts(1)
    other, blank = feeds.pop("image_embeds"), np.zeros((1, 16, 192), np.float16)
    placed_blank, placed_other = session.place(blank), session.place(other)
    state, got = session.allocate_state(1), []
    for picture in (
        placed_blank,
        {"array": other, "list": [placed_other], "tensor": placed_other}[between],
        placed_blank,
    ):
        got.append(session.run(feeds | {"image_embeds": picture}, state).arrays["logits"])
    np.testing.assert_array_equal(got[0], got[2])
    assert not close(got[0], got[1])


def test_rows_have_memory_of_their_own(tiny: TinyEngine, gpu: FakeGpu, open_session: Open) -> None:
    vision = open_session("vision", concurrency=1)
    embeds = vision.run(pixels(tiny, 3), keep=["image_embeds"]).kept["image_embeds"]
    expected = embeds.numpy()
    gpu.log.clear()
    rows = embeds.split()
    assert [what for what, _ in gpu.log] == ["copy", "copy", "copy", "sync"]
    del embeds
    vision.run(pixels(tiny, 3, seed=1), keep=["image_embeds"])  # in the memory that came back
    np.testing.assert_array_equal(np.concatenate([row.numpy() for row in rows]), expected)
    only = vision.run(pixels(tiny, 1), keep=["image_embeds"]).kept["image_embeds"]
    (row,) = only.split()
    assert int(row.buffer.handle) != int(only.buffer.handle)  # type: ignore[attr-defined]


def test_rows_are_as_many_as_the_picture_cache_and_the_requests_may_hold(tiny: TinyEngine, open_session: Open) -> None:
    vision = open_session("vision", picture_cache_mb=1, concurrency=2)
    most = 10**6 // ROW + 2 * LIMITS.max_images

    def rows() -> list[DeviceTensor]:
        return vision.run(pixels(tiny, 4), keep=["image_embeds"]).kept["image_embeds"].split()

    held = [rows() for _ in range(most // 4)]
    assert sum(map(len, held)) == most - most % 4
    with pytest.raises(EngineError, match=rf"rows of image_embeds of vision .* at most {most} at once.*picture_cache_"):
        rows()
    held.clear()
    rows()


def test_kept_outputs_are_as_many_as_requests_at_once(tiny: TinyEngine, gpu: FakeGpu, open_session: Open) -> None:
    vision = open_session("vision", concurrency=3)
    before = gpu.device_bytes
    held = [vision.run(pixels(tiny, 2, seed), keep=["image_embeds"]).kept["image_embeds"] for seed in range(3)]
    with pytest.raises(EngineError, match=r"kept image_embeds of vision on the GPU must be at most 3 .* concurrency\."):
        vision.run(pixels(tiny, 2), keep=["image_embeds"])
    held.pop()
    held.append(vision.run(pixels(tiny, 2, 2), keep=["image_embeds"]).kept["image_embeds"])
    for seed, tensor in enumerate(held):
        expected = reference(tiny, "vision").run(pixels(tiny, 2, seed)).arrays["image_embeds"]
        assert close(tensor.numpy(), expected)
    assert gpu.device_bytes == before


def test_a_cache_more_than_there_are_is_refused_until_one_comes_back(gpu: FakeGpu, open_session: Open) -> None:
    session = open_session("language", concurrency=2)
    states = [session.allocate_state(1), session.allocate_state(2)]
    with pytest.raises(
        EngineError, match=r"at most 2 at once \(load_engine's concurrency\), .* A Prefill keeps its cache"
    ):
        session.allocate_state(1)
    states.pop()
    states.append(session.allocate_state(3))


def test_a_cache_in_a_cycle_comes_back(open_session: Open) -> None:
    session = open_session("language", concurrency=1)
    cycle: list[object] = [session.allocate_state(1)]
    cycle.append(cycle)
    del cycle
    session.allocate_state(1)


def test_memory_is_told_by_kind(tiny: TinyEngine, gpu: FakeGpu) -> None:
    before = gpu.device_bytes
    session = session_of(tiny, "language", concurrency=3)
    told = dict(session.memory_bytes())
    assert told.pop("weights") == (tiny.directory / "language.engine").stat().st_size
    heads, size, layers = 4, 48, sum(spec.name.startswith("past.") for spec in contract_of(tiny, "language").inputs)
    assert told["cache"] == 3 * layers * LIMITS.max_batch * heads * LIMITS.cache_rows * size * 2
    pinned = sum(m.content.size for m in gpu.memory.values() if m.pinned)
    assert told.pop("pinned") == pinned
    assert sum(told.values()) == gpu.device_bytes - before
    del session
    gc.collect()


def test_the_picture_cache_takes_what_it_may(tiny: TinyEngine, gpu: FakeGpu) -> None:
    small, large = (session_of(tiny, "vision", picture_cache_mb=mb).memory_bytes()["buffers"] for mb in (0, 4))
    assert 0 <= 4e6 - (large - small) < ROW


def test_any_number_of_slots_computes_the_same(tiny: TinyEngine, open_session: Open) -> None:
    expected = follow(reference(tiny, "language"), prompts(2))
    assert all(close(follow(open_session("language", concurrency=n), prompts(2)), expected) for n in (1, 4))
