"""Where a benchmark runs: how to wait for it, and what to record of it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from engines.backends import gpu_present
from flowcut.artifacts import installed_versions
from flowcut.errors import EngineError

_CPUINFO, _MEMINFO, _STAT = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/proc/stat")
_INVALID_CONTEXT = 201
_QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
"""Of nvidia-smi: MHz, watts, degrees Celsius."""


def waiter(on_gpu: bool) -> Callable[[], None]:
    """What returns when the device has nothing left to do. On the CPU that is at once: ONNX Runtime and PyTorch return
    when they are done.

    Raises:
        EngineError: a GPU that does not answer.
    """
    if not on_gpu:
        return _nothing
    if not gpu_present():
        raise EngineError("device must be a CUDA GPU to be waited for, got none. Use --backend ort.")
    return Gpu(ctypes.CDLL("libcuda.so.1")).synchronize


def _nothing() -> None:
    return


class Gpu:
    """The first GPU through its driver, whatever libraries compute on it: all of them use its primary context.

    Not yet run on a GPU.

    Args:
        cuda: libcuda.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def synchronize(self) -> None:
        """Wait for every stream of every library.

        Raises:
            EngineError: the driver says that something failed.
        """
        code = self._cuda.cuCtxSynchronize()
        if code == _INVALID_CONTEXT:  # this thread has not used the GPU yet
            context = ctypes.c_void_p()
            self._ask("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
            self._ask("cuCtxSetCurrent", context)
            code = self._cuda.cuCtxSynchronize()
        _check("cuCtxSynchronize", code)

    def _ask(self, name: str, *arguments: Any) -> None:
        _check(name, getattr(self._cuda, name)(*arguments))


def _check(name: str, code: int) -> None:
    if code:
        raise EngineError(f"{name} must return 0, got {code}: the GPU failed, and what it computed may not be used.")


def describe(on_gpu: bool, threads: int | None) -> dict[str, Any]:
    """What a reader has to know of the machine, now.

    threads: those that were asked for, of ONNX Runtime and PyTorch on the CPU.
    """
    gpu = nvidia_smi() if on_gpu else {}
    return {
        "device": gpu.get("name") or processor(),
        "kind": "gpu" if on_gpu else "cpu",
        "processor": processor(),
        "cores": cores(),
        "threads": threads or cores(),
        "memory_bytes": memory_bytes(),
        "clocks_mhz": clocks(),
        "gpu": gpu or None,
        "versions": installed_versions() | _more_versions(),
    }


def _more_versions() -> dict[str, str]:
    """Of what peers and GPUs need beside an engine."""
    found = {}
    for name in ("transformers", "cuda-core"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def other_work() -> Iterator[list[float]]:
    """Yields a list that has, behind the context, the cores that other processes took on average; nothing where the
    system does not tell."""
    found: list[float] = []
    busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
    yield found
    after = _busy_seconds()
    if busy is not None and after is not None:
        others = (after - busy) - (_own_seconds() - own)
        found.append(max(0.0, others / (time.perf_counter() - start)))


def _busy_seconds() -> float | None:
    """Of all cores together, since the machine started."""
    found = re.search(r"^cpu +(.+)$", _read(_STAT), re.MULTILINE)
    if found is None:
        return None
    user, nice, system, _, _, irq, soft, *_ = map(int, found[1].split())
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def load() -> float:
    """Of the last minute: processes that ran or waited to run."""
    return round(os.getloadavg()[0], 2)


def processor() -> str:
    """Its name, "unknown" where the system does not tell."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read(_CPUINFO), re.MULTILINE)
    return found[1].strip() if found else "unknown"


def clocks() -> list[int] | None:
    """Of each core now, MHz; None where the system does not tell."""
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _read(_CPUINFO), re.MULTILINE)
    return [round(float(mhz)) for mhz in found] or None


def memory_bytes() -> int | None:
    """Of the machine; None where the system does not tell."""
    found = re.search(r"^MemTotal:\s*(\d+) kB$", _read(_MEMINFO), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def nvidia_smi() -> dict[str, str]:
    """Name, driver, clocks, power and temperature of the first GPU now; nothing where nvidia-smi does not tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits", "--id=0"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        values = [value.strip() for value in done.stdout.strip().split(",")]
        if len(values) == len(_QUERY):
            return dict(zip(_QUERY, values, strict=True))
    return {}


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
