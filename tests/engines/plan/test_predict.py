"""Predicted times: what they are made of, and that they follow the figures they are made from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engines.plan.costs import Cost, NodeCost
from engines.plan.predict import KINDS, TOTAL, Machine, find_machines, shares, stage_times
from engines.plan.roof import Roof, gpu_roof
from engines.plan.settings import PlanSettings
from engines.plan.stages import STAGES
from engines.plan.subject import Row, find_subject
from engines.roofline import KNOWN, LAUNCH_US, find_gpu
from flowcut.errors import ConfigError


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Unpruned, and 16 of 144 patches."""
    found = find_subject(PlanSettings("llava-tiny"))
    return [found.row(budget) for budget in (found.baseline, *found.budgets())]


def test_low_adds_fused_launches_and_high_what_nothing_fused_costs() -> None:
    roof = Roof("r", 1e9, 1e6, "")
    nodes = (
        NodeCost("linear", 5_000_000, 5_000_000, weight_bytes=1000, activation_bytes=9000),  # 5 ms; alone 10 ms
        NodeCost("attention", 0, 0, state_bytes=500),  # writes the cache: 0.5 ms, fused into another
        NodeCost("rest", 1000, 1000, activation_bytes=2000),  # 0.001 ms; alone 2 ms
        NodeCost("rest", 0, 0, moves=False),
        NodeCost("scoring", 100_000, 100_000),  # 0.1 ms
    )
    times = stage_times(roof, Cost.of(nodes, scorings=1))
    assert times.roofline == pytest.approx(5 + 0.5 + 0.001 + 0.1)
    cheap, dear = (us / 1e3 for us in LAUNCH_US)
    assert times.low == pytest.approx(times.roofline + cheap * (1 + 2))
    assert times.high == pytest.approx(10 + 0.5 + 2 + 0.1 + 4 * dear)
    assert times.memory == pytest.approx(0.5)
    expected = {"linear": 5, "attention": 0.5, "scoring": 0.1, "rest": 0.001, "launches": 3 * cheap}
    assert times.kinds == pytest.approx(expected)


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.name)
def test_predictions_are_in_order_and_their_parts_add_up(rows: list[Row], gpu: object) -> None:
    (machine,) = find_machines([gpu.name], "fp16", "fp16")[0]  # type: ignore[attr-defined]
    for row in rows:
        times = machine.times(row)
        assert set(times) == {*STAGES, TOTAL}
        for stage in (*STAGES, TOTAL):
            assert 0 < times[stage].roofline < times[stage].low < times[stage].high
            assert sum(times[stage].kinds.values()) == pytest.approx(times[stage].low)
            assert 0 <= times[stage].memory <= times[stage].roofline * (1 + 1e-9)
        assert machine.total_ms(row.costs) == pytest.approx(times[TOTAL].roofline)
        found = shares(times)
        assert found["vision"] + found["prefill"] == pytest.approx(1)
        assert sum(found[kind] for kind in KINDS) == pytest.approx(1)


def test_more_arithmetic_and_more_memory_are_never_slower(rows: list[Row]) -> None:
    slow, fast = Roof("a", 1e12, 1e11, ""), Roof("b", 2e12, 3e11, "")
    for row in rows:
        for cost in row.costs.values():
            assert slow.bound_ms(cost) / 3 <= fast.bound_ms(cost) <= slow.bound_ms(cost) / 2


def test_roofs_are_those_of_each_graphs_precision() -> None:
    (machine,), left_out = find_machines(["H100"], "fp8", "fp16")
    assert machine.decoder.flops_per_s == 2 * machine.vision.flops_per_s
    assert machine.roof("vision") is machine.vision
    assert machine.roof("decode") is machine.roof("prefill") is machine.decoder
    assert left_out == []


def test_without_names_all_that_have_the_precision_are_predicted() -> None:
    machines, left_out = find_machines((), "fp16", "fp16")
    assert [machine.gpu for machine in machines] == list(KNOWN)
    assert left_out == []
    machines, left_out = find_machines((), "fp8", "fp16")
    assert [machine.gpu.name for machine in machines] == ["H100 SXM", "L40S", "RTX 4090", "RTX 5090", "H200 SXM"]
    assert [line.split(" is left out")[0] for line in left_out] == ["A100 SXM 80GB", "Jetson AGX Orin 64GB"]


def test_a_gpu_named_twice_is_predicted_once_and_one_without_the_precision_is_refused() -> None:
    machines, _ = find_machines(["h100", "H100 SXM", "a100"], "fp16", "fp16")
    assert [machine.gpu.name for machine in machines] == ["H100 SXM", "A100 SXM 80GB"]
    with pytest.raises(ConfigError, match="gpu must have fp8"):
        find_machines(["H100", "A100"], "fp16", "fp8")
    with pytest.raises(ConfigError, match="gpu must be one of"):
        find_machines(["V100"], "fp16", "fp16")


def test_weights_and_cache_fit_a_memory_or_not(rows: list[Row]) -> None:
    needed = rows[0].weight_bytes + rows[0].cache_bytes
    for size, fits in ((needed, True), (needed - 1, False), (None, None)):
        gpu = replace(find_gpu("H100"), memory_bytes=size)
        assert Machine(gpu, gpu_roof(gpu, "fp16"), gpu_roof(gpu, "fp16")).fits(rows[0]) is fits
