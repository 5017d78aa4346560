"""The one optimization profile of an engine, and the check that the parsed network is the graph of the contract."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flowcut.contract import GraphContract, TensorSpec
from flowcut.errors import EngineError

Shape = tuple[int, ...]

# TensorRT's data types by numpy's names; trt.nptype knows no bfloat16.
NUMPY_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def shape_ranges(contract: GraphContract) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Least, typical and greatest shape of every input, by name; all three are equal for a fixed shape."""
    least = {name: r.min for name, r in contract.ranges.items()}
    typical = {name: r.opt for name, r in contract.ranges.items()}
    greatest = {name: r.max for name, r in contract.ranges.items()}
    return {spec.name: (spec.shape(least), spec.shape(typical), spec.shape(greatest)) for spec in contract.inputs}


def add_profile(trt: Any, builder: Any, config: Any, network: Any, contract: GraphContract) -> None:
    """Check the network against the contract and give `config` one profile over the contract's ranges.

    One profile, because a second one doubled the fp16 weights in the engine.

    Raises:
        EngineError: another name, type or shape than the contract's, or TensorRT refused the profile.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    check_tensors(f"{contract.name} inputs", contract.inputs, _specs(inputs))
    check_tensors(f"{contract.name} outputs", contract.outputs, _specs(outputs))
    profile = builder.create_optimization_profile()
    for name, shapes in shape_ranges(contract).items():
        profile.set_shape(name, *shapes)
    if not profile or config.add_optimization_profile(profile) < 0:
        raise EngineError(f"{contract.name}: TensorRT refused the optimization profile {shape_ranges(contract)}.")


def check_tensors(what: str, expected: Iterable[TensorSpec], got: Iterable[TensorSpec]) -> None:
    """Compare tensors by name. A str dimension of the contract is a dynamic one (-1) of the network.

    An output dimension that TensorRT could not infer (-1) may stand for any number.
    """
    wanted, found = {s.name: s for s in expected}, {s.name: s for s in got}
    changed = [n for n in wanted.keys() & found.keys() if not _agree(wanted[n], found[n], what.endswith("outputs"))]
    differing = sorted({*changed, *(wanted.keys() ^ found.keys())})
    if not differing:
        return
    difference = {
        "missing": [n for n in differing if n not in found],
        "unexpected": [n for n in differing if n not in wanted],
        "changed": sorted(changed),
    }
    summary = "; ".join(f"{kind} {', '.join(names)}" for kind, names in difference.items() if names)
    raise EngineError(
        f"{what} must be the contract's: expected {_text(wanted, differing)}; got {_text(found, differing)}; "
        f"difference: {summary}. Export the graph again."
    )


def _agree(wanted: TensorSpec, found: TensorSpec, inferred: bool) -> bool:
    if wanted.dtype != found.dtype or len(wanted.dims) != len(found.dims):
        return False
    pairs = zip(wanted.dims, found.dims, strict=True)
    return all(g == (-1 if isinstance(w, str) else w) or (inferred and g == -1) for w, g in pairs)


def _specs(tensors: Iterable[Any]) -> list[TensorSpec]:
    return [TensorSpec(t.name, NUMPY_NAMES.get(t.dtype.name, t.dtype.name), tuple(t.shape)) for t in tensors]


def _text(specs: dict[str, TensorSpec], names: Iterable[str]) -> str:
    known = [specs[n] for n in names if n in specs]
    return ", ".join(f"{s.name} {s.dtype}[{', '.join(map(str, s.dims))}]" for s in known) or "nothing"
