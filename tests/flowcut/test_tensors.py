"""Checks and copies of single tensors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from flowcut.errors import CheckpointError
from flowcut.tensors import check_finite, transposed


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_finite_tensors_pass(dtype: object) -> None:
    check_finite("w", np.array([[0, -1], [448, 2]], dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_first_value_that_is_not_finite_is_named_with_its_place(dtype: object) -> None:
    array = np.ones((3, 4), dtype)
    array[1, 2], array[2, 0] = np.nan, -np.inf
    with pytest.raises(CheckpointError, match=r"^w must be finite, got nan at \[1, 2\] and 2 such values in all\."):
        check_finite("w", array)


def test_what_a_precision_cannot_hold_is_blamed_on_it() -> None:
    with pytest.raises(CheckpointError, match=r"finite in fp16, got inf at \[0\].*Choose another precision"):
        check_finite("w", np.array([np.inf], np.float16), "fp16")


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (700, 3), (256, 256), (257, 5)])
def test_a_transposed_copy_is_contiguous_and_its_own(shape: tuple[int, int]) -> None:
    matrix = np.arange(shape[0] * shape[1], dtype=np.int16).reshape(shape)
    copy = transposed(matrix)
    assert copy.flags["C_CONTIGUOUS"]
    assert not np.shares_memory(copy, matrix)
    np.testing.assert_array_equal(copy, matrix.T)
