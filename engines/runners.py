"""What Polygraphy runs for `verify`: ONNX files and engines, step by step, the cache handed from each to the next."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends import MODULES
from engines.profiles import check_tensors
from engines.sessions.ort_loading import EXACT
from engines.sessions.session import Array, results_of, state_pairs
from engines.widen import widened
from flowcut.contract import GraphContract, TensorSpec
from flowcut.deps import require

LOG = logging.getLogger("flowcut.verify")
Feeds = dict[str, Array]


@contextmanager
def polygraphy(backend: str) -> Iterator[None]:
    """Polygraphy, set to the backend's TensorRT, and quiet: what matters is in the rows. --verbose twice shows all."""
    # What POLYGRAPHY_USE_TENSORRT_RTX sets. Its modules read it when they are imported, so a process that verifies
    # directories of both backends has the first one's library for both.
    config: Any = require("polygraphy.config", extra="verify")
    config.USE_TENSORRT_RTX = backend == "rtx"
    logger = require("polygraphy.logger", extra="verify").G_LOGGER
    with logger.verbosity(logger.VERBOSE if LOG.isEnabledFor(logging.DEBUG) else sys.maxsize):
        yield


def onnx_runner(path: Path, bf16: bool = False) -> Any:
    """Polygraphy's runner of ONNX Runtime, on the CPU: the provider that computes most exactly, and is always there."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    ort = require("onnxruntime", extra="cpu")
    options = ort.SessionOptions()
    # Warns of every cache it copies, which it does here since the runner hands it over as arrays. Polygraphy's own
    # loader, SessionFromOnnx, has no way to say so.
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT)

    def load() -> Any:
        with widened(path) if bf16 else nullcontext(path) as file:
            return ort.InferenceSession(file, options, ["CPUExecutionProvider"])

    return OnnxrtRunner(load, name="onnxruntime")


def engine_runner(path: Path, backend: str) -> Any:
    """Polygraphy's runner of TensorRT or TensorRT-RTX. It needs libcudart.so where the loader finds it."""
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    return TrtRunner(EngineFromBytes(lambda: np.memmap(path, np.uint8, mode="r")), name=MODULES[backend])


def run_steps(runner: Any, contract: GraphContract, steps: Sequence[Feeds]) -> list[Feeds]:
    """Outputs of every step, the cache handed from each to the next; only the last step's outputs hold the cache.

    Raises:
        EngineError: outputs whose names, shapes or types are not the contract's.
    """
    pairs, results = state_pairs(contract), []
    empty = sizes_of_feeds(contract, steps[0])
    cache = {spec.name: np.zeros(spec.shape(empty), spec.dtype) for spec, _ in pairs}
    for step in steps:
        outputs = runner.infer({**step, **cache})
        outputs = {name: np.array(array) for name, array in outputs.items()}  # runners reuse their buffers
        _check_outputs(contract, outputs, sizes_of_feeds(contract, step))
        cache = {spec.name: outputs[present] for spec, present in pairs}
        results.append({s.name: outputs[s.name] for s in results_of(contract)})
    return [*results[:-1], results[-1] | {present: cache[spec.name] for spec, present in pairs}]


def sizes_of_feeds(contract: GraphContract, feeds: Feeds) -> dict[str, int]:
    """Named dimensions of one step."""
    named = (
        (d, n) for s in contract.inputs if s.name in feeds for d, n in zip(s.dims, feeds[s.name].shape, strict=True)
    )
    return {d: n for d, n in named if isinstance(d, str)}


def _check_outputs(contract: GraphContract, outputs: Feeds, sizes: Mapping[str, int]) -> None:
    wanted = [TensorSpec(s.name, s.dtype, s.shape(sizes)) for s in contract.outputs]
    got = [TensorSpec(name, array.dtype.name, array.shape) for name, array in outputs.items()]
    check_tensors(f"{contract.name} outputs", wanted, got)
