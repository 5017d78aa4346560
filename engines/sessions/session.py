"""One compiled graph that can be run: the interface that every backend's session has.

A session takes and returns exactly what its contract says. Arrays come from and go to the host; a `DeviceTensor` stays
where the session computes and can be fed to another session of the same backend. A `State` is the KV cache of one
request: past.* and present.* bound to the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from flowcut.contract import GraphContract, TensorSpec, cached_layers, past_names, present_names
from flowcut.errors import EngineError

Array = NDArray[Any]


class DeviceTensor(Protocol):
    """An output kept on the device that computed it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def numpy(self) -> Array:
        """A copy on the host."""

    def split(self) -> list[DeviceTensor]:
        """Its rows, [1, ...] each and in memory of its own, so that a cache may keep one and drop another."""


Feed = Array | DeviceTensor | Sequence[DeviceTensor]
"""What an input takes. Several tensors are put one behind the other along the first axis, on the device."""


class State(Protocol):
    """The KV cache of `batch` sequences, zero at first; its memory is given back when the last reference goes."""

    @property
    def batch(self) -> int: ...


@dataclass(frozen=True)
class LayerTime:
    """Where a profiled session spent its time.

    Attributes:
        graph, name, op: the graph, and in it the node or layer and its kind ("MatMul"; "" where the library hides it).
        calls, total_ms: how often it ran, and for how long together.
    """

    graph: str
    name: str
    op: str
    calls: int
    total_ms: float


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

    def place(self, array: Array) -> DeviceTensor:
        """A copy on the device, for what is fed to many runs."""

    def forget_times(self) -> None:
        """Leave what ran so far, a warm-up, out of `layer_times`."""

    def layer_times(self) -> list[LayerTime]:
        """Of all runs since the last call of this or of `forget_times`, the slowest first; empty unless loaded with
        Options.profile. ONNX Runtime tells once: it measures nothing from then on."""

    def memory_bytes(self) -> Mapping[str, int]:
        """What the session itself holds, by kind: "weights", "cache", "buffers", .. as far as it knows."""

    def close(self) -> None:
        """Give back at once what would else be freed some day, and keep what is to last. Nothing may run afterwards;
        states and tensors of the session are dead."""

    def run(self, feeds: Mapping[str, Feed], state: State | None = None, keep: Collection[str] = ()) -> Result:
        """Run once; everything is finished on return.

        Args:
            feeds: every input but past.*.
            state: where past.* and present.* are, for a graph that has them.
            keep: outputs to leave on the device.

        Raises:
            EngineError: feeds that the contract does not allow, or the engine library failed.
        """


class _Ports(NamedTuple):
    """A contract's tensors, sorted out."""

    pairs: tuple[tuple[TensorSpec, str], ...]
    feeds: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]


def state_pairs(contract: GraphContract) -> list[tuple[TensorSpec, str]]:
    """Cache inputs, each with the name of the output that shares its memory; none for a graph without a cache."""
    return list(_ports(contract).pairs)


def feeds_of(contract: GraphContract) -> list[TensorSpec]:
    """Inputs that are not the cache."""
    return list(_ports(contract).feeds)


def results_of(contract: GraphContract) -> list[TensorSpec]:
    """Outputs that are not the cache."""
    return list(_ports(contract).results)


def taken_by_others(contract: GraphContract) -> list[TensorSpec]:
    """Outputs that another graph of the engine takes: the ones to expect in `keep`."""
    pictures, hidden = ("image_embeds", "image_lengths"), "hidden."
    return [spec for spec in results_of(contract) if spec.name in pictures or spec.name.startswith(hidden)]


def sizes_of(contract: GraphContract, feeds: Mapping[str, Feed], state: State | None) -> dict[str, int]:
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


def shape_of(value: Feed) -> tuple[int, ...]:
    """Of a fed tensor, or of several once they are joined."""
    if not isinstance(value, Sequence):
        return value.shape
    return (sum(each.shape[0] for each in value), *value[0].shape[1:]) if value else ()


def bytes_of(tensor: Array | DeviceTensor) -> int:
    """Memory that its elements take."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _ports(contract: GraphContract) -> _Ports:
    """Sorted out once and kept with the contract, which never changes: every step of an answer asks several times."""
    known = vars(contract)
    if (ports := known.get("_ports")) is None:
        ports = known["_ports"] = _sorted_out(contract)
    return cast(_Ports, ports)


def _sorted_out(contract: GraphContract) -> _Ports:
    inputs, layers = {s.name: s for s in contract.inputs}, cached_layers(contract)
    names = [pair for layer in layers for pair in zip(past_names(layer), present_names(layer), strict=True)]
    cache = {name for pair in names for name in pair}
    return _Ports(
        tuple((inputs[past], present) for past, present in names),
        tuple(s for s in contract.inputs if s.name not in cache),
        tuple(s for s in contract.outputs if s.name not in cache),
    )


def _measure(contract: GraphContract, spec: TensorSpec, value: Feed, sizes: dict[str, int]) -> None:
    """Check one fed tensor, adding its named dimensions to `sizes`."""
    shape, parts = shape_of(value), value if isinstance(value, Sequence) else [value]
    alike = len({(each.dtype, each.shape[1:]) for each in parts}) == 1
    fits = alike and parts[0].dtype == spec.dtype and len(shape) == len(spec.dims)
    for dim, size in zip(spec.dims, shape, strict=False):
        if isinstance(dim, str):
            allowed = contract.ranges[dim]
            fits = fits and allowed.min <= size <= allowed.max and sizes.setdefault(dim, size) == size
        else:
            fits = fits and size == dim
    if not fits:
        dims = ", ".join(_dim_text(contract, dim, sizes) for dim in spec.dims)
        got = " + ".join(f"{each.dtype}{list(each.shape)}" for each in parts)
        raise EngineError(f"{contract.name} input {spec.name} must be {spec.dtype}[{dims}], got {got or 'none'}.")


def _dim_text(contract: GraphContract, dim: int | str, sizes: Mapping[str, int]) -> str:
    if isinstance(dim, int):
        return str(dim)
    allowed = contract.ranges[dim]
    return f"{dim} {sizes[dim]}" if dim in sizes else f"{dim} {allowed.min}..{allowed.max}"
