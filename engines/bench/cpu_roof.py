"""What this machine's CPU could do at best, measured: the roof that a stage's time is held against.

ONNX Runtime multiplies a float32 matrix of a decoder's size itself, with the threads that the benchmark has; memory is
copied or read, whichever is faster, by as many threads of numpy. The best of several tries, before the benchmark and
behind it, is the roof.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowcut.deps import require

Array = NDArray[np.float32]
ROWS, INNER, OUTER = 512, 2048, 4096
COPIED = 1 << 28
"""Bytes: more than caches hold."""
TRIES = 7


@dataclass(frozen=True)
class CpuRoof:
    """flops_per_s: float32 operations a second. bytes_per_s: read and written, a second."""

    flops_per_s: float
    bytes_per_s: float

    def best(self, other: CpuRoof) -> CpuRoof:
        """Of two measurements."""
        return CpuRoof(max(self.flops_per_s, other.flops_per_s), max(self.bytes_per_s, other.bytes_per_s))


def measure_roof(threads: int, now: Callable[[], float] = time.perf_counter) -> CpuRoof:
    """Takes about a second.

    Raises:
        FlowCutError: onnx or onnxruntime is not installed.
    """
    flops = 2 * ROWS * INNER * OUTER
    product = flops / _fastest(_product(threads), now)
    with ThreadPoolExecutor(threads) as pool:
        copied = 2 * COPIED / _fastest(_in_parts(pool, threads, _copy), now)
        read = COPIED / _fastest(_in_parts(pool, threads, _read), now)
    return CpuRoof(product, max(copied, read))


def _fastest(run: Callable[[], Any], now: Callable[[], float]) -> float:
    """Seconds, of TRIES runs after one that does not count."""
    run()
    found = []
    for _ in range(TRIES):
        start = now()
        run()
        found.append(now() - start)
    return min(found)


def _product(threads: int) -> Callable[[], Any]:
    onnx, ort = require("onnx", extra="export"), require("onnxruntime", extra="cpu")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = np.random.default_rng(0).standard_normal((INNER, OUTER), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "roof",
        [helper.make_tensor_value_info("x", kind, [ROWS, INNER])],
        [helper.make_tensor_value_info("y", kind, [ROWS, OUTER])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(1).standard_normal((ROWS, INNER), np.float32)
    return lambda: session.run(None, {"x": rows})


def _in_parts(pool: ThreadPoolExecutor, threads: int, work: Callable[[Array, Array], object]) -> Callable[[], Any]:
    """`work` on a part of two large arrays in each thread: numpy lets other threads run meanwhile."""
    source, target = np.ones(COPIED // 4, np.float32), np.zeros(COPIED // 4, np.float32)
    edges = np.linspace(0, len(source), threads + 1, dtype=np.int64)
    parts = [slice(a, b) for a, b in pairwise(edges)]
    return lambda: list(pool.map(lambda part: work(source[part], target[part]), parts))


def _copy(source: Array, target: Array) -> None:
    np.copyto(target, source)


def _read(source: Array, _: Array) -> float:
    return float(source.max())
