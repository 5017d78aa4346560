"""NVIDIA's own `tensorrt.plugin`, run without TensorRT's library.

Its Python code comes from the wheel tensorrt-cu13-bindings, whose shared object is never loaded (it needs libnvinfer,
which is not on the package index). The classes it builds on are TensorRT-RTX's, save the few that TensorRT-RTX does
not have or that cannot be made in Python: STAND_INS names them all.
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

DISTRIBUTION = "tensorrt-cu13-bindings"
PACKAGES = ("tensorrt", "tensorrt_bindings")
NAMESPACE = "flowcut"
Size = int | str
"""A dimension that is fixed when the engine is built, or the name of one that is not."""


@dataclass(frozen=True)
class Dimension:
    """IDimensionExpr: exact arithmetic over named sizes. `value` of sizes is the dimension's."""

    value: Callable[[Mapping[str, int]], int]
    constant: bool = False

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value({})


def named(name: str) -> Dimension:
    """A dimension known only when the engine runs."""
    return Dimension(lambda sizes: sizes[name])


def fixed(value: int) -> Dimension:
    """A dimension known when the engine is built."""
    return Dimension(lambda sizes: value, constant=True)


class Expressions:
    """IExprBuilder over Dimension."""

    def constant(self, value: int) -> Dimension:
        assert 0 <= value < 2**63, "TensorRT refuses negative constants"
        return fixed(value)

    def operation(self, op: Any, first: Dimension, second: Dimension) -> Dimension:
        apply = OPERATIONS[op.name]
        both = first.constant and second.constant
        return Dimension(lambda sizes: apply(first.value(sizes), second.value(sizes)), both)


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
}


class DimsExprs(list[Any]):
    """DimsExprs: so many dimensions, to be filled in."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class SymExpr:
    """ISymExpr: an argument of a kernel."""

    type: Any = None
    dtype: Any = None
    expr: Any = None


QuickPluginCreationRequest = enum.IntEnum(
    "QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT", start=0
)


class Registry:
    """IPluginRegistry: TensorRT-RTX's would keep the creators for the rest of the process."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        key = (creator.name, creator.plugin_version, namespace)
        assert creator.plugin_namespace == namespace
        return self.creators.setdefault(key, creator) is creator

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))


def stand_ins(rtx: Any) -> dict[str, Any]:
    """What takes the place of classes of TensorRT that TensorRT-RTX lacks or that Python cannot make."""
    registry = Registry()
    return {
        "ISymExpr": SymExpr,
        "IPluginV3QuickAOTBuild": type("IPluginV3QuickAOTBuild", (rtx.IPluginV3QuickBuild,), {}),
        "QuickPluginCreationRequest": QuickPluginCreationRequest,
        "IDimensionExpr": Dimension,
        "DimsExprs": DimsExprs,
        "get_plugin_registry": lambda: registry,
    }


@contextmanager
def tensorrt() -> Iterator[Any]:
    """`import tensorrt` and `import tensorrt.plugin` for as long as it lasts; yields the former."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13, which the dev extra installs")
    try:
        wheel = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs {DISTRIBUTION}, which the dev extra installs")
    before = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] in PACKAGES}
    trt, bindings, plugin = (ModuleType(name) for name in (*PACKAGES, "tensorrt.plugin"))
    vars(trt).update({name: getattr(rtx, name) for name in dir(rtx) if not name.startswith("__")})
    vars(trt).update(stand_ins(rtx), __version__=wheel.version, __path__=[], plugin=plugin)
    bindings.__path__ = [
        str(wheel.locate_file("tensorrt_bindings"))
    ]  # without running its __init__, which needs the .so
    sys.modules.update({"tensorrt": trt, "tensorrt_bindings": bindings, "tensorrt.plugin": plugin})
    try:
        code = importlib.import_module("tensorrt_bindings.plugin")
        # The wheel `tensorrt` offers what its __all__ names, and no more.
        vars(plugin).update({name: getattr(code, name) for name in code.__all__})
        yield trt
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        sys.modules.update(before)


@dataclass(frozen=True)
class Step:
    """One node of a plugin: its attributes, and its inputs' types (TensorRT's names) and shapes."""

    op: str
    attributes: dict[str, Any]
    types: tuple[str, ...]
    shapes: tuple[tuple[Size, ...], ...]
    format: str = "LINEAR"


@dataclass(frozen=True)
class Embedded:
    """What TensorRT learns of a plugin and what it would put into the engine, once sizes are known."""

    types: list[Any]
    shapes: list[list[int]]
    combinations: list[list[tuple[str, str]]]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    integers: list[int]
    entry: str
    ptx: str


def created(trt: Any, step: Step, request: str) -> Any:
    """The plugin object, as the parser asks for it: ONNX's floats and integers as float32 and int32 fields."""
    kinds = {float: (np.float32, trt.PluginFieldType.FLOAT32), int: (np.int32, trt.PluginFieldType.INT32)}
    fields = []
    for key, value in step.attributes.items():
        dtype, kind = kinds[type(value)]
        fields.append(trt.PluginField(key, np.array([value], dtype), kind))
    creator = trt.get_plugin_registry().get_creator(step.op, "1", NAMESPACE)
    phase, wanted = trt.TensorRTPhase.BUILD, getattr(trt.QuickPluginCreationRequest, request)
    return creator.create_plugin(step.op, NAMESPACE, trt.PluginFieldCollection(fields), phase, wanted)


