"""A GPU and cuda.core as far as engines/ uses them, to find what a real one would punish or hide.

Work put on a stream happens when somebody synchronises, and no sooner: what is read too early is wrong. Streams know
nothing of each other but by events, so whoever reads or overwrites what another stream has under way gets a `Misuse`,
whether or not the result would have been right. Memory holds NaN until written, is known by address and size, and may
neither be used after it was freed nor freed while in use; pinned memory may not change while it is copied. What is put
on a stream that builds a graph is recorded, and every launch does it again with the addresses of then. Every thread has
to make the device current. tests/fake_tensorrt.py has the library that runs on it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

VERSION = "1.2.3.4"
"""Of TensorRT and TensorRT-RTX here."""
SM = 89
"""The compute capability of the one device."""
POISON = 0xFF
MILLISECONDS = {"execute": 1.0, "launch": 1.0, "copy": 10.0, "fill": 10.0}
"""That each kind of work takes on the device's clock."""


class CudaError(Exception):
    """What cuda.core raises."""

    __module__ = "cuda.core"


class Misuse(CudaError):
    """What a real device would not report: it would compute nonsense, now and then."""


@dataclass(frozen=True)
class Access:
    """Bytes [begin, end) that a piece of work reads or writes."""

    begin: int
    end: int
    writes: bool


@dataclass
class Op:
    """A piece of work. `needs`: the place on another stream that has to be reached first."""

    what: str
    work: Callable[[], None]
    accesses: tuple[Access, ...] = ()
    needs: tuple[Stream, int] | None = None


@dataclass
class Memory:
    """One allocation. `uses`: what is not known to be over, by stream and place on it."""

    content: np.ndarray
    pinned: bool
    freed: bool = False
    uses: list[tuple[Access, Stream, int]] = field(default_factory=list)


class Buffer:
    """cuda.core.Buffer. An owning one frees its memory when it goes: on the device in the order of its stream."""

    def __init__(self, gpu: FakeGpu, address: int, size: int, owner: object = None) -> None:
        self.gpu, self._address, self.size, self._owner = gpu, address, size, owner

    @property
    def handle(self) -> int:
        return self._address

    def access(self, writes: bool) -> Access:
        return Access(self._address, self._address + self.size, writes)

    def copy_from(self, src: Buffer, *, stream: Stream) -> None:
        if src.size != self.size:
            raise ValueError(f"buffer sizes differ: {src.size} and {self.size}")
        gpu, target, source, size = self.gpu, self._address, src._address, self.size

        def work() -> None:
            for before, address in ((read, source), (poisoned, target)):
                if before is not None and not np.array_equal(before, gpu.read(address, size)):
                    raise Misuse(f"pinned memory at {address:#x} was changed while a copy was under way")
            gpu.write(target, gpu.read(source, size))

        with gpu.lock:
            stream.put(Op("copy", work, (src.access(False), self.access(True))))
            gpu.copied_bytes += size
            read = gpu.read(source, size) if gpu.at(source).pinned and not gpu.is_written(source, size) else None
            poisoned = None
            if gpu.at(target).pinned and stream.capturing is None:
                gpu.write(target, np.full(size, POISON, np.uint8))  # a host that does not wait reads this
                poisoned = gpu.read(target, size)

    def fill(self, value: int, *, stream: Stream) -> None:
        gpu, address, size = self.gpu, self._address, self.size  # and not the buffer: work does not keep it alive
        stream.put(Op("fill", lambda: gpu.write(address, np.full(size, value, np.uint8)), (self.access(True),)))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.gpu.host_memory(self).__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.gpu.host_memory(self).__dlpack__(**options)


class Event:
    """cuda.core.Event: the last place where it was recorded."""

    def __init__(self, gpu: FakeGpu, timing: bool) -> None:
        self.gpu, self.timing, self.time_ms = gpu, timing, None
        self.stream: Stream | None = None
        self.place = 0
        self.knows: dict[Stream, int] = {}

    def __sub__(self, other: Event) -> float:
        if not (self.timing and other.timing) or self.time_ms is None or other.time_ms is None:
            raise CudaError("both events must be timed and have happened")
        return self.time_ms - other.time_ms


