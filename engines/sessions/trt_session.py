"""A session on TensorRT or TensorRT-RTX: one implementation, the module is a parameter.

Buffers are allocated here, when the engine is loaded. A request occupies one of `concurrency` slots, with places for
whatever goes in and out, and its KV cache. So its inputs are copied while another request computes, and its outputs
while the next one does: what they share is the stream that computes, and its lock only while work is put there.

What a request may still add is bounded and made once: the first decode step of each batch size in each slot makes its
execution context, the second its CUDA graph, and both take memory of the device that is not counted here. TensorRT-RTX
does the same by itself, and compiles kernels for shapes that are new to it.

Written against the documented API of TensorRT and of cuda.core, and tested with a stand-in for both; it has not been
run on a GPU yet.
"""

from __future__ import annotations

import gc
import logging
import queue
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends import trt_module
from engines.listeners import make_profiler
from engines.options import Options
from engines.profiles import NUMPY_NAMES, check_tensors
from engines.sessions.cuda_buffers import Pool, Slot, TrtTensor, bytes_for, greatest, placed
from engines.sessions.cuda_contexts import Check, Contexts, Execution
from engines.sessions.cuda_device import REMEDY, CudaDevice
from engines.sessions.runtime_cache import cache_path
from engines.sessions.session import (
    Array,
    DeviceTensor,
    Feed,
    LayerTime,
    Result,
    State,
    results_of,
    shape_of,
    sizes_of,
    state_pairs,
    taken_by_others,
)
from flowcut.contract import GraphContract, TensorSpec
from flowcut.errors import EngineError

LOG = logging.getLogger("flowcut.tensorrt")
DEFAULT = Options()
WAIT_S = 1.0
"""For a cache that a request which has just left its place is about to give back."""
MOST_STEPS = 8
"""Batch sizes whose decode steps have a context, and a CUDA graph, of their own in each place; others do without."""


class Place:
    """Where one request computes: a slot, and the execution contexts that know its addresses."""

    def __init__(self, slot: Slot, contexts: Contexts, check: Check) -> None:
        self.slot, self._contexts, self._check = slot, contexts, check
        self._general = contexts.make(slot.addresses, check)
        self._steps: dict[int, Execution] = {}

    def execution(self, step_of: int | None) -> Execution:
        """The context for a decode step of so many sequences, or, with None, for anything."""
        if step_of is None or (step_of not in self._steps and len(self._steps) == MOST_STEPS):
            return self._general
        if step_of not in self._steps:
            self._steps[step_of] = self._contexts.make(self.slot.addresses, self._check, repeated=True)
        return self._steps[step_of]


class TrtState:
    """The cache of a place: made for the greatest batch, it serves any."""

    def __init__(self, batch: int, place: Place) -> None:
        self.batch, self.place = batch, place


