"""TensorRT and TensorRT-RTX on the fake GPU, as far as running goes.

A plan file holds the path of an ONNX file, which ONNX Runtime runs on the device's memory; a bf16 one in float32, its
cache being rounded to bf16 after each run. An execution touches what a real one does: inputs, outputs, scratch memory.
"""

from __future__ import annotations

import enum
import json
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from fake_gpu import VERSION, Access, FakeGpu, Misuse, Op, Stream

from engines.widen import widened

ONNX_DTYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}
ONNX_DTYPES |= {onnx.TensorProto.BFLOAT16: "BF16"}
NUMPY_DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BF16": ml_dtypes.bfloat16}
SCRATCH_BYTES = 4096
LAYERS = {"attention": 0.75, "mlp": 0.25}
"""Milliseconds that a profiler hears of, of each execution."""

TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
DataType = enum.Enum("DataType", list(NUMPY_DTYPES))
Strategy = enum.IntEnum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED", start=0)
CudaGraphStrategy = enum.IntEnum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE", start=0)
Shapes = dict[str, tuple[int, ...]]


class RuntimeCache:
    """IRuntimeCache: names of the kernels that were compiled."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.kernels = gpu, set[str]()

    def serialize(self) -> bytes:
        return json.dumps([VERSION, sorted(self.kernels)]).encode()

    def deserialize(self, blob: bytes) -> bool:
        self.gpu.require_current()
        version, kernels = json.loads(blob)
        if version != VERSION:
            return False
        self.kernels |= set(kernels)
        return True


class RuntimeConfig:
    """IRuntimeConfig of TensorRT-RTX."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.strategy, self.cache = gpu, Strategy.STATIC, None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.gpu)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy


def module(gpu: FakeGpu, name: str) -> ModuleType:
    """The module tensorrt or tensorrt_rtx."""
    made = ModuleType(name)

    class ILogger:
        Severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)

    class IProfiler:
        pass

    class Runtime:
        """Complains where a process has several loggers, as the real one does."""

        first: Any = None

        def __init__(self, logger: Any) -> None:
            Runtime.first, self.logger = Runtime.first or logger, logger
            if logger is not Runtime.first:
                logger.log(ILogger.Severity.WARNING, "The logger passed into createInferRuntime differs")

        def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
            gpu.require_current()
            path = Path(bytes(memoryview(plan)).decode(errors="replace"))
            if path.suffix == ".onnx":
                return (RtxEngine if name == "tensorrt_rtx" else Engine)(gpu, path, self.logger)
            self.logger.log(ILogger.Severity.ERROR, "Serialization assertion header.magicTag failed.")
            return None

    made.ILogger, made.IProfiler, made.Runtime, made.TensorIOMode = ILogger, IProfiler, Runtime, TensorIOMode
    made.ExecutionContextAllocationStrategy, made.__version__ = Strategy, VERSION
    if name == "tensorrt_rtx":
        made.CudaGraphStrategy = CudaGraphStrategy
    return made


class Engine:
    """ICudaEngine over an ONNX file."""

    device_memory_size_v2 = SCRATCH_BYTES
    may_be_captured = True

    def __init__(self, gpu: FakeGpu, path: Path, logger: Any) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.gpu, self.path, self.logger = gpu, path, logger
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

    def create_execution_context(self, strategy: Strategy = Strategy.STATIC) -> Context:
        return Context(self, RuntimeConfig(self.gpu), Strategy(strategy))

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(NUMPY_DTYPES[self.dtypes[name].name])

    def sizes(self, shapes: Shapes) -> dict[str, int]:
        """The named dimensions that inputs of these shapes have."""
        return {d: n for name, s in shapes.items() for d, n in zip(self.inputs[name].shape, s, strict=True)}


class RtxEngine(Engine):
    """That of TensorRT-RTX, which is not for others to capture."""

    may_be_captured = False

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.gpu)

    def create_execution_context(self, config: RuntimeConfig | Strategy = Strategy.STATIC) -> Context:
        if isinstance(config, RuntimeConfig):
            return Context(self, config, config.strategy)
        return super().create_execution_context(config)