def embedded(trt: Any, step: Step, sizes: Mapping[str, int]) -> Embedded:
    """Take the plugin through what TensorRT asks during a build, in TensorRT's order."""
    made = created(trt, step, "STRICT_AOT")
    kinds = [getattr(trt.DataType, name) for name in step.types]
    types = made.get_output_data_types(kinds, [len(shape) for shape in step.shapes])

    def expression(size: Size) -> Dimension:
        return fixed(size) if isinstance(size, int) else named(size)

    expressions = [[expression(size) for size in shape] for shape in step.shapes]
    shapes = made.get_output_shapes(expressions, [], Expressions())
    out = [tuple(d.get_constant_value() if d.is_constant() else "?" for d in shape) for shape in shapes]
    inputs = [description(trt, dims, kind, step.format) for dims, kind in zip(step.shapes, kinds, strict=True)]
    outputs = [description(trt, dims, kind, "LINEAR") for dims, kind in zip(out, types, strict=True)]
    count, every = len(inputs) + len(outputs), made.get_supported_format_combinations(inputs + outputs, len(inputs))
    flat = [(each.type.name, each.format.name) for each in every]
    combinations = [flat[i : i + count] for i in range(0, len(flat), count)]
    made.configure_plugin(inputs, outputs)
    if [(each.desc.type.name, each.desc.format.name) for each in inputs + outputs] in combinations:
        assert made.get_valid_tactics() == []  # the default alone
    made.set_tactic(0)
    parameters, arguments = SimpleNamespace(), Arguments()
    made.get_launch_params(expressions, inputs + outputs, len(inputs), parameters, arguments, Expressions())
    entry, ptx = made.get_kernel([d.desc for d in inputs], [d.desc for d in outputs])

    def values(*names: str) -> tuple[int, int, int]:
        x, y, z = (getattr(parameters, name).expr.value(sizes) for name in names)
        return x, y, z

    return Embedded(
        types=[kind.name for kind in types],
        shapes=[[d.value(sizes) for d in shape] for shape in shapes],
        combinations=combinations,
        grid=values("grid_x", "grid_y", "grid_z"),
        block=values("block_x", "block_y", "block_z"),
        shared_bytes=parameters.shared_mem.expr.value(sizes),
        integers=[each.expr.value(sizes) for each in arguments.given],
        entry=entry,
        ptx=ptx.decode(),
    )


def description(trt: Any, dims: tuple[Size, ...], kind: Any, layout: str) -> Any:
    desc = trt.DynamicPluginTensorDesc()
    desc.desc.dims = [d if isinstance(d, int) else -1 for d in dims]
    desc.desc.type, desc.desc.format = kind, getattr(trt.TensorFormat, layout)
    return desc


class Arguments:
    """ISymExprs: extra arguments of a kernel, int32 each."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "nbSymExprs":
            self.given = [None] * value

    def __setitem__(self, index: int, argument: Any) -> None:
        assert (argument.type.name, argument.dtype.name) == ("INT", "INT32")
        self.given[index] = argument
