"""A thin layer over onnx_ir for writing graphs by hand: one call per op, weights that load when saved.

Hand-written rather than traced: torch.onnx stops at opset 23, and its graphs of a pruned tower are mostly
shape arithmetic. Here every node is one that somebody decided on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from flowcut.config import NUMPY_DTYPE
from flowcut.contract import GraphContract, TensorSpec
from flowcut.tensors import expected_tensors, narrowed

if TYPE_CHECKING:
    from flowcut.checkpoint import Weights

OPSET = 24
IR_VERSION = 11
_WRITERS = 4
SaveProgress = Callable[[str, int, int], None]
"""Called with the name of a tensor, its index and their number, before it goes into the .data file."""


def ir_dtype(name: str) -> ir.DataType:
    """onnx_ir's dtype for a numpy dtype name."""
    return ir.DataType[{"float32": "FLOAT"}.get(name, name.upper())]


class GraphBuilder:
    """Collects the nodes and initializers of one graph.

    Small constants are shared by value. Weights are `LazyTensor`s: they are read, converted and transposed one at a
    time while the file is written, so memory holds one tensor, not the model.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._scope: list[str] = []
        self._names: dict[str, int] = {}

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes made inside, so that engine layer profiles read like the model."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def input(self, spec: TensorSpec) -> ir.Value:
        """Declare a graph input."""
        value = _typed(spec)
        self._inputs.append(value)
        return value

    def const(self, value: Any, dtype: str, name: str | None = None) -> ir.Value:
        """A small constant; equal ones become one initializer."""
        array = np.asarray(value, dtype=ir_dtype(dtype).numpy())
        key = name or f"const.{dtype}.{'x'.join(map(str, array.shape)) or 'scalar'}.{_digest(array)}"
        if key not in self._initializers:
            self._add_initializer(key, ir.tensor(array, name=key))
        return self._initializers[key]

    def weight(self, weights: Weights, name: str, precision: str) -> ir.Value:
        """A checkpoint tensor in `precision`, loaded when the file is written."""
        return self.computed_weight(name, expected_tensors(weights.config)[name], precision, lambda: weights.load(name))

    def computed_weight(
        self, name: str, shape: tuple[int, ...], precision: str, load: Callable[[], np.ndarray[Any, Any]]
    ) -> ir.Value:
        """An initializer whose values `load` returns when the file is written; converted to `precision` then.

        Raises:
            ValueError: `name` is one of another shape or precision already.
        """
        dtype = ir_dtype(NUMPY_DTYPE[precision])

        def convert() -> ir.Tensor[Any]:
            array = narrowed(name, load(), dtype.numpy(), precision)
            return ir.Tensor(np.ascontiguousarray(array), name=name)

        return self.lazy(name, dtype, shape, convert)

    def lazy(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], ir.TensorProtocol]
    ) -> ir.Value:
        """An initializer that `make` returns when the file is written.

        Raises:
            ValueError: `name` is one of another shape or dtype already.
        """
        if name in self._initializers:
            known = self._initializers[name]
            if known.dtype != dtype or known.shape is None or known.shape.numpy() != shape:
                raise ValueError(f"{name} must be one weight, got {known.dtype}{known.shape} and {dtype}{list(shape)}.")
        else:
            self._add_initializer(name, ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=name))
        return self._initializers[name]

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output."""
        return self.ops(op_type, *inputs, domain=domain, outputs=1, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """One node with several outputs."""
        name = self._unique("/".join([*self._scope, op_type]))
        node = ir.Node(
            domain,
            op_type,
            inputs=inputs,
            attributes=[
                a if isinstance(a, ir.Attr) else ir.convenience.convert_attribute(k, a) for k, a in attributes.items()
            ],
            num_outputs=outputs,
            name=name,
        )
        for i, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else f"{name}.{i}"
        self._nodes.append(node)
        return node.outputs

    def cast(self, x: ir.Value, has: str, wanted: str) -> ir.Value:
        """x, of numpy dtype `has`, as `wanted`: itself where they are the same."""
        return x if has == wanted else self.op("Cast", x, to=ir_dtype(wanted))

    def graph(self, outputs: Mapping[str, ir.Value]) -> ir.Graph:
        """Close the graph; output names are the given ones."""
        for name, value in outputs.items():
            value.name = name
        return ir.Graph(
            self._inputs,
            list(outputs.values()),
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET},
            name=self._name,
        )

    def model(
        self,
        contract: GraphContract,
        outputs: Mapping[str, ir.Value],
        metadata: Mapping[str, str],
        functions: Sequence[ir.Function] = (),
    ) -> ir.Model:
        """Close the graph and type its outputs as the contract says."""
        for spec in contract.outputs:
            typed = _typed(spec)
            outputs[spec.name].shape, outputs[spec.name].type = typed.shape, typed.type
        graph = self.graph({spec.name: outputs[spec.name] for spec in contract.outputs})
        graph.opset_imports.update({f.domain: 1 for f in functions})
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="flowcut-trt",
            functions=functions,
            metadata_props=dict(metadata),
        )

    def _add_initializer(self, name: str, tensor: ir.TensorProtocol) -> None:
        self._initializers[name] = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}.{count}" if count else name


def save(model: ir.Model, path: Path, progress: SaveProgress | None = None) -> None:
    """Write `path` and its weights to `path`.data, at most four tensors in memory at a time."""

    def report(tensor: ir.TensorProtocol, info: Any) -> None:
        if progress is not None:
            progress(tensor.name or "", info.index, info.total)

    # Drawing, rounding and packing takes longer than the disk does; a thread holds 0.6 GB of a 7B meanwhile.
    workers = min(_WRITERS, len(os.sched_getaffinity(0)))
    ir.save(model, path, external_data=path.name + ".data", callback=report, max_workers=workers)


def _typed(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, shape=ir.Shape(spec.dims), type=ir.TensorType(ir_dtype(spec.dtype)))


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:12]