class TrtSession:
    """A serialized engine on `device`, for `options.concurrency` requests at once.

    Args:
        sha256: of the file, where it is known: then the kernels that TensorRT-RTX compiles for this GPU are kept beside
            the engine directory, see engines.sessions.runtime_cache.

    Raises:
        EngineError: an engine that this library or this GPU refuses, or that is not the contract's graph; a full GPU.
    """

    def __init__(
        self,
        path: Path,
        contract: GraphContract,
        backend: str,
        device: CudaDevice,
        options: Options = DEFAULT,
        sha256: str = "",
    ) -> None:
        self.contract, self.device = contract, device
        self._trt = trt_module(backend)
        device.set_current()
        self._runtime, self._log = device.runtime(self._trt)
        engine: Any = self._load(path)
        self._engine, self._plan_bytes = engine, path.stat().st_size
        self._check_tensors()
        self._profiler = make_profiler(self._trt) if options.profile else None
        kernels = cache_path(path, sha256, self._trt.__version__, device.capability) if sha256 else None
        self._contexts = Contexts(
            self._trt, self._engine, device, options.cuda_graphs and not options.profile, self._profiler, kernels
        )
        keeper = self._contexts.kernels
        self._save = weakref.finalize(self, keeper.close) if keeper is not None else None  # when Python ends, too
        # Two for a graph that remembers nothing: one computes while the inputs of the next are copied.
        count = options.concurrency if state_pairs(contract) else min(2, options.concurrency)
        self._places = [Place(Slot(device, contract), self._contexts, self._check) for _ in range(count)]
        self._idle: queue.SimpleQueue[Place | None] = queue.SimpleQueue()  # None: closed
        for place in self._places:
            self._idle.put(place)
        self._pools = self._make_pools(options)
        self._cache_shapes: dict[int, dict[str, tuple[int, ...]]] = {}

    def allocate_state(self, batch: int) -> TrtState:
        """See Session.

        Raises:
            EngineError: `concurrency` requests have a cache already.
        """
        state = TrtState(batch, self._take_place())
        # Called wherever the garbage collector runs: SimpleQueue's put is made for that.
        weakref.finalize(state, self._idle.put, state.place).atexit = False
        self.device.set_current()
        state.place.slot.clear(batch)
        return state

    def place(self, array: Array) -> TrtTensor:
        """See Session."""
        return placed(self.device, array)

    def forget_times(self) -> None:
        """See Session."""
        self.layer_times()

    def layer_times(self) -> list[LayerTime]:
        """See Session. Of what kind a layer is, TensorRT does not say."""
        if self._profiler is None:
            return []
        with self.device.lock:
            times, self._profiler.times = self._profiler.times, {}
        layers = [LayerTime(self.contract.name, name, "", int(calls), ms) for name, (calls, ms) in times.items()]
        return sorted(layers, key=lambda layer: -layer.total_ms)

    def memory_bytes(self) -> Mapping[str, int]:
        """See Session. "weights" is the engine file, which is little else; "pinned" is memory of the host."""
        if not self._places:
            return {}
        slots = [place.slot for place in self._places]
        lent = [pool for whole in self._pools.values() for pool in (whole, whole.rows) if pool is not None]
        return {
            "weights": self._plan_bytes,
            "cache": sum(slot.cache.bytes for slot in slots),
            "buffers": sum(slot.memory.bytes for slot in slots) + sum(pool.bytes for pool in lent),
            "scratch": self._contexts.scratch_bytes,
            "pinned": sum(slot.staging.bytes for slot in slots),
        }

    def close(self) -> None:
        """See Session. Memory of tensors and states that somebody still holds goes with them.

        It goes to cuda.core's pool, from which the next engine of this process takes it; other processes get it when
        this one ends.
        """
        if not self._places:
            return
        if self._save is not None:
            self._save()
        waited_for, self._idle = self._idle, queue.SimpleQueue()
        self._places, self._pools = [], {}
        for idle in (self._idle, waited_for):
            idle.put(None)
        del self._contexts, self._engine, self._runtime

    def run(self, feeds: Mapping[str, Feed], state: State | None = None, keep: Collection[str] = ()) -> Result:
        """See Session. device_ms is between CUDA events around the execution."""
        sizes = sizes_of(self.contract, feeds, state)
        self._check_open()
        self.device.set_current()
        with self._place_of(state) as place, self._unharmed(place.slot):
            result = self._run(place, feeds, sizes, keep)
        if self._contexts.kernels is not None:
            self._contexts.kernels.count_run()
        return result

    def _run(self, place: Place, feeds: Mapping[str, Feed], sizes: Mapping[str, int], keep: Collection[str]) -> Result:
        slot = place.slot
        for name, value in feeds.items():
            slot.put(name, value)
        slot.copies.record(slot.ready)
        execution = place.execution(self._step_of(sizes))
        execution.shape({name: shape_of(value) for name, value in feeds.items()})
        execution.shape(self._shapes_of_cache(sizes))
        compute = self.device.compute
        with self.device.lock:
            compute.wait(slot.ready)
            compute.record(slot.start)
            execution.enqueue(compute)
            compute.record(slot.end)
        slot.copies.wait(slot.end)
        arrays, kept = dict[str, Array](), dict[str, DeviceTensor]()
        for spec in results_of(self.contract):
            if spec.name in keep:
                kept[spec.name] = slot.keep(spec, sizes, self._pools.get(spec.name))
            else:
                arrays[spec.name] = slot.fetch(spec, sizes)
        slot.copies.sync()
        return Result({name: view.copy() for name, view in arrays.items()}, kept, slot.end - slot.start)

    def _load(self, path: Path) -> Any:
        engine = self._runtime.deserialize_cuda_engine(np.memmap(path, dtype=np.uint8, mode="r"))
        if engine is None:
            raise EngineError(
                f"{path} could not be loaded by {self._trt.__name__}: {self._log.take()}. {REMEDY}. Or build it "
                "again with the installed version, for this GPU."
            )
        return engine

    def _make_pools(self, options: Options) -> dict[str, Pool]:
        """For outputs that other graphs take. Where one has a row for each picture, rows for those that the picture
        cache has room for, and for those of the requests at work."""
        most, pools, results = greatest(self.contract), dict[str, Pool](), taken_by_others(self.contract)
        count, advice = options.concurrency, "Let go of earlier ones, or load the engine with a greater"
        rows_of = {} if state_pairs(self.contract) else {s.name: bytes_for(s, most | {"images": 1}) for s in results}
        held = options.picture_cache_mb * 10**6 // max(rows_of.values(), default=1) + count * most.get("images", 0)
        for spec in results:
            name = f"{spec.name} of {self.contract.name}"
            rows = None
            if spec.name in rows_of:
                rows = Pool(self.device, rows_of[spec.name], held, f"rows of {name}", f"{advice} picture_cache_mb.")
            whole = bytes_for(spec, most)
            pools[spec.name] = Pool(self.device, whole, count, f"kept {name}", f"{advice} concurrency.", rows)
        return pools

    def _step_of(self, sizes: Mapping[str, int]) -> int | None:
        """The batch size of a decode step, whose other dimensions all are the least; None for any other run."""
        ranges = self.contract.ranges
        least = all(size == ranges[name].min for name, size in sizes.items() if name != "batch")
        return sizes["batch"] if least and self._contexts.graphs and "batch" in sizes else None

    def _shapes_of_cache(self, sizes: Mapping[str, int]) -> Mapping[str, tuple[int, ...]]:
        """By batch size, which is all that they depend on."""
        if (batch := sizes.get("batch", 0)) not in self._cache_shapes:
            self._cache_shapes[batch] = {spec.name: spec.shape(sizes) for spec, _ in state_pairs(self.contract)}
        return self._cache_shapes[batch]

    def _take_place(self) -> Place:
        self._check_open()
        idle = self._idle
        with suppress(queue.Empty):
            return self._opened(idle, idle.get_nowait())
        gc.collect()  # an error that somebody looks at may hold a state in a cycle
        with suppress(queue.Empty):
            return self._opened(idle, idle.get(timeout=WAIT_S))
        raise EngineError(
            f"requests with a KV cache on the GPU must be at most {len(self._places)} at once (load_engine's "
            "concurrency), got one more. A Prefill keeps its cache for as long as it is held: let go of earlier ones, "
            "or load the engine with a greater concurrency."
        )

    @contextmanager
    def _place_of(self, state: State | None) -> Iterator[Place]:
        if isinstance(state, TrtState) and state.place in self._places:
            yield state.place
        elif state is not None:
            raise EngineError(f"{self.contract.name} must be run with a state that it allocated, got another's.")
        else:
            idle = self._idle
            place = self._opened(idle, idle.get())
            try:
                yield place
            finally:
                idle.put(place)

    def _opened(self, idle: queue.SimpleQueue[Place | None], got: Place | None) -> Place:
        """What somebody has waited for, unless the session was closed meanwhile."""
        if got is None or not self._places:
            idle.put(None)  # for the next who waits
            self._check_open()
            raise RuntimeError("only a closed session's places end")
        return got

    @contextmanager
    def _unharmed(self, slot: Slot) -> Iterator[None]:
        """Leave nothing under way that would write into the slot of the next request, whatever ended this one."""
        try:
            with self.device.errors(self.contract.name):
                yield
        except BaseException:
            # What a lost GPU says to each of these, the error has said already.
            with suppress(Exception), self.device.lock:
                self.device.compute.record(slot.end)
            with suppress(Exception):
                slot.copies.wait(slot.end)
            with suppress(Exception):
                slot.copies.sync()
            raise

    def _check_open(self) -> None:
        if not self._places:
            raise EngineError(f"{self.contract.name} must be open, got a request after its close(). Load it again.")

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

    def _check(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise EngineError(f"{self.contract.name}: {self._trt.__name__} did not {what}: {self._log.take()}.")
