"""Which engine library runs or builds: full TensorRT (trt), TensorRT-RTX (rtx) or ONNX Runtime (ort)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, cast

from flowcut.deps import require
from flowcut.errors import EngineError, FlowCutError

Backend = Literal["rtx", "trt", "ort"]
CHOICES = ("auto", "rtx", "trt", "ort")
MODULES = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
INDEX = {"trt": " --extra-index-url https://pypi.nvidia.com"}
"""Where a backend's library is, if PyPI has it not."""


def resolve_backend(name: str) -> Backend:
    """`auto` is trt where that library loads and a GPU is present, else rtx, which compiles without one."""
    if name not in CHOICES:
        raise EngineError(f"backend must be one of {', '.join(CHOICES)}, got {name!r}.")
    if name == "auto":
        return "trt" if gpu_present() and _loads("trt") else "rtx"
    return cast(Backend, name)


def trt_module(backend: str) -> ModuleType:
    """The TensorRT module of a backend. `tensorrt_rtx` and `tensorrt` share the API that this package uses.

    Raises:
        FlowCutError: not installed, or installed without its shared libraries.
    """
    if backend not in MODULES:
        raise EngineError(f"backend must be one of {', '.join(MODULES)} to use TensorRT, got {backend!r}.")
    try:
        module = require(MODULES[backend], extra=backend)
    except (ImportError, OSError) as error:
        # The bindings wheel of full TensorRT installs from PyPI without the libraries it links to.
        raise EngineError(
            f"{MODULES[backend]} is installed but does not load: {error}. "
            "Install its libraries from NVIDIA's package index, or use BACKEND=rtx or BACKEND=ort."
        ) from None
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
        # A directory without __init__.py imports as an empty package: tensorrt-stubs leaves one, named tensorrt.
        raise EngineError(
            f"{MODULES[backend]} must be NVIDIA's library, got a directory without code, {', '.join(module.__path__)}. "
            f"In the checkout: pip install -e '.[{backend}]'{INDEX.get(backend, '')}"
        )
    return module


def check_build(backend: Backend, compute_capabilities: Sequence[str]) -> None:
    """Raise unless this machine can build for `backend` and the named GPUs; cheap enough to ask before an export.

    Raises:
        EngineError: unknown or superfluous targets, or trt where there is no GPU to build for.
        FlowCutError: the library is not installed.
    """
    got = ", ".join(compute_capabilities)
    if backend == "ort":
        if got:
            raise EngineError(f"compute_capability must be left out for backend ort (nothing is compiled), got {got}.")
        return
    known = target_capabilities(trt_module(backend))
    if got and not known:
        raise EngineError(f"compute_capability must be left out for backend {backend}, got {got}.")
    if unknown := [name for name in compute_capabilities if name.lower() not in known]:
        raise EngineError(
            f"compute_capability must be one of {', '.join(known)}, got {', '.join(unknown)}. "
            "Without one, engines are for Ampere and later."
        )
    if backend == "trt" and not gpu_present():
        raise EngineError(
            "backend trt must have an NVIDIA GPU to build for, got none. "
            "Use BACKEND=rtx, which compiles without one, or BACKEND=ort."
        )


def target_capabilities(trt: ModuleType) -> dict[str, Any]:
    """GPUs that `trt` can be told to build for, by name ("sm86"); none with full TensorRT, which builds for its own."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return {name.lower(): member for name, member in members.items() if name.startswith("SM")}


def built_for(backend: Backend, compute_capabilities: Sequence[str]) -> tuple[str, ...]:
    """What a build's engines run on, for the manifest: "sm86" and so on; none for ort."""
    if compute_capabilities:
        return tuple(name.lower() for name in compute_capabilities)
    return {"ort": (), "rtx": ("sm80 and later",), "trt": (_gpu_capability(),)}[backend]


def _gpu_capability() -> str:
    """The first GPU's compute capability, "unknown" where the driver does not tell."""
    return f"sm{sm}" if (sm := gpu_sm()) is not None else "unknown"


def gpu_sm() -> int | None:
    """The first GPU's compute capability without the dot, 90 for 9.0; None where the driver does not tell."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    codes = [cuda.cuInit(0), *(cuda.cuDeviceGetAttribute(ctypes.byref(x), n, 0) for x, n in ((major, 75), (minor, 76)))]
    return None if any(codes) else 10 * major.value + minor.value


def gpu_present() -> bool:
    """Whether the NVIDIA driver answers and counts at least one device. Needs neither torch nor the CUDA toolkit."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _loads(backend: str) -> bool:
    try:
        trt_module(backend)
    except FlowCutError:
        return False
    return True
