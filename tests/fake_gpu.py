"""A GPU, cuda.core and TensorRT as far as engines/ uses them, to find what a real one would punish or hide.

Work put on a stream happens when somebody synchronises, so what is read too early is wrong. Memory holds NaN until
written, is known by address and size, and is gone once its buffer is. Every thread has to make the device current. A
plan file holds the path of an ONNX file, which ONNX Runtime runs on the device's memory; a bf16 one in float32, its
cache being rounded to bf16 after each run.
"""

from __future__ import annotations

import ctypes
import enum
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from engines.widen import widened

ONNX_DTYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}
ONNX_DTYPES |= {onnx.TensorProto.BFLOAT16: "BF16"}
NUMPY_DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BF16": ml_dtypes.bfloat16}


class CudaError(Exception):
    """What cuda.core raises for a misuse."""


class Buffer:
    """cuda.core.Buffer. An owning one frees its memory when it goes: on the device in the order of its stream."""

    def __init__(self, gpu: FakeGpu, address: int, size: int, owner: object = None) -> None:
        self.gpu, self._address, self.size, self._owner = gpu, address, size, owner

    @property
    def handle(self) -> int:
        return self._address

    def copy_from(self, src: Buffer, *, stream: Stream) -> None:
        if src.size != self.size:
            raise ValueError(f"buffer sizes differ: {src.size} and {self.size}")
        target, source, size = self._address, src._address, self.size
        self.gpu.copied_bytes += size
        stream.put("copy", lambda: self.gpu.write(target, self.gpu.read(source, size)))

    def fill(self, value: int, *, stream: Stream) -> None:
        address, size = self._address, self.size
        stream.put("fill", lambda: self.gpu.write(address, np.full(size, value, np.uint8)))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.gpu.host_memory(self).__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.gpu.host_memory(self).__dlpack__(**options)


class Event:
    """cuda.core.Event."""

    def __init__(self, timing: bool) -> None:
        self.timing, self.time_ms = timing, None

    def __sub__(self, other: Event) -> float:
        if not (self.timing and other.timing) or self.time_ms is None or other.time_ms is None:
            raise CudaError("both events must be timed and have happened")
        return self.time_ms - other.time_ms


class Stream:
    """cuda.core.Stream, whose work waits for `sync`."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.work = gpu, []
        self.handle = 7

    def put(self, what: str, work: Callable[[], None]) -> None:
        self.gpu.require_current()
        self.gpu.calls.append(what)
        self.work.append(work)

    def record(self, event: Event | None = None, options: Any = None) -> Event:
        event = event or Event(bool(options and options.timing_enabled))

        def happen() -> None:
            self.gpu.clock_ms += 1
            event.time_ms = self.gpu.clock_ms

        self.put("record", happen)
        return event

    def sync(self) -> None:
        self.gpu.require_current()
        self.gpu.calls.append("sync")
        work, self.work = self.work, []
        for each in work:
            each()


class FakeGpu:
    """The device's memory, what was asked of it, and the modules to ask with."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: set[int] = set()
        self.calls: list[str] = []
        self.allocations = 0
        self.free_bytes = 1 << 40
        self.copied_bytes = 0
        self.clock_ms = 0.0
        self.fail_execution = False
        self.updates_in_place = True
        self.streams: list[Stream] = []
        self._next = 1 << 20
        self._thread = threading.local()

    @property
    def device_bytes(self) -> int:
        return sum(len(m) for address, m in self.memory.items() if address not in self.pinned)

    def require_current(self) -> None:
        if not getattr(self._thread, "current", False):
            raise CudaError("no device is current in this thread")

    def make_current(self) -> None:
        self._thread.current = True

    def allocate(self, size: int, *, stream: Stream | None) -> Buffer:
        """Of the device, where a stream is given, else pinned memory of the host."""
        self.require_current()
        address, self._next = self._next, self._next + size + 4096
        self.allocations += 1
        self.free_bytes -= size if stream else 0
        if self.free_bytes < 0:
            raise CudaError("out of memory")
        self.memory[address] = np.full(size, 0xFF, np.uint8)
        if stream is None:
            self.pinned.add(address)
        buffer = Buffer(self, address, size)
        weakref.finalize(buffer, self._free, address, stream)
        return buffer

    def _free(self, address: int, stream: Stream | None) -> None:
        if stream is None:
            del self.memory[address]
        else:
            stream.work.append(lambda: self.memory.pop(address))

    def _at(self, address: int, size: int) -> np.ndarray:
        for start, memory in self.memory.items():
            if start <= address and address + size <= start + len(memory):
                return memory[address - start : address - start + size]
        raise CudaError(f"illegal memory access: {size} bytes at {address:#x}")

    def read(self, address: int, size: int) -> np.ndarray:
        return self._at(address, size).copy()

    def write(self, address: int, content: np.ndarray) -> None:
        self._at(address, len(content))[:] = content

    def host_memory(self, buffer: Buffer) -> np.ndarray:
        if buffer.handle not in self.pinned:
            raise BufferError("memory of the device cannot be read by the host")
        return self._at(buffer.handle, buffer.size).view(np.int8)

    def cuda_core(self) -> ModuleType:
        """The module cuda.core."""
        module, gpu = ModuleType("cuda.core"), self

        class Device:
            def __init__(self, number: int) -> None:
                assert number == 0

            def set_current(self) -> None:
                gpu.make_current()

            def create_stream(self) -> Stream:
                gpu.require_current()
                gpu.streams.append(Stream(gpu))
                return gpu.streams[-1]

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

    def tensorrt(self, name: str) -> ModuleType:
        """The module tensorrt or tensorrt_rtx, as far as running goes."""
        module, gpu = ModuleType(name), self

        class ILogger:
            Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
                gpu.require_current()
                path = Path(bytes(memoryview(plan)).decode(errors="replace"))
                if path.suffix == ".onnx":
                    return Engine(gpu, path, self.logger)
                self.logger.log(ILogger.Severity.ERROR, "Serialization assertion header.magicTag failed.")
                return None

        module.ILogger, module.Runtime, module.TensorIOMode = ILogger, Runtime, TensorIOMode
        return module


TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
DataType = enum.Enum("DataType", list(NUMPY_DTYPES))


class Engine:
    """ICudaEngine over an ONNX file."""

    def __init__(self, gpu: FakeGpu, path: Path, logger: Any) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.gpu, self.logger = gpu, logger
        graph = onnx.load(path, load_external_data=False).graph
        bf16 = any(t.data_type == onnx.TensorProto.BFLOAT16 for t in graph.initializer)
        with widened(path) if bf16 else nullcontext(path) as file:
            self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.inputs = {t.name: t for t in self.session.get_inputs()}
        self.tensors = self.inputs | {t.name: t for t in self.session.get_outputs()}
        declared = (*graph.input, *graph.output)
        self.dtypes = {t.name: DataType[ONNX_DTYPES[t.type.tensor_type.elem_type]] for t in declared}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.dtypes[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.tensors[name].shape)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        aliased = self.gpu.updates_in_place and name.startswith("present.")
        return name.replace("present", "past") if aliased else None

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    """IExecutionContext: shapes and addresses stay as they were last set."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.gpu = engine, engine.gpu
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self.engine.get_tensor_shape(name)
        if len(shape) != len(declared) or any(d not in (-1, s) for d, s in zip(declared, shape, strict=True)):
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.tensors

    def execute_async_v3(self, stream_handle: int) -> bool:
        missing = [n for n in self.engine.inputs if n not in self.shapes] + [
            n for n in self.engine.tensors if n not in self.addresses
        ]
        apart = [
            n
            for n in self.addresses
            if n.startswith("past.") and self.addresses[n] != self.addresses["present" + n[4:]]
        ]
        if missing or apart or self.gpu.fail_execution:
            self.engine.logger.log(1, f"cannot execute: missing {missing}, past and present apart {apart}")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.gpu.streams[-1].put("execute", lambda: self._execute(shapes, addresses))
        return True

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feeds = {}
        for name, shape in shapes.items():
            dtype = np.dtype(NUMPY_DTYPES[self.engine.get_tensor_dtype(name).name])
            content = self.gpu.read(addresses[name], int(np.prod(shape)) * dtype.itemsize)
            array = content.view(dtype).reshape(shape)
            feeds[name] = array.astype(np.float32) if dtype == ml_dtypes.bfloat16 else array
        names = [n for n in self.engine.tensors if n not in self.engine.inputs]
        for name, array in zip(names, self.engine.session.run(names, feeds), strict=True):
            typed = array.astype(NUMPY_DTYPES[self.engine.get_tensor_dtype(name).name], copy=False)
            self.gpu.write(addresses[name], np.ascontiguousarray(typed).reshape(-1).view(np.uint8))


def install(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A machine with this GPU: its driver library and the three modules."""
    gpu = FakeGpu()
    for name in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, gpu.tensorrt(name))
    monkeypatch.setitem(sys.modules, "cuda.core", gpu.cuda_core())
    real = ctypes.CDLL

    def load(name: str, *args: Any, **options: Any) -> Any:
        return driver if name == "libcuda.so.1" else real(name, *args, **options)

    def count_devices(count: Any) -> int:
        count._obj.value = 1
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGetCount=count_devices)
    monkeypatch.setattr(ctypes, "CDLL", load)
    return gpu
