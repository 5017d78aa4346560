"""Execution contexts of a TensorRT engine, and the CUDA graphs of those that always do the same.

One context for each place that a request may occupy, told the addresses there once and for all. A decode step, whose
shapes never change either, has a context of its own, so that it can be a CUDA graph: TensorRT's documentation wants one
context for a graph, untouched from then on. With TensorRT the step is captured here, when it comes for the second time:
the first has settled what the library prepares for a shape. TensorRT-RTX, which compiles kernels while it runs, knows
best when to capture and does it by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.sessions.cuda_device import CudaDevice
from engines.sessions.runtime_cache import RuntimeCache

LOG = logging.getLogger("flowcut.tensorrt")
ATTEMPTS = 2
"""To capture a step: another thread may have spoiled the first, or the library had something left to prepare."""
Check = Callable[[bool, str], None]
"""Raises EngineError where the library did not do what it was told."""
Shapes = Mapping[str, tuple[int, ...]]


class Execution:
    """An execution context with its addresses.

    Args:
        captured: make a CUDA graph of it. For shapes that stay as they are.
    """

    def __init__(self, context: Any, addresses: Mapping[str, int], check: Check, captured: bool) -> None:
        self.context, self._check, self._attempts = context, check, ATTEMPTS if captured else 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._settled, self._graph = False, None
        for name, address in addresses.items():
            check(context.set_tensor_address(name, address), f"take the address of {name}")

    def shape(self, shapes: Shapes) -> None:
        """Set the inputs' shapes, as far as they are new."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._check(self.context.set_input_shape(name, shape), f"take {name} of shape {shape}")
                self._shapes[name] = shape
                self._settled, self._graph = False, None

    def enqueue(self, stream: Any) -> None:
        """Put the execution on the stream."""
        if self._attempts and self._settled and self._graph is None:
            self._attempts -= 1
            self._graph = self._capture(stream)
        if self._graph is not None:
            self._graph.launch(stream)
        else:
            self._check(self.context.execute_async_v3(int(stream.handle)), "execute")
            self._settled = True

    def _capture(self, stream: Any) -> Any:
        """The execution as a CUDA graph; None where that does not work: graphs save time, nothing else."""
        builder = stream.create_graph_builder()
        try:
            builder.begin_building("thread_local")  # other threads go on copying
            try:
                self._check(self.context.execute_async_v3(int(stream.handle)), "be captured")
            finally:
                builder.end_building()
            return builder.complete()
        except Exception as error:  # of CUDA, by whatever the library did that cannot be captured
            level = logging.INFO if self._attempts else logging.WARNING
            LOG.log(level, "decode steps run without a CUDA graph: %s", " ".join(str(error).split()))
            return None
        finally:
            builder.close()


class Contexts:
    """Makes the contexts of one engine.

    They share their scratch memory, which no two use at once: all that computes is on one stream. Another engine's
    contexts have theirs.

    Args:
        graphs: whether repeated work becomes CUDA graphs.
        profiler: an IProfiler; then every execution is waited for, and nothing is a graph.
        kernels: where those that TensorRT-RTX compiles are kept; None: nowhere.
    """

    def __init__(
        self, trt: Any, engine: Any, device: CudaDevice, graphs: bool, profiler: Any = None, kernels: Path | None = None
    ) -> None:
        self._trt, self._engine, self._profiler = trt, engine, profiler
        self.graphs = graphs and profiler is None
        self._own_graphs = hasattr(trt, "CudaGraphStrategy")  # TensorRT-RTX
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self._scratch = device.allocate(self.scratch_bytes) if self.scratch_bytes else None
        self.kernels: RuntimeCache | None = None
        if kernels is not None and self._own_graphs:
            self.kernels = RuntimeCache(kernels, engine.create_runtime_config().create_runtime_cache(), device)

    def make(self, addresses: Mapping[str, int], check: Check, repeated: bool = False) -> Execution:
        """A context. `repeated`: its shapes will not change."""
        as_graph = repeated and self.graphs
        context = self._create(as_graph)
        check(context is not None, "make an execution context")
        if self._scratch is not None:
            context.set_device_memory(int(self._scratch.handle), self.scratch_bytes)
        if self._profiler is not None:
            context.profiler = self._profiler
        return Execution(context, addresses, check, captured=as_graph and not self._own_graphs)

    def _create(self, as_graph: bool) -> Any:
        trt, managed = self._trt, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._own_graphs:
            return self._engine.create_execution_context(managed)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        strategy = trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if as_graph else strategy.DISABLED
        if self.kernels is not None and not config.set_runtime_cache(self.kernels.cache):
            LOG.info("TensorRT-RTX takes no runtime cache, so kernels are compiled at each start.")
        return self._engine.create_execution_context(config)
