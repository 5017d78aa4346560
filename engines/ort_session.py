"""A session on ONNX Runtime: its CUDA provider where that is installed and a GPU is present, else the CPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends import gpu_present
from engines.options import Options
from engines.profiles import check_tensors
from engines.session import Array, DeviceTensor, Feed, LayerTime, Result, State, results_of, sizes_of, state_pairs
from flowcut.contract import GraphContract, TensorSpec
from flowcut.deps import require
from flowcut.errors import EngineError

LOG = logging.getLogger("flowcut.onnxruntime")

# TF32, its default, rounds float32 products to 10 bits, and near-equal flow scores would rank differently.
CUDA_PROVIDER = ("CUDAExecutionProvider", {"use_tf32": 0})
EXACT = ("session.qdq_matmulnbits_accuracy_level", "1")
"""ONNX Runtime's setting by which inputs of int8 and int4 layers stay float32. By default, 4, they become int8."""
_BFLOAT16 = 16  # ONNX's number for it
DEFAULT = Options()
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # others are called as numpy does


def on_cuda() -> bool:
    """Whether ONNX Runtime's CUDA provider is installed and a GPU is present.

    Raises:
        FlowCutError: onnxruntime is not installed.
    """
    providers = require("onnxruntime", extra="cpu").get_available_providers()
    return "CUDAExecutionProvider" in providers and gpu_present()


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

    options: its threads and exact. The CPU provider rounds what it multiplies int8 and int4 weights by to int8 as well
        unless exact: ten times float16's errors, but decoding is 8 times as fast in int4 and 50 times in int8.

    Raises:
        FlowCutError: onnxruntime is not installed.
        EngineError: a file that does not load, or that is not the contract's graph.
    """

    def __init__(self, path: Path, contract: GraphContract, options: Options = DEFAULT) -> None:
        self.contract = contract
        self._ort = require("onnxruntime", extra="cpu")
        cuda = on_cuda()
        self.device = "cuda" if cuda else "cpu"
        providers = [CUDA_PROVIDER] * cuda + ["CPUExecutionProvider"]
        try:
            self._session = self._ort.InferenceSession(path, _options(self._ort, options), providers=providers)
        except Exception as error:  # its errors share no base class
            raise EngineError(f"{path} could not be loaded by ONNX Runtime: {_one_line(error)}") from error
        if cuda and "CUDAExecutionProvider" not in self._session.get_providers():
            LOG.warning("%s: CUDA does not start here, so ONNX Runtime uses the CPU.", contract.name)
            self.device = "cpu"
        check_tensors(f"{contract.name} inputs", contract.inputs, _specs(self._session.get_inputs()))
        check_tensors(f"{contract.name} outputs", contract.outputs, _specs(self._session.get_outputs()))

    def allocate_state(self, batch: int) -> OrtState:
        """See Session. Fresh memory each time, so that nothing of an earlier request can remain in it. On the CPU the
        zeros come from the operating system page by page as rows are used, which costs less than clearing a used
        cache. On CUDA the whole cache is copied from the host for every request, within its prefill's time: ONNX
        Runtime has no call that clears memory on the device."""
        binding, caches = self._session.io_binding(), []
        for spec, present in state_pairs(self.contract):
            shape, narrow = spec.shape({"batch": batch}), spec.dtype == "bfloat16"
            zeros = np.zeros(shape, np.uint16 if narrow else spec.dtype)
            cache = self._ort.OrtValue.ortvalue_from_numpy(zeros, self.device)
            if narrow:  # which numpy has not: the same bits by their address
                at = (self.device, 0, _BFLOAT16, shape, cache.data_ptr())
                binding.bind_input(spec.name, *at)
                binding.bind_output(present, *at)
            else:
                binding.bind_ortvalue_input(spec.name, cache)
                binding.bind_ortvalue_output(present, cache)
            caches.append(cache)
        return OrtState(batch, binding, tuple(caches))

    def place(self, array: Array) -> OrtTensor:
        """See Session."""
        return placed(array, self.device)

    def layer_times(self) -> list[LayerTime]:
        """See Session."""
        return []

    def memory_bytes(self) -> Mapping[str, int]:
        """See Session."""
        return {}

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
            raise EngineError(f"{self.contract.name} failed in ONNX Runtime: {_one_line(error)}") from error
        return (time.perf_counter() - start) * 1e3

    def _bind_kept(self, binding: Any, spec: TensorSpec, sizes: Mapping[str, int]) -> OrtTensor:
        shape, dtype = spec.shape(sizes), np.dtype(spec.dtype)
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, self.device)
        binding.bind_ortvalue_output(spec.name, value)
        return OrtTensor(value, shape, dtype, self.device)


def placed(array: Array, device: str) -> OrtTensor:
    """A copy of an array on a device of ONNX Runtime's."""
    value = require("onnxruntime", extra="cpu").OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device)
    return OrtTensor(value, array.shape, array.dtype, device)


def _joined(tensors: Sequence[DeviceTensor], device: str) -> DeviceTensor:
    """On CUDA by way of the host: ONNX Runtime has no call that copies within the device."""
    return tensors[0] if len(tensors) == 1 else placed(np.concatenate([each.numpy() for each in tensors]), device)


def _bind_array(binding: Any, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """An array of our own for an output: one that ONNX Runtime allocates would be overwritten by the next run."""
    array = np.empty(spec.shape(sizes), spec.dtype)
    binding.bind_output(spec.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    return array


def _options(ort: Any, chosen: Options) -> Any:
    options = ort.SessionOptions()
    # It writes to stderr, past Python's logging: errors that are raised as well, warnings that nobody here can act on.
    options.log_severity_level = 2 if LOG.isEnabledFor(logging.DEBUG) else 4
    options.intra_op_num_threads = chosen.threads or 0
    # Weights are prepacked (the default), which takes a copy of them in memory but computes 104 tokens of 4 layers at
    # width 2048 in 295 ms instead of 446; decoding, bound by memory, gains nothing. float16 weights become float32
    # either way, since the CPU provider has no float16 matrix product: twice the file's size.
    # Two sessions take turns: threads of the one that is done must not spin on the cores that the other needs. On two
    # cores this takes llava-tiny's vision from 13 to 9 ms.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if chosen.exact:
        options.add_session_config_entry(*EXACT)
    return options


def _specs(tensors: Any) -> Iterator[TensorSpec]:
    for t in tensors:
        dtype = _DTYPES.get(t.type) or t.type.removeprefix("tensor(").removesuffix(")")
        yield TensorSpec(t.name, dtype, tuple(d if isinstance(d, int) else -1 for d in t.shape))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
