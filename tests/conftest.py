"""Seeded checkpoints, the authors' golden outputs, and what becomes of tests that need a GPU."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

# Tests use small matrices, over which many threads only fight. Set before torch, numpy or ONNX Runtime start theirs.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, min(4, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))),
)

import numpy as np
import pytest
import recipe

GOLDEN = Path(os.environ.get("FLOWCUT_GOLDEN") or Path(__file__).parent / "golden")

RESULTS = Path(__file__).parent.parent / "docs" / "results"

WriteCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest) -> ModuleType:
    """The script of docs/results that the test module names as SCRIPT."""
    return importlib.import_module(request.module.SCRIPT)


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What that script has measured."""
    found: dict[str, Any] = json.loads((RESULTS / f"{request.module.SCRIPT}.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Over small matrices torch's threads only wait for each other: 54 s instead of 11 where the machine is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Golden(NamedTuple):
    """What the authors' implementation returned: `meta` says for which weights and input."""

    name: str
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> WriteCheckpoint:
    """checkpoint(preset="tiny", vision=None, text=None, seed=0, dtype="float32") -> directory, written once a session.

    `vision` and `text` override keys of the preset (hidden, layers, heads, mlp, patch, image / vocab). Shared between
    tests: copy it before changing it.
    """

    @cache
    def written(preset: str, vision: str, text: str, seed: int, dtype: str) -> Path:
        base_vision, base_text = recipe.PRESETS[preset]
        out = tmp_path_factory.mktemp(f"{preset}-seed{seed}-{dtype}")
        recipe.write(out, {**base_vision, **json.loads(vision)}, {**base_text, **json.loads(text)}, seed, dtype)
        return out

    def write(
        preset: str = "tiny",
        vision: Mapping[str, int] | None = None,
        text: Mapping[str, int] | None = None,
        seed: int = 0,
        dtype: str = "float32",
    ) -> Path:
        for overrides, base in zip((vision, text), recipe.PRESETS[preset], strict=True):
            assert set(overrides or {}) <= set(base), f"{overrides} must override some of {sorted(base)}"
        overrides = (json.dumps(dict(d or {}), sort_keys=True) for d in (vision, text))
        return written(preset, *overrides, seed, dtype)

    return write


def pytest_configure() -> None:
    """Shells ignore SIGINT in what they run in the background, and the processes that tests interrupt inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `golden` runs once per file of FLOWCUT_GOLDEN, or of tests/golden."""
    if "golden" in metafunc.fixturenames:
        paths = sorted(GOLDEN.glob("*.npz"))
        # Without a file there is still one case, for `golden` to fail: an empty list would only be skipped.
        metafunc.parametrize("golden", paths or [None], indirect=True, ids=[p.stem for p in paths] or ["no-file"])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """One golden file, loaded."""
    if request.param is None:
        pytest.fail(f"no golden file (*.npz) in {GOLDEN}. FLOWCUT_GOLDEN names the directory.")
    with np.load(request.param) as data:
        arrays = {name: data[name] for name in data.files if name != "meta"}
        return Golden(request.param.stem, json.loads(str(data["meta"])), arrays)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a `gpu` test before its fixtures are built where there is no CUDA device."""
    if item.get_closest_marker("gpu") and (reason := _gpu_missing()):
        pytest.skip(f"needs a CUDA device: {reason}")


@cache
def _gpu_missing() -> str:
    """Why there is no CUDA device, as the driver tells; empty where there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1) here"
    if code := driver.cuInit(0):
        return f"the NVIDIA driver does not start (cuInit returned {code})"
    count = ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return "" if count.value else "the NVIDIA driver sees none"
