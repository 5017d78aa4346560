"""Memory of a TensorRT session: allocated once, when the engine is loaded, then lent out and given back.

Slab    one allocation with a place for each of several names
Pool    pieces of equal size for tensors that outlive a run; each comes back when its tensor goes
Slot    what one request occupies: places of all inputs and outputs, the KV cache, a stream for its copies, events
"""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.sessions.cuda_device import CudaDevice, host_bytes
from engines.sessions.session import Array, DeviceTensor, Feed, bytes_of, feeds_of, results_of, state_pairs
from flowcut.contract import GraphContract, TensorSpec, itemsize
from flowcut.errors import EngineError

_ALIGNMENT = 256  # bytes; what TensorRT's kernels may count on


def bytes_for(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    """Of a tensor whose named dimensions have these sizes."""
    return math.prod(spec.shape(sizes)) * itemsize(spec.dtype)


def greatest(contract: GraphContract) -> dict[str, int]:
    """The named dimensions at their largest."""
    return {name: allowed.max for name, allowed in contract.ranges.items()}


class Slab:
    """Memory with a place for each name, on the device or, `pinned`, on the host.

    Args:
        sizes: bytes of each.
    """

    def __init__(self, device: CudaDevice, sizes: Mapping[str, int], pinned: bool = False) -> None:
        ends = list(itertools.accumulate(map(_aligned, sizes.values()), initial=0))
        self._device, self.bytes = device, ends[-1]
        self._at = dict(zip(sizes, ends, strict=False))
        self.buffer = (device.pinned if pinned else device.allocate)(self.bytes) if self.bytes else None
        self._view = host_bytes(self.buffer) if pinned and self.bytes else None

    def address(self, name: str) -> int:
        """Where the place of a name begins."""
        return int(self.buffer.handle) + self._at[name] if self.buffer is not None else 0

    def part(self, name: str, size_bytes: int, offset: int = 0) -> Any:
        """Bytes of a place, for a copy."""
        return self._device.part(self.buffer, self._at[name] + offset, size_bytes)

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The beginning of a place of pinned memory, as an array that shares it."""
        if self._view is None:
            raise RuntimeError(f"{name} is not in pinned memory")
        begin = self._at[name]
        return self._view[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


@dataclass(frozen=True, eq=False)
class TrtTensor:
    """A tensor on the device, complete and never changed: whoever made it has waited for that.

    rows: what its rows are lent from; None where nobody is expected to split it.
    """

    device: CudaDevice
    buffer: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: Pool | None = None

    def numpy(self) -> Array:
        """See DeviceTensor. Takes pinned memory for itself: not for the path of a request."""
        self.device.set_current()
        staging = self.device.pinned(self.buffer.size)
        with self.device.errors("copying a tensor to the host"):
            staging.copy_from(self.buffer, stream=self.device.side)
            self.device.side.sync()
        array: Array = host_bytes(staging)[: bytes_of(self)].view(self.dtype).reshape(self.shape).copy()
        return array

    def split(self) -> list[DeviceTensor]:
        """See DeviceTensor."""
        if self.rows is None:
            return [placed(self.device, row[None]) for row in self.numpy()]
        self.device.set_current()
        size = bytes_of(self) // self.shape[0]
        rows = [self.rows.lend((1, *self.shape[1:]), self.dtype) for _ in range(self.shape[0])]
        with self.device.errors("copying a tensor's rows"):
            for i, row in enumerate(rows):
                row.buffer.copy_from(self.device.part(self.buffer, i * size, size), stream=self.device.side)
            self.device.side.sync()
        return list(rows)


class Pool:
    """`count` pieces of `size_bytes`, lent as tensors.

    Args:
        what: they are, and `remedy`: what to do when there are too few, for the error.
        rows: see TrtTensor.
    """

    def __init__(
        self, device: CudaDevice, size_bytes: int, count: int, what: str, remedy: str, rows: Pool | None = None
    ) -> None:
        self._device, self._what, self._remedy, self.rows = device, what, remedy, rows
        step = _aligned(size_bytes)
        self.count, self.bytes = count, step * count
        self._buffer = device.allocate(self.bytes) if self.bytes else None
        self._free = deque(i * step for i in range(count))

    def lend(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> TrtTensor:
        """A tensor whose memory nobody else has until it goes. The one given back last comes first.

        Raises:
            EngineError: all are taken.
        """
        if not self._free:
            gc.collect()  # an error that somebody looks at may hold tensors in a cycle
        try:
            offset = self._free.pop()
        except IndexError:
            raise EngineError(
                f"{self._what} on the GPU must be at most {self.count} at once, got one more. {self._remedy}"
            ) from None
        part = self._device.part(self._buffer, offset, math.prod(shape) * dtype.itemsize)
        tensor = TrtTensor(self._device, part, shape, dtype, self.rows)
        # Called wherever the garbage collector runs, hence without a lock.
        weakref.finalize(tensor, self._free.append, offset).atexit = False
        return tensor


class Slot:
    """What one request occupies of a session.

    Addresses never change: an execution context is told them once, and a CUDA graph may hold them.

    Attributes:
        copies: the stream for what goes in and out. `ready` is recorded on it once all inputs are there.
        start, end: around the execution, timed.
    """

    def __init__(self, device: CudaDevice, contract: GraphContract) -> None:
        most = greatest(contract)
        staged = {s.name: bytes_for(s, most) for s in (*feeds_of(contract), *results_of(contract))}
        self._device, self._pairs = device, state_pairs(contract)
        self.memory, self.staging = Slab(device, staged), Slab(device, staged, pinned=True)
        self.cache = Slab(device, {spec.name: bytes_for(spec, most) for spec, _ in self._pairs})
        self.copies, self.ready = device.stream(), device.event()
        self.start, self.end = device.event(timed=True), device.event(timed=True)
        self._holds: dict[str, weakref.ref[DeviceTensor]] = {}
        self.addresses = {name: self.memory.address(name) for name in staged}
        for spec, present in self._pairs:  # the same memory: the engine updates it in place
            self.addresses |= dict.fromkeys((spec.name, present), self.cache.address(spec.name))

    def clear(self, batch: int) -> None:
        """Zero the cache of `batch` sequences: a masked NaN of an earlier request would spoil attention."""
        with self._device.errors("clearing the KV cache"):
            for spec, _ in self._pairs:
                self.cache.part(spec.name, bytes_for(spec, {"batch": batch})).fill(0, stream=self.copies)

    def put(self, name: str, value: Feed) -> None:
        """Start copying an input into its place."""
        held = self._holds.pop(name, None)
        if isinstance(value, np.ndarray):
            self.staging.array(name, value.shape, value.dtype)[...] = value
            self.memory.part(name, value.nbytes).copy_from(self.staging.part(name, value.nbytes), stream=self.copies)
        elif isinstance(value, Sequence):
            self._join(name, value)
        else:
            if held is None or held() is not value:  # decoding feeds the same blank picture again and again
                self._join(name, [value])
            self._holds[name] = weakref.ref(value)

    def fetch(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
        """Start copying an output to the host; the array, in pinned memory, holds it once `copies` is done."""
        size = bytes_for(spec, sizes)
        self.staging.part(spec.name, size).copy_from(self.memory.part(spec.name, size), stream=self.copies)
        return self.staging.array(spec.name, spec.shape(sizes), np.dtype(spec.dtype))

    def keep(self, spec: TensorSpec, sizes: Mapping[str, int], pool: Pool | None) -> TrtTensor:
        """Start copying an output to memory of its own: the next run of this slot writes to the same place.

        Args:
            pool: None where nothing was set aside, so that memory is allocated now.
        """
        shape, dtype = spec.shape(sizes), np.dtype(spec.dtype)
        if pool is None:
            tensor = TrtTensor(self._device, self._device.allocate(bytes_for(spec, sizes)), shape, dtype)
        else:
            tensor = pool.lend(shape, dtype)
        tensor.buffer.copy_from(self.memory.part(spec.name, tensor.buffer.size), stream=self.copies)
        return tensor

    def _join(self, name: str, tensors: Sequence[DeviceTensor]) -> None:
        offset = 0
        for each in tensors:
            if not isinstance(each, TrtTensor):
                raise EngineError(f"{name} must be arrays or tensors of this backend, got {type(each).__name__}.")
            size = bytes_of(each)
            source = self._device.part(each.buffer, 0, size)
            self.memory.part(name, size, offset).copy_from(source, stream=self.copies)
            offset += size


def placed(device: CudaDevice, array: Array) -> TrtTensor:
    """A copy of an array in memory allocated for it."""
    device.set_current()
    source = np.ascontiguousarray(array)
    buffer, staging = device.allocate(source.nbytes), device.pinned(source.nbytes)
    host_bytes(staging)[:] = source.reshape(-1).view(np.uint8)
    with device.errors("copying an array to the device"):
        buffer.copy_from(staging, stream=device.side)
        device.side.sync()
    return TrtTensor(device, buffer, source.shape, source.dtype)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
