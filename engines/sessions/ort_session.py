"""A session on ONNX Runtime: its CUDA provider where that is installed and a GPU is present, else the CPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.options import Options
from engines.profiles import check_tensors
from engines.sessions.ort_loading import CUDA, on_cuda, one_line, open_graph, open_shared, session_options, weight_files
from engines.sessions.ort_profile import Profile, layer_times
from engines.sessions.session import (
    Array,
    DeviceTensor,
    Feed,
    LayerTime,
    Result,
    State,
    results_of,
    sizes_of,
    state_pairs,
)
from flowcut.contract import GraphContract, TensorSpec
from flowcut.deps import require
from flowcut.errors import EngineError

LOG = logging.getLogger("flowcut.onnxruntime")
_BFLOAT16 = 16  # ONNX's number for it
DEFAULT = Options()
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # others are called as numpy does


@dataclass(frozen=True)
class OrtTensor:
    """An OrtValue, in the memory of the session's execution provider."""

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: str

    def numpy(self) -> Array:
        array: Array = self.value.numpy()
        return array

    def split(self) -> list[DeviceTensor]:
        """See DeviceTensor."""
        if self.shape[0] == 1:
            return [self]
        return [placed(row[None], self.device) for row in self.numpy()]


@dataclass(frozen=True)
class OrtState:
    """A binding in which every cache input and its output are one OrtValue, so that TensorScatter does not copy.

    caches: these OrtValues, which own the memory: before ONNX Runtime 1.30 a binding holds nothing but its address.
    """

    batch: int
    binding: Any
    caches: tuple[Any, ...]


