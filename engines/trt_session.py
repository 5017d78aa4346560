"""A session on TensorRT or TensorRT-RTX: one implementation, the module is a parameter.

Written against the documented API of TensorRT and of cuda.core, and tested with a stand-in for both; it has not been
run on a GPU yet.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends import trt_module
from engines.cuda_device import REMEDY, CudaDevice, host_view
from engines.listeners import BuildLog, make_logger
from engines.profiles import NUMPY_NAMES, check_tensors
from engines.session import (
    Array,
    DeviceTensor,
    Feed,
    LayerTime,
    Result,
    State,
    bytes_of,
    feeds_of,
    results_of,
    shape_of,
    sizes_of,
    state_pairs,
)
from flowcut.contract import GraphContract, TensorSpec, itemsize
from flowcut.errors import EngineError

LOG = logging.getLogger("flowcut.tensorrt")


@dataclass(frozen=True)
class TrtTensor:
    """An output in a buffer of its own on the device."""

    device: CudaDevice
    buffer: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def numpy(self) -> Array:
        with self.device.lock:
            self.device.set_current()
            staging = self.device.pinned(self.buffer.size)
            staging.copy_from(self.buffer, stream=self.device.stream)
            self.device.stream.sync()
        return host_view(staging, self.shape, self.dtype).copy()

    def split(self) -> list[DeviceTensor]:
        """See DeviceTensor."""
        if self.shape[0] == 1:
            return [self]
        return [_placed(self.device, row[None]) for row in self.numpy()]


class TrtState:
    """Cache buffers by the name of the input. They are of the greatest batch and serve any."""

    def __init__(self, batch: int, buffers: dict[str, Any]) -> None:
        self.batch = batch
        self.buffers = buffers


class TrtSession:
    """A serialized engine on `device`.

    All memory but the cache and kept outputs is allocated here, for the greatest shapes of the contract; caches are
    allocated when there are not enough of them and used again. Calls from several threads run one after another.

    Raises:
        EngineError: an engine that this library or this GPU refuses, or that is not the contract's graph.
    """

    def __init__(self, path: Path, contract: GraphContract, backend: str, device: CudaDevice) -> None:
        self.contract, self.device = contract, device
        self._trt = trt_module(backend)
        self._log = BuildLog()
        self._logger = make_logger(self._trt, self._log, lambda _, *record: LOG.log(*record), LOG.getEffectiveLevel())
        device.set_current()
        self._runtime = self._trt.Runtime(self._logger)
        plan = np.memmap(path, dtype=np.uint8, mode="r")
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context: Any = self._engine.create_execution_context() if self._engine is not None else None
        if self._context is None:
            raise EngineError(
                f"{path} could not be loaded by {self._trt.__name__}: {self._log.reasons()}. {REMEDY}. Or build it "
                "again with the installed version, for this GPU."
            )
        self._check_tensors()
        greatest = {name: r.max for name, r in contract.ranges.items()}
        self._cache_bytes = {spec.name: _bytes(spec, greatest) for spec, _ in state_pairs(contract)}
        staged = feeds_of(contract) + results_of(contract)
        self._buffers = {s.name: device.allocate(_bytes(s, greatest)) for s in staged}
        self._staging = {s.name: device.pinned(_bytes(s, greatest)) for s in staged}
        self._free_caches: list[dict[str, Any]] = []
        self._bound: tuple[dict[str, Any], int] | None = None

    def allocate_state(self, batch: int) -> TrtState:
        """See Session."""
        with self.device.lock:
            self.device.set_current()
            buffers = self._free_caches.pop() if self._free_caches else None
            if buffers is None:
                buffers = {name: self.device.allocate(size) for name, size in self._cache_bytes.items()}
            for buffer in buffers.values():
                buffer.fill(0, stream=self.device.stream)  # a masked NaN of an earlier request would spoil attention
        state = TrtState(batch, buffers)
        weakref.finalize(state, self._free_caches.append, buffers)
        return state

    def place(self, array: Array) -> TrtTensor:
        """See Session."""
        return _placed(self.device, array)

    def layer_times(self) -> list[LayerTime]:
        """See Session."""
        return []

    def memory_bytes(self) -> Mapping[str, int]:
        """See Session."""
        return {}

    def run(self, feeds: Mapping[str, Feed], state: State | None = None, keep: Collection[str] = ()) -> Result:
        """See Session. device_ms is between CUDA events around the execution."""
        sizes = sizes_of(self.contract, feeds, state)
        with self.device.lock:
            self.device.set_current()
            if isinstance(state, TrtState):
                self._bind_state(state)
            for name, value in feeds.items():
                self._bind_input(name, value)
            kept: dict[str, DeviceTensor] = {}
            on_host = []
            for spec in results_of(self.contract):
                if spec.name in keep:
                    kept[spec.name] = self._bind_kept(spec, sizes)
                else:
                    self._bind(spec.name, self._buffers[spec.name])
                    on_host.append(spec)
            start = self.device.mark()
            self._check(self._context.execute_async_v3(int(self.device.stream.handle)), "execute")
            end = self.device.mark()
            views = {spec.name: self._copy_back(spec, sizes) for spec in on_host}
            self.device.stream.sync()
            return Result({name: view.copy() for name, view in views.items()}, kept, end - start)

    def _check_tensors(self) -> None:
        output = self._trt.TensorIOMode.OUTPUT
        for what, specs, wanted in (("inputs", self.contract.inputs, False), ("outputs", self.contract.outputs, True)):
            found = [s for s in self._specs() if (self._engine.get_tensor_mode(s.name) == output) == wanted]
            check_tensors(f"{self.contract.name} {what}", specs, found)
        self._check_aliases()

    def _check_aliases(self) -> None:
        """Both are bound to the same memory, which is only right where the engine says that it updates in place."""
        for past, present in state_pairs(self.contract):
            if (got := self._engine.get_aliased_input_tensor(present)) != past.name:
                raise EngineError(
                    f"{self.contract.name} output {present} must be updated in place of {past.name}, got {got!r}. "
                    "Build the engine again with the installed version."
                )

    def _specs(self) -> Iterator[TensorSpec]:
        for name in (self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)):
            dtype = self._engine.get_tensor_dtype(name).name
            yield TensorSpec(name, NUMPY_NAMES.get(dtype, dtype), tuple(self._engine.get_tensor_shape(name)))

    def _bind(self, name: str, buffer: Any) -> None:
        self._check(self._context.set_tensor_address(name, int(buffer.handle)), f"take the address of {name}")

    def _bind_input(self, name: str, value: Feed) -> None:
        shape = shape_of(value)
        self._check(self._context.set_input_shape(name, tuple(shape)), f"take {name} of shape {shape}")
        if isinstance(value, Sequence):
            start = int(self._buffers[name].handle)
            for each in value:
                assert isinstance(each, TrtTensor)
                target = self.device.cuda.Buffer.from_handle(start, bytes_of(each), owner=self._buffers[name])
                target.copy_from(self.device.part(each.buffer, bytes_of(each)), stream=self.device.stream)
                start += bytes_of(each)
            self._bind(name, self._buffers[name])
            return
        if isinstance(value, TrtTensor):
            self._bind(name, value.buffer)
            return
        array = np.ascontiguousarray(value)
        host_view(self._staging[name], array.shape, array.dtype)[...] = array
        target, source = (self.device.part(b[name], array.nbytes) for b in (self._buffers, self._staging))
        target.copy_from(source, stream=self.device.stream)
        self._bind(name, target)

    def _bind_state(self, state: TrtState) -> None:
        """Inputs and outputs of the cache to the same memory; only where they are not already."""
        if self._bound is not None and self._bound[0] is state.buffers and self._bound[1] == state.batch:
            return
        for spec, present in state_pairs(self.contract):
            shape = spec.shape({"batch": state.batch})
            self._check(self._context.set_input_shape(spec.name, shape), f"take {spec.name} of shape {shape}")
            self._bind(spec.name, state.buffers[spec.name])
            self._bind(present, state.buffers[spec.name])
        self._bound = (state.buffers, state.batch)

    def _bind_kept(self, spec: TensorSpec, sizes: Mapping[str, int]) -> TrtTensor:
        """In memory of its own: the next request's vision may run before this one's prefill has read it."""
        buffer = self.device.allocate(_bytes(spec, sizes))
        self._bind(spec.name, buffer)
        return TrtTensor(self.device, buffer, spec.shape(sizes), np.dtype(spec.dtype))

    def _copy_back(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
        """Enqueue the copy of an output; the view holds it once the stream is synchronised."""
        target, source = (self.device.part(b[spec.name], _bytes(spec, sizes)) for b in (self._staging, self._buffers))
        target.copy_from(source, stream=self.device.stream)
        return host_view(self._staging[spec.name], spec.shape(sizes), np.dtype(spec.dtype))

    def _check(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise EngineError(f"{self.contract.name}: {self._trt.__name__} did not {what}: {self._log.reasons()}.")


def _bytes(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    return math.prod(spec.shape(sizes)) * itemsize(spec.dtype)


def _placed(device: CudaDevice, array: Array) -> TrtTensor:
    with device.lock:
        device.set_current()
        buffer, staging = device.allocate(array.nbytes), device.pinned(array.nbytes)
        host_view(staging, array.shape, array.dtype)[...] = array
        buffer.copy_from(staging, stream=device.stream)
        device.stream.sync()
    return TrtTensor(device, buffer, array.shape, array.dtype)