class Stream:
    """cuda.core.Stream. `knows`: how far along other streams everything is over before anything put here from now."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.handle = gpu, 1000 + len(gpu.streams)
        self.ops: list[Op] = []
        self.done = 0
        self.knows: dict[Stream, int] = {}
        self.capturing: list[Op] | None = None
        self.broken = ""

    @property
    def name(self) -> str:
        return f"stream {self.handle - 1000}"

    def put(self, op: Op) -> None:
        gpu = self.gpu
        gpu.require_current()
        with gpu.lock:
            if self.capturing is not None:
                if op.needs is not None or op.what == "record":
                    self.broken = f"{op.what} while a graph is built"
                self.capturing.append(op)
                gpu.log.append((f"capture {op.what}", self))
                return
            for access in op.accesses:
                gpu.check(access, self)
            self.ops.append(op)
            for access in op.accesses:
                gpu.memory[gpu.start_of(access)].uses.append((access, self, len(self.ops)))
            gpu.calls.append(op.what)
            gpu.log.append((op.what, self))

    def record(self, event: Event | None = None, options: Any = None) -> Event:
        event = event or Event(self.gpu, bool(options and options.timing_enabled))

        def happen() -> None:
            event.time_ms = self.gpu.clock_ms

        with self.gpu.lock:
            self.put(Op("record", happen))
            event.stream, event.place, event.time_ms = self, len(self.ops), None
            event.knows = {**self.knows, self: len(self.ops)}
        return event

    def wait(self, event: Event) -> None:
        with self.gpu.lock:
            if event.stream is None:
                raise Misuse("waits for an event that was never recorded, which is no wait at all")
            self.put(Op("wait", lambda: None, needs=(event.stream, event.place)))
            merge(self.knows, event.knows)

    def sync(self) -> None:
        self.gpu.require_current()
        if self.capturing is not None:
            self.broken = "sync while a graph is built"
            raise CudaError(self.broken)
        if self.gpu.before_sync is not None:
            self.gpu.before_sync(self)
        with self.gpu.lock:
            self.gpu.calls.append("sync")
            self.gpu.log.append(("sync", self))
            place, knows = len(self.ops), dict(self.knows)
            self.run(place)
            merge(self.gpu.over, {**knows, self: place})
            self.gpu.raise_later()

    def run(self, until: int) -> None:
        """Do what is before a place, and on other streams what that waits for."""
        while self.done < until:
            op = self.ops[self.done]
            self.done += 1
            if op.needs is not None:
                op.needs[0].run(op.needs[1])
            op.work()
            self.gpu.clock_ms += MILLISECONDS.get(op.what, 0.0)
            op.work = nothing  # lets go of what it held

    def create_graph_builder(self) -> GraphBuilder:
        return GraphBuilder(self)


class GraphBuilder:
    """cuda.core.graph.GraphBuilder over a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.ops = stream, None

    def begin_building(self, mode: str = "relaxed") -> GraphBuilder:
        if mode not in ("global", "thread_local", "relaxed") or self.stream.capturing is not None:
            raise CudaError(f"cannot build in mode {mode}")
        self.stream.gpu.require_current()
        self.stream.capturing, self.stream.broken = [], ""
        return self

    def end_building(self) -> GraphBuilder:
        if self.stream.capturing is None:
            raise CudaError("nothing is being built")
        self.ops, self.stream.capturing = self.stream.capturing, None
        if self.stream.broken:
            raise CudaError(f"the graph is broken by {self.stream.broken}")
        return self

    def complete(self, options: Any = None) -> Graph:
        if self.ops is None:
            raise CudaError("building has not ended")
        self.stream.gpu.graphs += 1
        return Graph(self.stream.gpu, self.ops)

    def close(self) -> None:
        self.stream.capturing = None


