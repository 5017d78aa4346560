"""The check that `flowcut plugin` makes: it passes where the kernels are right, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from engines.flow_score.cache import SHIPPED_HEAD_SIZES
from engines.flow_score.check import CASES, KernelCheck, check_kernels
from engines.flow_score.launch import COMBINE, COMBINE_MASKED, DTYPES, LOGITS, Variant
from engines.flow_score.run import Launch, interpreter

torch = pytest.importorskip("torch")
pytest.importorskip("triton")


class Remembering:
    """A Launch that answers a second round of the same calls from memory, changed by `change`."""

    def __init__(self) -> None:
        self.launch = interpreter()
        self.outputs: list[list[Any]] = []

    def __call__(self, variant: Variant, grid: Any, inputs: Any, integers: Any, outputs: Sequence[Any]) -> None:
        self.launch(variant, grid, inputs, integers, outputs)
        self.outputs.append([x.clone() for x in outputs])

    def replay(self, change: Callable[[Variant, Sequence[Any]], None]) -> Launch:
        remembered = iter(self.outputs)

        def launch(variant: Variant, grid: Any, inputs: Any, integers: Any, outputs: Sequence[Any]) -> None:
            for output, before in zip(outputs, next(remembered), strict=True):
                output.copy_(before)
            change(variant, outputs)

        return launch


@pytest.fixture(scope="module")
def remembering() -> Remembering:
    remembering = Remembering()
    remembering.checks = check_kernels(remembering)  # type: ignore[attr-defined]
    return remembering


def test_the_interpreter_passes_every_case(remembering: Remembering) -> None:
    checks: list[KernelCheck] = remembering.checks  # type: ignore[attr-defined]
    assert [check.name for check in checks if not check.ok] == []
    assert len({check.name for check in checks}) == len(checks) == len(CASES)
    bounded = [check for check in checks if check.allowed_error <= 0.01]
    assert len(bounded) >= len(checks) - 1
    assert all(0 <= check.relative_error <= check.allowed_error for check in bounded)


def test_the_cases_cover_types_head_sizes_and_forms(remembering: Remembering) -> None:
    checks: list[KernelCheck] = remembering.checks  # type: ignore[attr-defined]
    assert {check.dtype for check in checks} == set(DTYPES)
    assert {check.shape[3] for check in checks} >= {32, 64, 72, 128}
    assert any(check.shape[1] > 16 for check in checks)
    assert {"masked", "grouped", "token major", "history", "one score"} <= {check.name for check in checks}


@pytest.mark.parametrize("wrong", [1.01, -1.0, math.nan])
@pytest.mark.parametrize("output", [0, 1], ids=["scores", "entropy"])
def test_a_wrong_number_fails(remembering: Remembering, wrong: float, output: int) -> None:
    def change(variant: Variant, outputs: Sequence[Any]) -> None:
        if variant.kernel != LOGITS and output < len(outputs):
            outputs[output].view(-1)[outputs[output].argmax()] *= wrong

    checks = check_kernels(remembering.replay(change))
    failed = {check.name for check in checks if not check.ok}
    bounded = {check.name for check in checks if check.allowed_error <= 0.01}
    bounded_or_all = bounded if wrong == 1.01 else {check.name for check in checks}
    assert failed == (bounded_or_all if output == 0 else {"masked"})


def test_a_score_that_was_not_written_fails(remembering: Remembering) -> None:
    def change(variant: Variant, outputs: Sequence[Any]) -> None:
        if variant.kernel in (COMBINE, COMBINE_MASKED):
            outputs[0].fill_(math.nan)

    assert not any(check.ok for check in check_kernels(remembering.replay(change)))


@pytest.mark.parametrize(("triton", "sizes"), [(True, {32, 64, 72, 128}), (False, set(SHIPPED_HEAD_SIZES))])
def test_without_triton_a_gpu_is_checked_with_what_is_shipped(
    triton: bool, sizes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def launch(variant: Variant, grid: Any, inputs: Any, integers: Any, outputs: Sequence[Any]) -> None:
        seen.add(variant.head_size)

    monkeypatch.setattr("engines.flow_score.check.available", lambda module: triton)
    check_kernels(launch, "cpu:0")  # any name but the interpreter's
    assert seen - {0} == sizes