class Context:
    """IExecutionContext: shapes and addresses stay as they were last set."""

    def __init__(self, engine: Engine, config: RuntimeConfig, strategy: Strategy) -> None:
        self.engine, self.gpu, self.config, self.strategy = engine, engine.gpu, config, strategy
        self.shapes: Shapes = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.profiler: Any = None
        self.settled: Shapes | None = None
        self.changes = 0
        self.gpu.contexts.add(self)
        self.gpu.contexts_made += 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self.engine.get_tensor_shape(name)
        if len(shape) != len(declared) or any(d not in (-1, s) for d, s in zip(declared, shape, strict=True)):
            return False
        self.changes += self.shapes.get(name) != shape
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        self.addresses[name] = address
        return name in self.engine.tensors and address % 256 == 0

    def set_device_memory(self, memory: int, size: int) -> None:
        if self.strategy != Strategy.USER_MANAGED or size < self.engine.device_memory_size_v2 or memory % 256:
            raise ValueError(f"device memory of {size} bytes at {memory:#x} is not for this context")
        self.scratch = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = next(s for s in self.gpu.streams if s.handle == stream_handle)
        if reason := self._refusal(stream):
            self.engine.logger.log(1, f"cannot execute: {reason}")
            return False
        self._compile()
        stream.put(Op("execute", Execution(self), self._accesses()))
        if stream.capturing is None:
            self.settled = dict(self.shapes)
            if self.profiler is not None:  # an enqueue that emits its profile waits for it
                stream.sync()
                for layer, ms in LAYERS.items():
                    self.profiler.report_layer_time(layer, ms)
        return True

    def _refusal(self, stream: Stream) -> str:
        missing = [n for n in self.engine.inputs if n not in self.shapes]
        missing += [n for n in self.engine.tensors if n not in self.addresses]
        apart = [n for n, a in self.addresses.items() if n.startswith("past.") and a != self._present(n)]
        if missing or apart:
            return f"missing {missing}, past and present apart {apart}"
        if self.strategy == Strategy.USER_MANAGED and self.scratch is None:
            return "no device memory"
        if self.gpu.fail_execution:
            return "told to fail"
        if stream.capturing is not None and (self.gpu.fail_capture or not self._may_be_captured()):
            return "it cannot be captured"
        return ""

    def _may_be_captured(self) -> bool:
        """Once these shapes have been executed, and that is over."""
        return self.engine.may_be_captured and self.settled == self.shapes

    def _present(self, past: str) -> int:
        return self.addresses["present" + past[4:]]

    def _accesses(self) -> tuple[Access, ...]:
        sizes, found = self.engine.sizes(self.shapes), []
        for name, tensor in self.engine.tensors.items():
            shape = [d if isinstance(d, int) else sizes[d] for d in tensor.shape]
            begin = self.addresses[name]
            size = int(np.prod(shape)) * self.engine.dtype(name).itemsize
            found.append(Access(begin, begin + size, name not in self.engine.inputs))
        if self.scratch is not None:
            found.append(Access(self.scratch[0], sum(self.scratch), True))
        return tuple(found)

    def _compile(self) -> None:
        """What TensorRT-RTX does when shapes are new."""
        if (cache := self.config.cache) is not None:
            shapes = sorted((n, s) for n, s in self.shapes.items() if not n.startswith("past."))
            kernel = f"{self.engine.path.stem} {shapes}"
            self.gpu.compiled += kernel not in cache.kernels
            cache.kernels.add(kernel)


class Execution:
    """The work of one execution, with the shapes and addresses of when it was put on a stream."""

    def __init__(self, context: Context) -> None:
        self.engine, self.gpu = context.engine, context.gpu
        self.shapes, self.addresses = dict(context.shapes), dict(context.addresses)
        self._context: Callable[[], Context | None] = weakref.ref(context)
        self._changes = context.changes

    def check(self) -> None:
        """Before a graph that holds this is launched."""
        context = self._context()
        if context is None or context.changes != self._changes:
            raise Misuse("a graph is launched whose execution context is gone or was used otherwise since")

    def __call__(self) -> None:
        feeds = {}
        for name, shape in self.shapes.items():
            dtype = self.engine.dtype(name)
            content = self.gpu.read(self.addresses[name], int(np.prod(shape)) * dtype.itemsize)
            array = content.view(dtype).reshape(shape)
            feeds[name] = array.astype(np.float32) if dtype == ml_dtypes.bfloat16 else array
        names = [n for n in self.engine.tensors if n not in self.engine.inputs]
        for name, array in zip(names, self.engine.session.run(names, feeds), strict=True):
            typed = array.astype(self.engine.dtype(name), copy=False)
            self.gpu.write(self.addresses[name], np.ascontiguousarray(typed).reshape(-1).view(np.uint8))
