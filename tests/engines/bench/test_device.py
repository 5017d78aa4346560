"""What is recorded of a machine, and how a GPU is waited for (a stand-in for libcuda: nothing here has a GPU)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engines.backends import gpu_present
from engines.bench import device
from engines.bench.counting import device_roof
from engines.bench.cpu_roof import TRIES, CpuRoof, measure_roof
from engines.bench.device import Gpu, clocks, describe, memory_bytes, nvidia_smi, other_work, processor, waiter
from flowcut.errors import EngineError

GRAPHS = {"vision": "fp32", "prefill": "fp16", "decode": "fp16"}
CPUINFO = "processor\t: 0\nmodel name\t: Some CPU\ncpu MHz\t\t: 2449.6\n\nmodel name\t: Some CPU\ncpu MHz\t\t: 3100.2\n"


class FakeCuda:
    """codes: what cuCtxSynchronize returns, call after call."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.calls = list(codes), list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*_: object) -> int:
            self.calls.append(name)
            return self.codes.pop(0) if name == "cuCtxSynchronize" else 0

        return call


def test_a_gpu_is_waited_for() -> None:
    cuda = FakeCuda(0)
    Gpu(cuda).synchronize()
    assert cuda.calls == ["cuCtxSynchronize"]


def test_a_thread_that_has_no_context_takes_the_primary_one() -> None:
    cuda = FakeCuda(201, 0)
    Gpu(cuda).synchronize()
    assert cuda.calls == ["cuCtxSynchronize", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuCtxSynchronize"]


def test_a_gpu_that_failed_is_no_fast_gpu() -> None:
    with pytest.raises(EngineError, match="cuCtxSynchronize must return 0, got 700"):
        Gpu(FakeCuda(700)).synchronize()


def test_a_cpu_is_not_waited_for() -> None:
    assert waiter(on_gpu=False)() is None


@pytest.mark.skipif(gpu_present(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(EngineError, match="must be a CUDA GPU"):
        waiter(on_gpu=True)


def test_processor_clocks_and_memory_are_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    (tmp_path / "meminfo").write_text("MemTotal:       24690000 kB\n")
    monkeypatch.setattr(device, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "meminfo")
    assert processor() == "Some CPU"
    assert clocks() == [2450, 3100]
    assert memory_bytes() == 24690000 * 1024


def test_a_system_that_does_not_tell_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "none")
    found = describe(on_gpu=False, threads=1)
    assert (found["device"], found["clocks_mhz"], found["memory_bytes"]) == ("unknown", None, None)
    assert (found["kind"], found["threads"]) == ("cpu", 1)
    json.dumps(found)


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.1, 1980, 2619, 1980, 123.4, 41'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert nvidia_smi()["name"] == "NVIDIA H100 80GB HBM3"
    assert nvidia_smi()["clocks.sm"] == "1980"
    assert describe(on_gpu=True, threads=None)["device"] == "NVIDIA H100 80GB HBM3"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert nvidia_smi() == {}


def test_the_roof_is_work_over_the_shortest_time() -> None:
    """A clock that goes a second a look, but two for the first product, copy and read that count."""
    each = ([t, t + 2, *range(t + 10, t + 10 + 2 * TRIES - 2)] for t in (0, 100, 200))
    ticks = iter([tick for some in each for tick in some])
    found = measure_roof(1, lambda: next(ticks))
    assert found == CpuRoof(2 * 512 * 2048 * 4096, 2 * 2**28)


def test_a_faster_read_is_the_memorys_roof() -> None:
    """A second for each product and copy, a hundredth for each read."""
    ticks = iter([*range(4 * TRIES), *(1000 + i / 100 for i in range(2 * TRIES))])
    assert measure_roof(1, lambda: next(ticks)).bytes_per_s == pytest.approx(2**28 * 100)


def test_float16_that_a_cpu_widens_is_read_as_float32() -> None:
    found, _ = device_roof({"kind": "cpu", "device": "Some CPU", "threads": 1}, {**GRAPHS, "vision": "int8"})
    assert found is not None
    assert found.roofs["prefill"].bytes_per_s == found.roofs["decode"].bytes_per_s == found.roof.bytes_per_s / 2
    assert found.roofs["vision"].bytes_per_s == found.roof.bytes_per_s


def test_a_gpu_without_a_precision_has_no_roof_and_it_is_said() -> None:
    found, (problem,) = device_roof({"kind": "gpu", "device": "NVIDIA A100-SXM4-80GB"}, {**GRAPHS, "decode": "fp8"})
    assert found is None
    assert "fp8" in problem


def test_other_processes_are_told_from_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, own, now = tmp_path / "stat", [10.0], [100.0]
    tick = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(device, "_STAT", stat)
    monkeypatch.setattr(device, "_own_seconds", lambda: own[0])
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    stat.write_text(f"cpu  {50 * tick} 0 {10 * tick} 900 5 0 0 0 0 0\ncpu0 1 1 1\n")
    with other_work() as found:
        own[0], now[0] = 25.0, 110.0
        stat.write_text(f"cpu  {68 * tick} 0 {12 * tick} 910 5 0 0 0 0 0\ncpu0 1 1 1\n")
    assert found == [pytest.approx((20 - 15) / 10)]


def test_a_system_without_counters_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_STAT", tmp_path / "none")
    with other_work() as found:
        pass
    assert found == []


def test_the_better_of_two_measurements() -> None:
    assert CpuRoof(2, 3).best(CpuRoof(1, 5)) == CpuRoof(2, 5)


def test_a_gpus_roof_is_the_published_one() -> None:
    found, problems = device_roof({"kind": "gpu", "device": "NVIDIA H100 80GB HBM3"}, GRAPHS)
    assert found is not None
    assert problems == []
    assert found.roof.flops_per_s == pytest.approx(989.4e12)
    assert found.roofs["vision"].flops_per_s == pytest.approx(66.9e12)
    assert found.again(GRAPHS) is found


PRODUCTS = ["NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "Orin (nvgpu)", "NVIDIA H200"]
OTHERS = ["NVIDIA T4", "NVIDIA L40", "unknown", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-PCIE-40GB"]
OTHERS += ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "Orin NX"]


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_driver_names_the_products(name: str) -> None:
    assert device_roof({"kind": "gpu", "device": name}, GRAPHS)[0] is not None


@pytest.mark.parametrize("name", OTHERS)
def test_an_unknown_gpu_has_no_roof_and_it_is_said(name: str) -> None:
    found, (problem,) = device_roof({"kind": "gpu", "device": name}, GRAPHS)
    assert found is None
    assert name in problem
