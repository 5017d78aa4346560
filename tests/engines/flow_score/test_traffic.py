"""Bytes of a scoring step: the arithmetic against loads and stores counted in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.flow_score.launch import Call
from engines.flow_score.traffic import ITEMSIZE, Traffic, traffic
from flowcut.deps import available
from flowcut.errors import EngineError

ROOT = Path(__file__).parents[3]
# A process of its own: Triton decides at import whether functions are interpreted.
COUNT = """
import json, sys
import numpy as np, torch
from triton.runtime.interpreter import InterpreterBuilder
from engines.flow_score import kernel, launch
from engines.flow_score.traffic import programs_of

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
tensors, moved, addresses = {}, {}, {}

def count(direction, pointers, mask):
    touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
    for name, t in tensors.items():
        inside = touched[(touched >= t.data_ptr()) & (touched < t.data_ptr() + t.nbytes)]
        key = f"{name} {direction}"
        moved[key] = moved.get(key, 0) + inside.size * t.element_size()
        addresses.setdefault(key, []).append(inside)

def counted(method, direction, mask_at):
    original = getattr(InterpreterBuilder, method)
    def call(self, *arguments):
        count(direction, arguments[0], arguments[mask_at])
        return original(self, *arguments)
    setattr(InterpreterBuilder, method, call)

counted("create_masked_load", "loads", 1)
counted("create_masked_store", "stores", 2)

def step(batch, heads, keys, group, dtype, head_size, masked, source_in_keys):
    for kept in (tensors, moved, addresses):
        kept.clear()
    call = launch.Call(batch, heads, keys, group)
    first, second = programs_of(call, source_in_keys)
    rows, scored, kind = call.query_heads + heads, keys - source_in_keys, DTYPES[dtype]
    shapes = {"q": (batch, call.query_heads, 1, head_size), "v_source": (batch, heads, 1, head_size)}
    shapes |= dict.fromkeys(("k", "v"), (batch, heads, keys, head_size))
    tensors.update({name: torch.ones(shape, dtype=kind) for name, shape in shapes.items()})
    shapes = {"logits": (batch, rows, keys), "strength": (batch, keys), "entropy_ratio": (batch, second)}
    shapes |= dict.fromkeys(("running", "running_out"), (batch, scored))
    tensors.update({name: torch.ones(shape) for name, shape in shapes.items()})
    tensors["key_valid"] = torch.ones(batch, keys, dtype=torch.bool)
    combine = launch.COMBINE_MASKED if masked else launch.COMBINE
    run(launch.Variant(launch.LOGITS, dtype, head_size), (first, batch), call.logits_integers(0.125, 1.0))
    run(launch.Variant(combine), (second, batch), call.combine_integers(0.5, source_in_keys, 1, 1))
    key_loads = np.concatenate(addresses["k loads"] + addresses["v loads"])
    return {"moved": moved, "once": len(np.unique(key_loads)) == len(key_loads)}

def run(variant, grid, integers):
    inputs, outputs = ([tensors[n] for n in names[variant.kernel]] for names in (launch.INPUTS, launch.OUTPUTS))
    getattr(kernel, variant.kernel)[grid](*inputs, *integers, *outputs, **variant.constants)

for case in json.loads(sys.argv[1]):
    print(json.dumps(step(*case)))
"""
CASES = {
    "plain": (2, 3, 13, 1, "fp16", 32, False, 1),
    "several tiles": (1, 18, 134, 1, "fp32", 40, False, 1),
    "masked": (1, 17, 70, 1, "bf16", 32, True, 1),
    "grouped, source apart": (1, 3, 66, 2, "fp16", 48, False, 0),
    "grouped and masked": (1, 9, 65, 2, "fp16", 32, True, 0),
}


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, Any]]:
    """By case: bytes by tensor and direction, and whether no element of K or V was loaded twice."""
    if not (available("triton") and available("torch")):
        pytest.skip("needs the kernels and torch extras")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COUNT, json.dumps(list(CASES.values()))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_the_kernels_move(counts: dict[str, dict[str, Any]], name: str) -> None:
    batch, heads, keys, group, dtype, head_size, masked, source_in_keys = CASES[name]
    expected = traffic(Call(batch, heads, keys, group), dtype, head_size, masked, source_in_keys)
    moved = dict(counts[name]["moved"])
    assert counts[name]["once"]
    assert moved.pop("k loads") + moved.pop("v loads") == expected.kv_bytes
    assert moved.pop("q loads") + moved.pop("v_source loads") == expected.source_bytes
    assert moved.pop("logits stores") == expected.logits_written
    assert moved.pop("logits loads") == expected.logits_read
    assert sum(moved.values()) == expected.other_bytes > 0


def clip(batch: int = 1, dtype: str = "fp16", masked: bool = False) -> Traffic:
    return traffic(Call(batch, 16, 577), dtype, 64, masked)


def test_keys_and_values_of_clip_are_read_once() -> None:
    assert clip().kv_bytes == 2 * 577 * 1024 * 2
    assert clip(dtype="fp32").kv_bytes == clip(dtype="bf16").kv_bytes * 2 == 2 * clip().kv_bytes


@pytest.mark.parametrize("masked", [False, True])
def test_every_byte_count_grows_with_the_batch(masked: bool) -> None:
    one, eight = vars(clip(masked=masked)), vars(clip(8, masked=masked))
    assert eight == {name: 8 * count for name, count in one.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_device_memory_moves_no_more_than_the_kernels_ask_for(dtype: str, masked: bool) -> None:
    found = clip(dtype=dtype, masked=masked)
    assert found.kv_bytes < found.device_bytes < found.total_bytes
    assert found.combine_device_bytes < found.logits_read + found.other_bytes


def test_a_head_size_without_a_kernel_is_refused() -> None:
    with pytest.raises(EngineError, match="head_size must be"):
        traffic(Call(1, 4, 17), "fp16", 20)
