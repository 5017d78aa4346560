"""One compiled graph that can be run: the interface of all backends, and ONNX Runtime's implementation.

A session takes and returns exactly what its contract says. Arrays come from and go to the host; a `DeviceTensor` stays
where the session computes and can be fed to another session of the same backend. A `State` is the KV cache of one
request: past.* and present.* bound to the same memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.backends import gpu_present
from engines.profiles import check_tensors
from flowcut.contract import GraphContract, TensorSpec, cached_layers, past_names, present_names
from flowcut.deps import require
from flowcut.errors import EngineError

LOG = logging.getLogger("flowcut.onnxruntime")

Array = NDArray[Any]
# TF32, its default, rounds float32 products to 10 bits, and near-equal flow scores would rank differently.
CUDA_PROVIDER = ("CUDAExecutionProvider", {"use_tf32": 0})
EXACT = ("session.qdq_matmulnbits_accuracy_level", "1")
"""ONNX Runtime's setting by which inputs of int8 and int4 layers stay float32. By default, 4, they become int8."""
_BFLOAT16 = 16  # ONNX's number for it
_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # others are called as numpy does


class DeviceTensor(Protocol):
    """An output kept on the device that computed it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def numpy(self) -> Array:
        """A copy on the host."""


class State(Protocol):
    """The KV cache of `batch` sequences, zero at first; its memory is given back when the last reference goes."""

    @property
    def batch(self) -> int: ...


@dataclass(frozen=True)
class Result:
    """What one run returned.

    Attributes:
        arrays: outputs on the host, by name, without present.*.
        kept: the outputs that were to stay on the device.
        device_ms: milliseconds of the graph itself, copies from and to the host not counted.
    """

    arrays: dict[str, Array]
    kept: dict[str, DeviceTensor]
    device_ms: float


class Session(Protocol):
    """A graph ready to run. May be called from several threads, each request with a state of its own."""

    @property
    def contract(self) -> GraphContract: ...

    def allocate_state(self, batch: int) -> State:
        """An empty KV cache for `batch` sequences."""

    def run(
        self, feeds: Mapping[str, Array | DeviceTensor], state: State | None = None, keep: Collection[str] = ()
    ) -> Result:
        """Run once; everything is finished on return.

        Args:
            feeds: every input but past.*.
            state: where past.* and present.* are, for a graph that has them.
            keep: outputs to leave on the device.

        Raises:
            EngineError: feeds that the contract does not allow, or the engine library failed.
        """


def on_cuda() -> bool:
    """Whether ONNX Runtime's CUDA provider is installed and a GPU is present.

    Raises:
        FlowCutError: onnxruntime is not installed.
    """
    providers = require("onnxruntime", extra="cpu").get_available_providers()
    return "CUDAExecutionProvider" in providers and gpu_present()


def state_pairs(contract: GraphContract) -> list[tuple[TensorSpec, str]]:
    """Cache inputs, each with the name of the output that shares its memory; none for a graph without a cache."""
    inputs, layers = {s.name: s for s in contract.inputs}, cached_layers(contract)
    names = (pair for layer in layers for pair in zip(past_names(layer), present_names(layer), strict=True))
    return [(inputs[past], present) for past, present in names]


def feeds_of(contract: GraphContract) -> list[TensorSpec]:
    """Inputs that are not the cache."""
    cache = {spec.name for spec, _ in state_pairs(contract)}
    return [s for s in contract.inputs if s.name not in cache]


def results_of(contract: GraphContract) -> list[TensorSpec]:
    """Outputs that are not the cache."""
    cache = {present for _, present in state_pairs(contract)}
    return [s for s in contract.outputs if s.name not in cache]


def sizes_of(contract: GraphContract, feeds: Mapping[str, Array | DeviceTensor], state: State | None) -> dict[str, int]:
    """The named dimensions of one run, once `feeds` and `state` are found to be what the contract asks for.

    Raises:
        EngineError: names, dtypes, shapes or ranges that differ.
    """
    specs = feeds_of(contract)
    if feeds.keys() != {s.name for s in specs}:
        wanted, got = sorted(s.name for s in specs), sorted(feeds)
        raise EngineError(
            f"{contract.name} inputs must be {', '.join(wanted)}, got {', '.join(got)}; "
            f"difference: {', '.join(sorted(set(wanted) ^ set(got)))}."
        )
    sizes = {} if state is None else {"batch": state.batch}
    for spec in specs:
        _measure(contract, spec, feeds[spec.name], sizes)
    if (state is None) == (len(specs) < len(contract.inputs)):
        raise EngineError(f"{contract.name} must be run {'with' if state is None else 'without'} a state.")
    return sizes


def _measure(contract: GraphContract, spec: TensorSpec, value: Array | DeviceTensor, sizes: dict[str, int]) -> None:
    """Check one fed tensor, adding its named dimensions to `sizes`."""
    fits = value.dtype == spec.dtype and len(value.shape) == len(spec.dims)
    for dim, size in zip(spec.dims, value.shape, strict=False):
        if isinstance(dim, str):
            allowed = contract.ranges[dim]
            fits = fits and allowed.min <= size <= allowed.max and sizes.setdefault(dim, size) == size
        else:
            fits = fits and size == dim
    if not fits:
        dims = ", ".join(_dim_text(contract, dim, sizes) for dim in spec.dims)
        raise EngineError(
            f"{contract.name} input {spec.name} must be {spec.dtype}[{dims}], got {value.dtype}{list(value.shape)}."
        )


def _dim_text(contract: GraphContract, dim: int | str, sizes: Mapping[str, int]) -> str:
    if isinstance(dim, int):
        return str(dim)
    allowed = contract.ranges[dim]
    return f"{dim} {sizes[dim]}" if dim in sizes else f"{dim} {allowed.min}..{allowed.max}"


@dataclass(frozen=True)
class OrtTensor:
    """An OrtValue, in the memory of the session's execution provider."""

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def numpy(self) -> Array:
        array: Array = self.value.numpy()
        return array


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

    threads: of the CPU provider; None means ONNX Runtime's choice, the physical cores.
    exact: multiply int8 and int4 weights by what the graph says. The CPU provider rounds that to int8 as well unless
        told not to: ten times float16's errors, but decoding is 8 times as fast in int4 and 50 times in int8.

    Raises:
        FlowCutError: onnxruntime is not installed.
        EngineError: a file that does not load, or that is not the contract's graph.
    """

    def __init__(self, path: Path, contract: GraphContract, threads: int | None = None, exact: bool = False) -> None:
        self.contract = contract
        self._ort = require("onnxruntime", extra="cpu")
        cuda = on_cuda()
        self.device = "cuda" if cuda else "cpu"
        providers = [CUDA_PROVIDER] * cuda + ["CPUExecutionProvider"]
        try:
            self._session = self._ort.InferenceSession(path, _options(self._ort, threads, exact), providers=providers)
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

    def run(
        self, feeds: Mapping[str, Array | DeviceTensor], state: State | None = None, keep: Collection[str] = ()
    ) -> Result:
        """See Session."""
        sizes = sizes_of(self.contract, feeds, state)
        binding = state.binding if isinstance(state, OrtState) else self._session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, OrtTensor):
                binding.bind_ortvalue_input(name, value.value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
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
        return OrtTensor(value, shape, dtype)


def _bind_array(binding: Any, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """An array of our own for an output: one that ONNX Runtime allocates would be overwritten by the next run."""
    array = np.empty(spec.shape(sizes), spec.dtype)
    binding.bind_output(spec.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    return array


def _options(ort: Any, threads: int | None, exact: bool) -> Any:
    options = ort.SessionOptions()
    # It writes to stderr, past Python's logging: errors that are raised as well, warnings that nobody here can act on.
    options.log_severity_level = 2 if LOG.isEnabledFor(logging.DEBUG) else 4
    options.intra_op_num_threads = threads or 0
    # Weights are prepacked (the default), which takes a copy of them in memory but computes 104 tokens of 4 layers at
    # width 2048 in 295 ms instead of 446; decoding, bound by memory, gains nothing. float16 weights become float32
    # either way, since the CPU provider has no float16 matrix product: twice the file's size.
    # Two sessions take turns: threads of the one that is done must not spin on the cores that the other needs. On two
    # cores this takes llava-tiny's vision from 13 to 9 ms.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if exact:
        options.add_session_config_entry(*EXACT)
    return options


def _specs(tensors: Any) -> Iterator[TensorSpec]:
    for t in tensors:
        dtype = _DTYPES.get(t.type) or t.type.removeprefix("tensor(").removesuffix(")")
        yield TensorSpec(t.name, dtype, tuple(d if isinstance(d, int) else -1 for d in t.shape))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
