"""What is recorded of a machine, and how a GPU is waited for (a stand-in for libcuda: nothing here has a GPU)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.backends import gpu_present
from engines.bench import device
from engines.bench.counting import device_roof
from engines.bench.cpu_roof import TRIES, CpuRoof, measure_roof
from engines.bench.device import Gpu, clocks, describe, memory_bytes, nvidia_smi, processor, waiter
from flowcut.errors import EngineError

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
    """A clock that goes a second a look, but two for the first product and the first copy that count."""
    ticks = iter([0, 2, *range(10, 10 + 2 * TRIES - 2), 100, 102, *range(200, 200 + 2 * TRIES - 2)])
    found = measure_roof(1, lambda: next(ticks))
    assert found == CpuRoof(2 * 512 * 2048 * 4096, 2 * 2**28)


def test_the_better_of_two_measurements() -> None:
    assert CpuRoof(2, 3).best(CpuRoof(1, 5)) == CpuRoof(2, 5)


def test_a_gpus_roof_is_the_published_one() -> None:
    found, problems = device_roof({"kind": "gpu", "device": "NVIDIA H100 80GB HBM3"}, "fp16")
    assert found is not None
    assert problems == []
    assert found.roof.flops_per_s == pytest.approx(989.4e12)
    assert found.again() is found


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "Orin (nvgpu)", "NVIDIA H200"])
def test_a_driver_names_the_products(name: str) -> None:
    assert device_roof({"kind": "gpu", "device": name}, "fp16")[0] is not None


@pytest.mark.parametrize("name", ["NVIDIA T4", "NVIDIA L40", "unknown"])
def test_an_unknown_gpu_has_no_roof_and_it_is_said(name: str) -> None:
    found, (problem,) = device_roof({"kind": "gpu", "device": name}, "fp16")
    assert found is None
    assert name in problem
