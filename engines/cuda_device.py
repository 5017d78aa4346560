"""The GPU as the TensorRT sessions use it: one device, one stream, buffers and events, through cuda.core."""

from __future__ import annotations

import importlib
import logging
import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


class CudaDevice:
    """The first GPU and one stream on it, shared by the sessions of an engine so that their work stays in order.

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
        self.stream = self._device.create_stream()
        self._pinned = self.cuda.LegacyPinnedMemoryResource()

    def set_current(self) -> None:
        """CUDA's current device belongs to a thread: call this in each before anything else."""
        self._device.set_current()

    def allocate(self, size_bytes: int) -> Any:
        """Memory on the device.

        Raises:
            EngineError: the device is full.
        """
        try:
            return self._device.allocate(size_bytes, stream=self.stream)
        except Exception as error:
            raise EngineError(
                f"the GPU must have {size_bytes} bytes free, got: {' '.join(str(error).split())}. Free its memory, or "
                "rebuild the engine with smaller --max-batch, --max-images or --max-prompt."
            ) from error

    def pinned(self, size_bytes: int) -> Any:
        """Memory on the host that the device can copy from and to."""
        return self._pinned.allocate(size_bytes)

    def part(self, buffer: Any, size_bytes: int) -> Any:
        """The first bytes of a buffer: copies take buffers of equal size."""
        return self.cuda.Buffer.from_handle(int(buffer.handle), size_bytes, owner=buffer)

    def mark(self) -> Any:
        """An event after everything that was put on the stream; the difference of two is milliseconds."""
        return self.stream.record(options=self.cuda.EventOptions(timing_enabled=True))


def host_view(buffer: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The first bytes of pinned memory as an array that shares them. Before numpy 2.1 it could not be written to."""
    array: NDArray[Any] = np.from_dlpack(buffer).view(np.uint8)[: math.prod(shape) * dtype.itemsize]
    return array.view(dtype).reshape(shape)
