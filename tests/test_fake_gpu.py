"""The fake GPU finds each misuse that it is there to find, and nothing where all is well."""

from __future__ import annotations

import gc
import threading
from types import ModuleType
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import Access, CudaError, FakeGpu, Misuse, Op, Stream

SIZE = 64


@pytest.fixture
def gpu() -> FakeGpu:
    made = FakeGpu()
    made.make_current()
    return made


@pytest.fixture
def cuda(gpu: FakeGpu) -> ModuleType:
    return gpu.cuda_core()


@pytest.fixture
def device(cuda: ModuleType) -> Any:
    return cuda.Device(0)


@pytest.fixture
def streams(device: Any) -> tuple[Stream, Stream]:
    return device.create_stream(), device.create_stream()


def memory(gpu: FakeGpu, stream: Stream, fill: int | None = 7) -> fake_gpu.Buffer:
    """On the device, filled, for every stream to use."""
    buffer = gpu.allocate(SIZE, stream=stream)
    if fill is not None:
        buffer.fill(fill, stream=stream)
    stream.sync()
    return buffer


def pinned(gpu: FakeGpu, fill: int = 5) -> tuple[fake_gpu.Buffer, np.ndarray]:
    buffer = gpu.allocate(SIZE, stream=None)
    view = np.from_dlpack(buffer).view(np.uint8)
    view[:] = fill
    return buffer, view


