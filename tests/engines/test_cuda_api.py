"""Names that the GPU path uses exist in the libraries as installed, which needs no GPU to see.

tests/engines/flow_score/test_plugin_types.py compares the use of TensorRT with its types."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import fake_gpu
import pytest

CUDA = {
    "Device": ("allocate", "arch", "create_event", "create_stream", "set_current"),
    "Stream": ("create_graph_builder", "handle", "record", "sync", "wait"),
    "Buffer": ("__dlpack__", "copy_from", "fill", "from_handle", "handle", "size"),
    "Event": ("__sub__",),
    "EventOptions": (),
    "LegacyPinnedMemoryResource": ("allocate",),
    "graph.GraphBuilder": ("begin_building", "close", "complete", "end_building"),
    "graph.Graph": ("launch",),
}
RTX = {
    "CudaGraphStrategy": ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "ICudaEngine": ("create_execution_context", "create_runtime_config", "device_memory_size_v2"),
    "IExecutionContext": (
        *("execute_async_v3", "profiler", "set_device_memory", "set_input_shape", "set_tensor_address"),
    ),
    "IHostMemory": (),
    "ILogger": (),
    "IProfiler": ("report_layer_time",),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": (
        *("create_runtime_cache", "cuda_graph_strategy", "set_execution_context_allocation_strategy"),
        "set_runtime_cache",
    ),
    "Runtime": ("deserialize_cuda_engine",),
    "TensorIOMode": ("OUTPUT",),
    "__version__": (),
}


def missing(module: ModuleType, names: dict[str, tuple[str, ...]]) -> list[str]:
    found = []
    for path, members in names.items():
        thing: object = module
        for name in path.split("."):
            thing = getattr(thing, name, None)
        found += [path] if thing is None else [f"{path}.{m}" for m in members if not hasattr(thing, m)]
    return found


@pytest.fixture
def cuda() -> ModuleType:
    module = pytest.importorskip("cuda.core", reason="needs cuda-core, of the rtx extra")
    importlib.import_module("cuda.core.graph")
    return module


def test_cuda_core_has_what_is_used_of_it(cuda: ModuleType) -> None:
    assert missing(cuda, CUDA) == []
    assert missing(cuda, {"Stream": ("recall",), "Steam": ()}) == ["Stream.recall", "Steam"]
    assert cuda.EventOptions(timing_enabled=True).timing_enabled


def test_cuda_core_takes_the_arguments_that_it_is_given(cuda: ModuleType) -> None:
    """As its compiled functions state them in their first line."""
    for function, argument in (
        (cuda.Buffer.copy_from, "stream"),
        (cuda.Buffer.fill, "stream"),
        (cuda.Buffer.from_handle, "owner"),
        (cuda.Device.allocate, "stream"),
        (cuda.Stream.record, "event"),
        (cuda.Stream.wait, "event_or_stream"),
        (cuda.graph.GraphBuilder.begin_building, "mode"),
        (cuda.graph.Graph.launch, "stream"),
    ):
        first_line = (function.__doc__ or "").partition("\n")[0]
        assert re.search(rf"\b{argument}\b", first_line), first_line
    assert "`thread_local`" in (cuda.graph.GraphBuilder.begin_building.__doc__ or "")


def test_tensorrt_rtx_has_what_is_used_of_it() -> None:
    assert missing(pytest.importorskip("tensorrt_rtx", reason="needs the rtx extra"), RTX) == []


def test_what_cuda_core_raises_is_known_by_its_module(cuda: ModuleType) -> None:
    """By which a session tells an error of the GPU from one of its own."""
    from cuda.core._utils.cuda_utils import CUDAError

    assert CUDAError.__module__.startswith("cuda.")
    assert fake_gpu.CudaError.__module__.startswith("cuda.")