class OrtSession:
    """A graph on ONNX Runtime: its CUDA provider where that is installed and a GPU is present, else the CPU.

    Sessions of one file and the same options share what ONNX Runtime holds of it (see ort_loading.py); one with
    Options.profile is its own.

    options: its threads, spin, exact and profile. The CPU provider rounds what it multiplies int8 and int4 weights by
        to int8 as well unless exact: ten times float16's errors, but decoding is 8 times as fast in int4 and 50 times
        in int8.

    Raises:
        FlowCutError: onnxruntime is not installed.
        EngineError: a file that does not load, or that is not the contract's graph.
    """

    def __init__(self, path: Path, contract: GraphContract, options: Options = DEFAULT) -> None:
        self.contract = contract
        self._ort = require("onnxruntime", extra="cpu")
        self._weight_bytes = sum(file.stat().st_size for file in weight_files(path))
        self._profile: Profile | None = None
        self._zeros: dict[tuple[Any, ...], Any] = {}
        cuda = on_cuda()
        if options.profile:
            chosen = session_options(options)
            self._profile = Profile(chosen)
            self._session = open_graph(path, chosen, cuda)
        else:
            self._session = open_shared(path, options, cuda)
        self.device = "cuda" if CUDA in self._session.get_providers() else "cpu"
        if cuda and self.device == "cpu":
            LOG.warning("%s: CUDA does not start here, so ONNX Runtime uses the CPU.", contract.name)
        check_tensors(f"{contract.name} inputs", contract.inputs, _specs(self._session.get_inputs()))
        check_tensors(f"{contract.name} outputs", contract.outputs, _specs(self._session.get_outputs()))

    def allocate_state(self, batch: int) -> OrtState:
        """See Session. Fresh memory each time, so that nothing of an earlier request can remain in it. On the CPU the
        zeros come from the operating system page by page as rows are used, which costs less than clearing a used
        cache. On CUDA they are copied from zeros of one layer that are there already."""
        binding, caches = self._session.io_binding(), []
        for spec, present in state_pairs(self.contract):
            shape, narrow = spec.shape({"batch": batch}), spec.dtype == "bfloat16"
            cache = self._zeroed(shape, np.dtype(np.uint16 if narrow else spec.dtype))
            if narrow:  # which numpy has not: the same bits by their address
                at = (self.device, 0, _BFLOAT16, shape, cache.data_ptr())
                binding.bind_input(spec.name, *at)
                binding.bind_output(present, *at)
            else:
                binding.bind_ortvalue_input(spec.name, cache)
                binding.bind_ortvalue_output(present, cache)
            caches.append(cache)
        return OrtState(batch, binding, tuple(caches))

    def _zeroed(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """An OrtValue of zeros in memory of its own."""
        make = self._ort.OrtValue
        if self.device == "cpu":
            return make.ortvalue_from_numpy(np.zeros(shape, dtype), "cpu")
        if (zeros := self._zeros.get((shape, dtype))) is None:
            zeros = self._zeros[shape, dtype] = make.ortvalue_from_numpy(np.zeros(shape, dtype), self.device)
        cache = make.ortvalue_from_shape_and_type(shape, dtype.type, self.device)
        cache.update_inplace(zeros)
        return cache

    def place(self, array: Array) -> OrtTensor:
        """See Session."""
        return placed(array, self.device)

    def forget_times(self) -> None:
        """See Session."""
        if self._profile is not None:
            self._profile.forget()

    def layer_times(self) -> list[LayerTime]:
        """See Session. Not while another thread is in `run`."""
        if self._profile is None:
            return []
        return layer_times(self.contract.name, self._profile.end(self._session))

    def memory_bytes(self) -> Mapping[str, int]:
        """See Session. What weights take once they are packed, and its working memory, ONNX Runtime does not tell: see
        what the process takes, engines.runtime.memory."""
        zeros = sum(value.tensor_size_in_bytes() for value in self._zeros.values())
        return {"weights": self._weight_bytes, **({"zeros": zeros} if zeros else {})}

    def close(self) -> None:
        """See Session. ONNX Runtime frees its memory with the last reference to it."""

    def run(self, feeds: Mapping[str, Feed], state: State | None = None, keep: Collection[str] = ()) -> Result:
        """See Session."""
        sizes = sizes_of(self.contract, feeds, state)
        binding = state.binding if isinstance(state, OrtState) else self._session.io_binding()
        for name, value in feeds.items():
            tensor = _joined(value, self.device) if isinstance(value, Sequence) else value
            if isinstance(tensor, OrtTensor):
                binding.bind_ortvalue_input(name, tensor.value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(tensor))
        arrays: dict[str, Array] = {}
        kept: dict[str, DeviceTensor] = {}
        for spec in results_of(self.contract):
            if spec.name in keep:
                kept[spec.name] = self._bind_kept(binding, spec, sizes)
            else:
                arrays[spec.name] = _bind_array(binding, spec, sizes)
        return Result(arrays, kept, self._run(binding))

    def _run(self, binding: Any) -> float:
        start = time.perf_counter()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"{self.contract.name} failed in ONNX Runtime: {one_line(error)}") from error
        finally:
            if self._profile is not None:
                self._profile.count()
        return (time.perf_counter() - start) * 1e3

    def _bind_kept(self, binding: Any, spec: TensorSpec, sizes: Mapping[str, int]) -> OrtTensor:
        shape, dtype = spec.shape(sizes), np.dtype(spec.dtype)
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, self.device)
        binding.bind_ortvalue_output(spec.name, value)
        return OrtTensor(value, shape, dtype, self.device)


def placed(array: Array, device: str) -> OrtTensor:
    """A copy of an array on a device of ONNX Runtime's."""
    return _wrapped(np.array(array, order="C") if device == "cpu" else np.ascontiguousarray(array), device)


def _wrapped(array: Array, device: str) -> OrtTensor:
    """On the CPU in the array's own memory, which the OrtValue keeps alive."""
    value = require("onnxruntime", extra="cpu").OrtValue.ortvalue_from_numpy(array, device)
    return OrtTensor(value, array.shape, array.dtype, device)


def _joined(tensors: Sequence[DeviceTensor], device: str) -> DeviceTensor:
    """On CUDA by way of the host: ONNX Runtime has no call that copies within the device."""
    return tensors[0] if len(tensors) == 1 else _wrapped(np.concatenate([each.numpy() for each in tensors]), device)


def _bind_array(binding: Any, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """An array of our own for an output: one that ONNX Runtime allocates would be overwritten by the next run."""
    array = np.empty(spec.shape(sizes), spec.dtype)
    binding.bind_output(spec.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    return array


def _specs(tensors: Any) -> Iterator[TensorSpec]:
    for t in tensors:
        dtype = _DTYPES.get(t.type) or t.type.removeprefix("tensor(").removesuffix(")")
        yield TensorSpec(t.name, dtype, tuple(d if isinstance(d, int) else -1 for d in t.shape))
