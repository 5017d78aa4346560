"""A bf16 graph in float32: what ONNX Runtime runs of it on a CPU, where its provider has no bf16 kernels.

Weights are the same numbers, bf16 being float32 with fewer digits; arithmetic and cache are more exact.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flowcut.atomic import check_space
from flowcut.contract import GraphContract, TensorSpec
from flowcut.deps import require
from flowcut.errors import EngineError

NOTE = "bf16 weights, computed in float32: ONNX Runtime's CPU provider has no bf16 kernels"
_MEMORY = Path("/proc/meminfo")
_GRAPH_BYTES = 64 << 20  # room for all that is not weights


def widened_contract(contract: GraphContract) -> GraphContract:
    """The contract with float32 for bfloat16."""
    inputs, outputs = (tuple(map(_widened_spec, specs)) for specs in (contract.inputs, contract.outputs))
    return replace(contract, inputs=inputs, outputs=outputs)


def load_model(path: Path) -> Any:
    """An ONNX file as onnx_ir has it; weights stay in their file until they are asked for.

    Raises:
        EngineError: not an ONNX file. FlowCutError: onnx_ir is not installed.
    """
    ir = require("onnx_ir", extra="export")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's share no base class
        problem = " ".join(str(error).split())
        raise EngineError(f"{path} must be an ONNX file, got: {problem}. Build it again.") from None


@contextmanager
def widened(path: Path) -> Iterator[Path]:
    """Yield a float32 copy of the bf16 graph at `path`, in a temporary directory that goes when the block ends.

    ONNX Runtime maps the weights when it loads a file, so a session made in the block outlives them. They are external
    data since protobuf takes no more than 2 GB.

    Raises:
        EngineError: the temporary directory's disk or the memory is too small, or the file is no bf16 graph.
        FlowCutError: onnx_ir is not installed.
    """
    ir, model = require("onnx_ir", extra="export"), load_model(path)
    if not any(value.dtype == ir.DataType.BFLOAT16 for value in model.graph.initializers.values()):
        raise EngineError(f"{path} must be a bf16 graph, got one without a bf16 weight. Build it again.")
    needed = _widen(ir, model)
    with tempfile.TemporaryDirectory(prefix="flowcut-") as directory:
        _check_room(Path(directory), needed)
        copy = Path(directory) / path.name
        ir.save(model, copy, external_data=f"{path.name}.data")
        yield copy


def _widen(ir: Any, model: Any) -> int:
    """Replace bf16 by float32 everywhere in `model`; bytes of the weights that result."""
    nodes = [*model.graph.all_nodes(), *(n for f in model.functions.values() for n in f.all_nodes())]
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            if name == "to" and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _wide_tensor(ir, attribute.value))
    initializers = list(model.graph.initializers.values())
    for value in initializers:
        if value.dtype == ir.DataType.BFLOAT16:
            value.const_value = _wide_tensor(ir, value.const_value)
    outputs = (value for node in nodes for value in node.outputs)
    for value in (*model.graph.inputs, *initializers, *outputs):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    return sum(value.const_value.nbytes for value in initializers)


def _wide_tensor(ir: Any, tensor: Any) -> Any:
    """Read, and converted, when it is written."""

    def convert() -> Any:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(convert, dtype=ir.DataType.FLOAT, shape=tensor.shape, name=tensor.name)


def _check_room(directory: Path, weight_bytes: int) -> None:
    """Disk for the copy, and memory: ONNX Runtime packs weights anew, and what it mapped the system can let go.

    Raises:
        EngineError: too little of either.
    """
    remedy = "Choose another precision than bf16 to run on a CPU."
    try:
        check_space(directory, weight_bytes + _GRAPH_BYTES)
    except EngineError as error:
        raise EngineError(f"{error} TMPDIR says where temporary files go. {remedy}") from None
    if (free := free_memory()) is not None and free < weight_bytes:
        raise EngineError(
            f"free memory must be at least {weight_bytes / 1e9:.1f} GB to run bf16 weights in float32, got "
            f"{free / 1e9:.1f} GB. {remedy}"
        )


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMORY.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _widened_spec(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec
