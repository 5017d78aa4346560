"""Loads and stores of the kernels, counted element by element in Triton's interpreter.

The counting runs in a process of its own (`main`), where Triton is imported to interpret and not to compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from engines.flow_score import launch
from engines.flow_score.interpreter import interpret
from engines.flow_score.run import score
from engines.flow_score.traffic import ITEMSIZE, traffic

pytest.importorskip("triton")


class Setup(NamedTuple):
    """One scoring step. With `shared` the source's value is read from v, else from a tensor of its own."""

    dtype: str = "fp16"
    shape: tuple[int, int, int, int] = (2, 3, 70, 40)  # images, heads, keys, head size
    group: int = 1
    token_major: bool = False
    masked: bool = False
    source_in_keys: int = 1
    shared: bool = False


SETUPS = {
    "head-major": Setup(),
    "token-major": Setup(token_major=True),
    "heads and scores in several blocks": Setup("fp32", (1, 18, 134, 32)),
    "grouped": Setup(group=3, source_in_keys=0),
    "masked": Setup(masked=True),
    "masked, bf16": Setup("bf16", (1, 17, 70, 32), masked=True),
    "masked and grouped": Setup(shape=(1, 9, 65, 32), group=2, masked=True, source_in_keys=0),
    "source in v": Setup(shared=True),
}
Counts = dict[str, dict[str, Any]]
"""Loads and stores of each element of a tensor, in memory's order: counts[kernel][tensor]["loads"]."""


class Counter:
    """A Launch that notes the address of every element that a kernel loads or stores."""

    def __init__(self) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.counts: dict[str, Counts] = {}
        self._addresses: dict[str, list[np.ndarray]] = {"loads": [], "stores": []}
        for kind, name in (("loads", "create_masked_load"), ("stores", "create_masked_store")):
            setattr(InterpreterBuilder, name, self._noting(kind, getattr(InterpreterBuilder, name)))

    def _noting(self, kind: str, access: Any) -> Any:
        def noting(builder: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[0] if kind == "loads" else rest[1]
            self._addresses[kind].append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
            return access(builder, pointers, *rest)

        return noting

    def __call__(
        self, variant: launch.Variant, grid: Any, inputs: Sequence[Any], integers: Any, outputs: Sequence[Any]
    ) -> None:
        for addresses in self._addresses.values():
            addresses.clear()
        interpret(variant, grid, inputs, integers, outputs)
        names = [*launch.INPUTS[variant.kernel], *launch.OUTPUTS[variant.kernel]]
        tensors = list(zip(names, [*inputs, *outputs], strict=True))
        accessed = {kind: np.concatenate(addresses).astype(np.int64) for kind, addresses in self._addresses.items()}
        for addresses in accessed.values():
            ranges = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for _, x in tensors]
            known = np.any([(start <= addresses) & (addresses < end) for start, end in ranges], axis=0)
            assert known.all(), f"{variant.kernel} accessed {(~known).sum()} elements outside of its tensors"
        self.counts[variant.kernel] = {
            name: {kind: _per_element(x, addresses) for kind, addresses in accessed.items()} for name, x in tensors
        }


def _per_element(tensor: Any, addresses: np.ndarray) -> list[int]:
    elements = (addresses - tensor.data_ptr()) // tensor.element_size()
    elements = elements[(elements >= 0) & (elements < tensor.numel())]
    return np.bincount(elements, minlength=tensor.numel()).tolist()


def count(counter: Counter, setup: Setup) -> dict[str, Counts]:
    """The accesses of one scoring step with all its parts."""
    import torch

    batch, heads, keys, size = setup.shape
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[setup.dtype]
    random = partial(torch.randn, dtype=dtype)
    k, v = random(setup.shape), random(setup.shape)
    q, source = random(batch, heads, setup.group, size), random(batch, heads, 1, size)
    if setup.token_major:
        k, v, q, source = (x.transpose(1, 2).contiguous() for x in (k, v, q, source))
    scored = keys - setup.source_in_keys
    score(
        counter,
        *(q, v if setup.shared else source, k, v),
        logit_scale=size**-0.5,
        history=0.5,
        running=torch.rand(batch, scored),
        source_in_keys=setup.source_in_keys,
        key_valid=torch.ones(batch, keys, dtype=torch.bool) if setup.masked else None,
        group=setup.group,
        token_major=setup.token_major,
    )
    return counter.counts


def main() -> None:
    counter = Counter()
    for setup in SETUPS.values():
        counter.counts.clear()
        print(json.dumps(count(counter, setup)))


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, Counts]]:
    """What `main` counted, by setup."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(SETUPS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(params=SETUPS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_each_element_of_k_and_v_is_loaded_once(name: str, counted: dict[str, dict[str, Counts]]) -> None:
    setup, counts = SETUPS[name], counted[name][launch.LOGITS]
    v = np.array(counts["v"]["loads"]).reshape(setup.shape)
    if setup.shared:  # the source row aside
        assert (v[:, :, 0] > 1).all()
        v = v[:, :, 1:]
    assert set(counts["k"]["loads"]) == {1}
    assert set(v.flat) == {1}


def test_the_second_kernel_reads_neither_k_nor_v(name: str, counted: dict[str, dict[str, Counts]]) -> None:
    """It is given neither, and accesses nothing but what it is given, as `main` checks."""
    combine = launch.COMBINE_MASKED if SETUPS[name].masked else launch.COMBINE
    assert counted[name].keys() == {launch.LOGITS, combine}
    assert not {"q", "v_source", "k", "v"} & counted[name][combine].keys()


def test_each_element_of_every_output_is_stored_once_and_no_input_is(
    name: str, counted: dict[str, dict[str, Counts]]
) -> None:
    for kernel, tensors in counted[name].items():
        for tensor, counts in tensors.items():
            assert set(counts["stores"]) == ({1} if tensor in launch.OUTPUTS[kernel] else {0}), tensor
            assert tensor not in launch.OUTPUTS[kernel] or set(counts["loads"]) == {0}, tensor  # they hold anything


def test_all_bytes_are_those_of_the_traffic_table(name: str, counted: dict[str, dict[str, Counts]]) -> None:
    setup = SETUPS[name]
    (batch, heads, keys, size), itemsize = setup.shape, ITEMSIZE[setup.dtype]
    first, second = counted[name].values()
    call = launch.Call(batch, heads, keys, setup.group)
    expected = traffic(call, setup.dtype, size, setup.masked, setup.source_in_keys)

    def elements(counts: Counts, *tensors: str, kind: str = "loads") -> int:
        return sum(sum(counts[tensor][kind]) for tensor in tensors)

    source = 0 if setup.shared else elements(first, "v_source")
    kv, query = elements(first, "k", "v"), elements(first, "q")
    assert (kv + source + query) * itemsize == expected.kv_bytes + expected.source_bytes
    if not setup.shared:
        assert kv * itemsize == expected.kv_bytes
    assert elements(first, "logits", kind="stores") * 4 == expected.logits_written
    assert elements(second, "logits") * 4 == expected.logits_read
    floats = elements(first, "strength", kind="stores") + elements(second, "strength", "running")
    floats += sum(elements(second, tensor, kind="stores") for tensor in second)
    mask_bytes = elements(second, "key_valid") if setup.masked else 0
    assert floats * 4 + mask_bytes == expected.other_bytes


if __name__ == "__main__":
    main()
