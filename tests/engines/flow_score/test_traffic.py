"""Bytes of a scoring step, by arithmetic. test_traffic_counted.py holds them against the kernels' loads and stores."""

from __future__ import annotations

import pytest

from engines.flow_score.launch import Call
from engines.flow_score.traffic import ITEMSIZE, Traffic, traffic
from flowcut.errors import EngineError


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