class Graph:
    """cuda.core.graph.Graph: all of its work at once, with what was there when it was captured."""

    def __init__(self, gpu: FakeGpu, ops: list[Op]) -> None:
        self.gpu, self.ops = gpu, ops

    def launch(self, stream: Stream) -> None:
        def work() -> None:
            for op in self.ops:
                op.work()

        for op in self.ops:
            if (still_valid := getattr(op.work, "check", None)) is not None:
                still_valid()
        stream.put(Op("launch", work, tuple(access for op in self.ops for access in op.accesses)))


class FakeGpu:
    """The device's memory and streams, and what was asked of it.

    Attributes:
        contexts_made: execution contexts, each of which takes memory of a real device.
        calls: what was put on any stream or waited for, in the order in which that was asked; log: with the stream.
        over: how far along each stream the host knows everything to be over.
        before_sync: called without any lock when somebody begins to wait.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.memory: dict[int, Memory] = {}
        self.calls: list[str] = []
        self.log: list[tuple[str, Stream]] = []
        self.streams: list[Stream] = []
        self.over: dict[Stream, int] = {}
        self.before_sync: Callable[[Stream], None] | None = None
        self.allocations = self.graphs = self.compiled = self.copied_bytes = self.contexts_made = 0
        self.free_bytes = 1 << 40
        self.clock_ms = 0.0
        self.fail_execution = self.fail_capture = False
        self.updates_in_place = True
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self._late: list[str] = []
        self._next = 1 << 20
        self._thread = threading.local()

    @property
    def device_bytes(self) -> int:
        return sum(m.content.size for m in self.memory.values() if not (m.pinned or m.freed))

    def require_current(self) -> None:
        if not getattr(self._thread, "current", False):
            raise CudaError("no device is current in this thread")

    def make_current(self) -> None:
        self._thread.current = True

    def allocate(self, size: int, *, stream: Stream | None) -> Buffer:
        """Of the device, where a stream is given, else pinned memory of the host."""
        self.require_current()
        with self.lock:
            address, self._next = self._next, self._next + -(-size // 512) * 512 + 4096
            self.allocations += 1
            self.free_bytes -= size if stream else 0
            if self.free_bytes < 0:
                raise CudaError("out of memory")
            self.memory[address] = Memory(np.full(size, POISON, np.uint8), stream is None)
            if stream is not None:  # other streams must not use it before
                stream.put(Op("allocate", nothing, (Access(address, address + size, True),)))
        buffer = Buffer(self, address, size)
        weakref.finalize(buffer, self._free, address, stream).atexit = False
        return buffer

    def _free(self, address: int, stream: Stream | None) -> None:
        with self.lock:
            memory = self.memory[address]
            memory.freed = True
            for _, user, place in memory.uses:
                before = max(self.over.get(user, 0), stream.knows.get(user, 0) if stream else 0)
                if user is not stream and place > before:
                    self._late.append(f"memory at {address:#x} was freed while {user.name} used it")
            if stream is None:
                memory.content = np.empty(0, np.uint8)
            else:
                stream.ops.append(Op("free", lambda: self.memory.pop(address) and None))

    def raise_later(self) -> None:
        """Raise what a finalizer found, where somebody can see it."""
        if self._late:
            late, self._late = self._late, []
            raise Misuse("; ".join(late))

    def start_of(self, access: Access) -> int:
        for start, memory in self.memory.items():
            if start <= access.begin < start + max(1, len(memory.content)) or start == access.begin:
                if memory.freed:
                    raise Misuse(f"memory at {access.begin:#x} is used after it was freed")
                if access.end > start + len(memory.content):
                    break
                return start
        raise CudaError(f"illegal memory access: {access.end - access.begin} bytes at {access.begin:#x}")

    def check(self, access: Access, stream: Stream) -> None:
        """That nothing another stream does with these bytes may be under way."""
        memory = self.memory[self.start_of(access)]
        memory.uses = [use for use in memory.uses if use[2] > self.over.get(use[1], 0)]
        for other, user, place in memory.uses:
            apart = other.end <= access.begin or access.end <= other.begin
            if apart or user is stream or not (other.writes or access.writes) or place <= stream.knows.get(user, 0):
                continue
            doing = ("reads", "writes")
            raise Misuse(
                f"{stream.name} {doing[access.writes]} bytes {access.begin:#x}..{access.end:#x} that {user.name} "
                f"{doing[other.writes]}, and no event or wait is between the two"
            )

    def at(self, address: int) -> Memory:
        return self.memory[self.start_of(Access(address, address, False))]

    def is_written(self, address: int, size: int) -> bool:
        """Whether something under way writes there."""
        uses = [(use, place - stream.done) for use, stream, place in self.at(address).uses]
        return any(u.writes and left > 0 and u.begin < address + size and address < u.end for u, left in uses)

    def _bytes(self, address: int, size: int) -> np.ndarray:
        for start, memory in self.memory.items():
            if start <= address and address + size <= start + len(memory.content):
                return memory.content[address - start : address - start + size]
        raise CudaError(f"illegal memory access: {size} bytes at {address:#x}")

    def read(self, address: int, size: int) -> np.ndarray:
        return self._bytes(address, size).copy()

    def write(self, address: int, content: np.ndarray) -> None:
        self._bytes(address, len(content))[:] = content

    def host_memory(self, buffer: Buffer) -> np.ndarray:
        if not self.at(buffer.handle).pinned:
            raise BufferError("memory of the device cannot be read by the host")
        return self._bytes(buffer.handle, buffer.size).view(np.int8)

    def cuda_core(self) -> ModuleType:
        """The module cuda.core."""
        module, gpu = ModuleType("cuda.core"), self

        class Device:
            def __init__(self, number: int) -> None:
                assert number == 0
                self.arch = str(SM)

            def set_current(self) -> None:
                gpu.make_current()

            def create_stream(self) -> Stream:
                gpu.require_current()
                gpu.streams.append(Stream(gpu))
                return gpu.streams[-1]

            def create_event(self, options: Any = None) -> Event:
                gpu.require_current()
                return Event(gpu, bool(options and options.timing_enabled))

            def allocate(self, size: int, *, stream: Stream) -> Buffer:
                return gpu.allocate(size, stream=stream)

        class OwnedBuffer(Buffer):
            @staticmethod
            def from_handle(ptr: int, size: int, mr: object = None, owner: object = None) -> Buffer:
                return Buffer(gpu, ptr, size, owner)

        module.Device, module.Buffer = Device, OwnedBuffer
        module.EventOptions = SimpleNamespace
        module.LegacyPinnedMemoryResource = lambda: SimpleNamespace(
            allocate=lambda size, *, stream=None: gpu.allocate(size, stream=None)
        )
        return module


class WatchedLock:
    """A lock that tells when a thread comes to wait for it."""

    def __init__(self, lock: threading.Lock, wanted: Callable[[], None]) -> None:
        self._lock, self._wanted, self.locked = lock, wanted, lock.locked

    def __enter__(self) -> None:
        self._wanted()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def merge(known: dict[Stream, int], more: Mapping[Stream, int]) -> None:
    for stream, place in more.items():
        known[stream] = max(known.get(stream, 0), place)


def nothing() -> None:
    """Work that only has its place in the order."""


def install(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A machine with this GPU: its driver library and the three modules."""
    import fake_tensorrt

    gpu = FakeGpu()
    for name in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, fake_tensorrt.module(gpu, name))
    monkeypatch.setitem(sys.modules, "cuda.core", gpu.cuda_core())
    real = ctypes.CDLL

    def load(name: str, *args: Any, **options: Any) -> Any:
        return driver if name == "libcuda.so.1" else real(name, *args, **options)

    def count_devices(count: Any) -> int:
        count._obj.value = 1
        return 0

    def attribute(value: Any, number: int, device: int) -> int:
        value._obj.value = {75: SM // 10, 76: SM % 10}[number]  # major and minor compute capability
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGetCount=count_devices, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(ctypes, "CDLL", load)
    return gpu
