"""The GPU as the TensorRT sessions use it: one device, streams, memory and events, through cuda.core.

All that is computed goes through one stream, `compute`, in the order of `lock`. Whoever copies has a stream of its own
and orders the two with events, so that one request's copies run beside another's execution. Nobody waits for `compute`
itself: whoever holds the lock may be capturing a graph on it, which that would break.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.listeners import BuildLog, make_logger
from flowcut.errors import EngineError, FlowCutError

LOG = logging.getLogger("flowcut.tensorrt")
REMEDY = "The same directory runs on ONNX Runtime: --backend ort (load_engine(dir, backend='ort'))"


def no_gpu(backend: str) -> EngineError:
    """What to say where a GPU is needed and there is none."""
    return EngineError(f"backend {backend} runs on a GPU, and no CUDA GPU is present. {REMEDY}.")


def cuda_core(backend: str) -> Any:
    """The module cuda.core.

    Raises:
        FlowCutError: not installed; `cuda` is a namespace of several packages, so parts of it may well be.
    """
    try:
        return importlib.import_module("cuda.core")
    except ImportError as error:
        raise FlowCutError(
            f"cuda.core cannot be imported ({error}). In the checkout: pip install -e '.[{backend}]'"
        ) from None


@lru_cache(maxsize=2)  # there are two libraries
def _logger(trt: ModuleType) -> tuple[Any, BuildLog]:
    """One for the process: a library warns of every logger but the first that it was given."""
    log = BuildLog()
    return make_logger(trt, log, lambda _, *record: LOG.log(*record), logging.DEBUG), log


class CudaDevice:
    """The first GPU, shared by the sessions of an engine.

    Attributes:
        compute: the stream of everything that computes. The contexts of a session share their scratch memory on the
            strength of its order.
        side: for copies that belong to no run: constants, rows, tensors that somebody looks at.
        lock: held while work is put on `compute`, and by nobody who waits for a copy. What the library does in that
            call takes as long as it takes: TensorRT-RTX compiles there, a CUDA graph is made there, and with a
            profiler the execution itself is waited for.

    Raises:
        FlowCutError: cuda-core is not installed.
        EngineError: no GPU, or a driver that does not start.
    """

    def __init__(self, backend: str) -> None:
        self.cuda = cuda_core(backend)
        self.lock = threading.Lock()
        try:
            self._device = self.cuda.Device(0)
            self._device.set_current()
        except Exception as error:  # of the driver's loader or of CUDA, by what is missing
            LOG.debug("cuda.core: %s", error)
            raise no_gpu(backend) from error
        self._runtimes: dict[ModuleType, Any] = {}
        self.compute, self.side = self.stream(), self.stream()
        self._pinned = self.cuda.LegacyPinnedMemoryResource()

    @property
    def capability(self) -> str:
        """The compute capability as TensorRT names it: "sm90"."""
        return f"sm{self._device.arch}"

    def runtime(self, trt: ModuleType) -> tuple[Any, BuildLog]:
        """The library's IRuntime, one for all engines on this device, and what it says."""
        logger, log = _logger(trt)
        if trt not in self._runtimes:
            self._runtimes[trt] = trt.Runtime(logger)
        return self._runtimes[trt], log

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Around calls of cuda.core: what they raise becomes an EngineError about `what`."""
        try:
            yield
        except Exception as error:
            if not type(error).__module__.startswith("cuda."):
                raise
            raise EngineError(f"{what} failed on the GPU: {' '.join(str(error).split())}.") from error

    def set_current(self) -> None:
        """CUDA's current device belongs to a thread: call this in each before anything else."""
        with self.errors("making the device current"):
            self._device.set_current()

    def stream(self) -> Any:
        """A new one, which waits for no other unless told to."""
        with self.errors("making a stream"):
            return self._device.create_stream()

    def event(self, timed: bool = False) -> Any:
        """One that may be recorded again and again; the difference of two timed ones is milliseconds."""
        with self.errors("making an event"):
            return self._device.create_event(self.cuda.EventOptions(timing_enabled=timed))

    def allocate(self, size_bytes: int) -> Any:
        """Memory on the device, for any stream. Waits for what is on `compute`: for the time of loading only.

        Raises:
            EngineError: the device is full.
        """
        try:
            with self.lock:
                buffer = self._device.allocate(size_bytes, stream=self.compute)
                there = self.compute.record()
            self.side.wait(there)
            self.side.sync()
        except Exception as error:
            raise EngineError(
                f"the GPU must have {size_bytes} bytes free, got: {' '.join(str(error).split())}. Free its memory, "
                "load the engine with smaller concurrency or picture_cache_mb, or rebuild it with smaller --max-batch, "
                "--max-images or --max-prompt."
            ) from error
        return buffer

    def pinned(self, size_bytes: int) -> Any:
        """Memory on the host that the device can copy from and to while the host goes on."""
        with self.errors(f"pinning {size_bytes} bytes of the host's memory"):
            return self._pinned.allocate(size_bytes)

    def part(self, buffer: Any, offset: int, size_bytes: int) -> Any:
        """Some bytes of a buffer, which stays alive with them: copies take buffers of equal size."""
        return self.cuda.Buffer.from_handle(int(buffer.handle) + offset, size_bytes, owner=buffer)


def host_bytes(buffer: Any) -> NDArray[np.uint8]:
    """Pinned memory as an array that shares it. Before numpy 2.1 it could not be written to."""
    return np.from_dlpack(buffer).view(np.uint8)