def test_work_happens_when_somebody_waits_and_not_before(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    source, (target, view) = memory(gpu, streams[0]), pinned(gpu)
    target.copy_from(source, stream=streams[0])
    assert set(view.tolist()) == {fake_gpu.POISON}
    streams[1].sync()
    assert set(view.tolist()) == {fake_gpu.POISON}
    streams[0].sync()
    assert set(view.tolist()) == {7}


@pytest.mark.parametrize("first", ["reads", "writes"])
def test_another_stream_may_not_overwrite_what_is_under_way(
    gpu: FakeGpu, streams: tuple[Stream, Stream], first: str
) -> None:
    one, other = memory(gpu, streams[0]), memory(gpu, streams[0])
    target, source = (one, other) if first == "writes" else (other, one)
    target.copy_from(source, stream=streams[0])
    with pytest.raises(Misuse, match=f"stream 1 writes .* that stream 0 {first}"):
        one.fill(1, stream=streams[1])


def test_another_stream_may_not_read_what_is_being_written(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    one, other = memory(gpu, streams[0]), memory(gpu, streams[0])
    one.fill(1, stream=streams[0])
    with pytest.raises(Misuse, match=r"stream 1 reads .* that stream 0 writes"):
        other.copy_from(one, stream=streams[1])


def test_two_may_read_or_use_other_bytes_at_once(
    gpu: FakeGpu, cuda: ModuleType, streams: tuple[Stream, Stream]
) -> None:
    one, mine, yours = (memory(gpu, streams[0]) for _ in range(3))
    mine.copy_from(one, stream=streams[0])
    yours.copy_from(one, stream=streams[1])
    streams[0].sync()
    streams[1].sync()
    for half, stream in enumerate(streams):
        cuda.Buffer.from_handle(one.handle + half * SIZE // 2, SIZE // 2, owner=one).fill(half, stream=stream)


@pytest.mark.parametrize("how", ["event", "sync", "event of an event"])
def test_what_is_ordered_is_no_misuse(gpu: FakeGpu, device: Any, streams: tuple[Stream, Stream], how: str) -> None:
    one, (target, view) = memory(gpu, streams[0]), pinned(gpu)
    one.fill(1, stream=streams[0])
    if how == "sync":
        streams[0].sync()
    elif how == "event":
        streams[1].wait(streams[0].record(device.create_event()))
    else:
        third = device.create_stream()
        third.wait(streams[0].record(device.create_event()))
        streams[1].wait(third.record(device.create_event()))
    target.copy_from(one, stream=streams[1])
    streams[1].sync()  # does, of the other stream, what it waits for
    assert set(view.tolist()) == {1}


def test_an_event_is_where_it_was_recorded_last(gpu: FakeGpu, device: Any, streams: tuple[Stream, Stream]) -> None:
    one, event = memory(gpu, streams[0]), device.create_event()
    streams[0].record(event)
    one.fill(1, stream=streams[0])
    streams[1].wait(event)
    with pytest.raises(Misuse, match="no event or wait is between"):
        one.fill(2, stream=streams[1])
    streams[0].record(event)
    streams[1].wait(event)
    one.fill(2, stream=streams[1])


def test_waiting_for_an_event_that_nobody_recorded_is_found(device: Any, streams: tuple[Stream, Stream]) -> None:
    with pytest.raises(Misuse, match="never recorded"):
        streams[1].wait(device.create_event())


def test_new_memory_belongs_to_its_stream_until_somebody_waits(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    buffer = gpu.allocate(SIZE, stream=streams[0])
    with pytest.raises(Misuse, match="stream 1 writes"):
        buffer.fill(0, stream=streams[1])


def test_freed_memory_may_not_be_used(gpu: FakeGpu, cuda: ModuleType, streams: tuple[Stream, Stream]) -> None:
    buffer = memory(gpu, streams[0])
    dangling = cuda.Buffer.from_handle(buffer.handle, SIZE)  # without owner
    held = cuda.Buffer.from_handle((kept := memory(gpu, streams[0])).handle, SIZE, owner=kept)
    del buffer, kept
    gc.collect()
    held.fill(0, stream=streams[0])
    with pytest.raises(Misuse, match="used after it was freed"):
        dangling.fill(0, stream=streams[0])


@pytest.mark.parametrize("kind", ["device", "pinned"])
def test_memory_may_not_be_freed_while_it_is_used(gpu: FakeGpu, streams: tuple[Stream, Stream], kind: str) -> None:
    buffer, target = (memory(gpu, streams[0]) if kind == "device" else pinned(gpu)[0]), memory(gpu, streams[0])
    target.copy_from(buffer, stream=streams[1])
    del buffer
    gc.collect()
    with pytest.raises(Misuse, match="was freed while stream 1 used it"):
        streams[0].sync()


def test_memory_that_nobody_uses_is_freed_in_peace(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    before = gpu.device_bytes
    buffer = memory(gpu, streams[0])
    buffer.fill(3, stream=streams[0])  # of its own stream, before it is freed there
    del buffer
    gc.collect()
    streams[0].sync()
    assert gpu.device_bytes == before


def test_pinned_memory_may_not_change_while_it_is_copied(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    target, (source, view) = memory(gpu, streams[0]), pinned(gpu)
    target.copy_from(source, stream=streams[0])
    view[3] = 9
    with pytest.raises(Misuse, match=r"pinned memory .* was changed"):
        streams[0].sync()


def test_the_host_may_not_write_where_a_copy_goes(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    source, (target, view) = memory(gpu, streams[0]), pinned(gpu)
    target.copy_from(source, stream=streams[0])
    view[:] = 1
    with pytest.raises(Misuse, match=r"pinned memory .* was changed"):
        streams[0].sync()


def test_sizes_and_bounds_count(gpu: FakeGpu, cuda: ModuleType, streams: tuple[Stream, Stream]) -> None:
    buffer = memory(gpu, streams[0])
    beyond = cuda.Buffer.from_handle(buffer.handle + 1, SIZE, owner=buffer)
    with pytest.raises(CudaError, match=f"illegal memory access: {SIZE} bytes"):
        beyond.fill(0, stream=streams[0])
    with pytest.raises(ValueError, match="buffer sizes differ"):
        buffer.copy_from(cuda.Buffer.from_handle(buffer.handle, SIZE // 2), stream=streams[0])
    with pytest.raises(BufferError, match="cannot be read by the host"):
        np.from_dlpack(buffer)


def test_a_thread_has_to_make_the_device_current(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    said = []

    def other() -> None:
        try:
            streams[0].sync()
        except CudaError as error:
            said.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert said == ["no device is current in this thread"]


def test_the_difference_of_events_is_the_work_between(
    gpu: FakeGpu, cuda: ModuleType, streams: tuple[Stream, Stream]
) -> None:
    timed, buffer = cuda.EventOptions(timing_enabled=True), memory(gpu, streams[0])
    start = streams[0].record(options=timed)
    buffer.fill(1, stream=streams[0])
    end = streams[0].record(options=timed)
    with pytest.raises(CudaError, match="have happened"):
        _ = end - start
    streams[0].sync()
    assert end - start == fake_gpu.MILLISECONDS["fill"]


def captured(stream: Stream, buffer: fake_gpu.Buffer, value: int) -> fake_gpu.Graph:
    builder = stream.create_graph_builder().begin_building()
    buffer.fill(value, stream=stream)
    return builder.end_building().complete()


def test_a_graph_does_at_each_launch_what_was_captured(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    buffer = memory(gpu, streams[0])
    graph = captured(streams[0], buffer, 1)
    streams[0].sync()
    assert set(gpu.read(buffer.handle, SIZE)) == {7}  # capturing does nothing
    for _ in range(2):
        buffer.fill(2, stream=streams[0])
        graph.launch(streams[0])
        streams[0].sync()
        assert set(gpu.read(buffer.handle, SIZE)) == {1}


def test_a_launch_is_checked_as_its_work_is(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    buffer = memory(gpu, streams[0])
    graph = captured(streams[0], buffer, 1)
    buffer.fill(2, stream=streams[1])
    with pytest.raises(Misuse, match=r"stream 0 writes .* that stream 1 writes"):
        graph.launch(streams[0])
    streams[1].sync()
    del buffer
    gc.collect()
    with pytest.raises(Misuse, match="used after it was freed"):
        graph.launch(streams[0])


def test_nobody_may_wait_for_a_stream_that_builds_a_graph(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    builder = streams[0].create_graph_builder().begin_building()
    with pytest.raises(CudaError, match="sync while a graph is built"):
        streams[0].sync()
    with pytest.raises(CudaError, match="the graph is broken by sync"):
        builder.end_building()
    streams[0].sync()


def test_an_op_of_several_accesses_is_checked_in_each(gpu: FakeGpu, streams: tuple[Stream, Stream]) -> None:
    one, other = memory(gpu, streams[0]), memory(gpu, streams[0])
    other.fill(0, stream=streams[1])
    accesses = (Access(one.handle, one.handle + 1, True), Access(other.handle, other.handle + 1, False))
    with pytest.raises(Misuse, match=r"stream 0 reads .* that stream 1 writes"):
        streams[0].put(Op("execute", fake_gpu.nothing, accesses))
