"""TensorRT and TensorRT-RTX sessions on a real GPU, beside ONNX Runtime. That has not run yet."""

from __future__ import annotations

import ctypes
import inspect
import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from tiny_engine import TinyEngine, write_engine
from trt_feeds import contract_of, follow, next_tokens, pixels, prompts, reference, session_of, steps_of

from engines.backends import trt_module
from engines.build import build_engine
from engines.sessions.runtime_cache import cache_path
from flowcut.errors import FlowCutError

pytestmark = pytest.mark.gpu
SHA = "5" * 64


@pytest.fixture(scope="module", params=["rtx", "trt"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("cuda.core", reason="needs cuda-core, of the rtx and trt extras")
    try:
        trt_module(request.param)
    except FlowCutError as error:
        pytest.skip(f"needs its library: {error}")
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(backend: str, tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    """Compiled for this GPU."""
    made = write_engine(tmp_path_factory.mktemp(backend) / "engine", precision="fp16", backend=backend)
    for graph in ("vision", "language"):
        paths = (made.directory / f"{graph}.{kind}" for kind in ("onnx", "engine"))
        build_engine(*paths, contract_of(made, graph), backend)  # type: ignore[arg-type]
    return made


def near(got: np.ndarray, expected: np.ndarray) -> bool:
    """float16 rounds otherwise in every library."""
    return float(np.abs(got - expected).max()) <= 2e-2 * float(np.abs(expected).max())


def free_bytes() -> int:
    """Of the device, as the driver tells."""
    driver, free, total = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t(), ctypes.c_size_t()
    assert driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


def test_vision_is_that_of_onnx_runtime(tiny: TinyEngine, backend: str) -> None:
    got = session_of(tiny, "vision", backend).run(pixels(tiny, 3), keep=["image_embeds"])
    expected = reference(tiny, "vision").run(pixels(tiny, 3)).arrays
    same = got.arrays["kept"] == expected["kept"]
    assert same.mean() > 0.9  # near-equal scores may change places
    rows = np.concatenate([row.numpy() for row in got.kept["image_embeds"].split()])
    assert near(rows[same], expected["image_embeds"][same])
    assert got.device_ms > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode_are_those_of_onnx_runtime(tiny: TinyEngine, backend: str, batch: int) -> None:
    got = follow(session_of(tiny, "language", backend), prompts(batch), 8)
    assert near(got, follow(reference(tiny, "language"), prompts(batch), 8))


def test_graphs_change_nothing(tiny: TinyEngine, backend: str) -> None:
    got, plain = (follow(session_of(tiny, "language", backend, cuda_graphs=on), prompts(2), 12) for on in (True, False))
    np.testing.assert_allclose(got, plain, rtol=1e-3, atol=1e-3)


def test_a_step_goes_on_right_while_others_prefill(tiny: TinyEngine, backend: str) -> None:
    """A graph must not mind what its engine did in between."""
    session, feeds = session_of(tiny, "language", backend, concurrency=2), prompts(2)
    expected, state = follow(session, feeds, 8), session.allocate_state(2)
    got = []
    for step in steps_of(feeds, 8):
        got.append(session.run(step, state).arrays["logits"])
        follow(session, prompts(3, 40, seed=1), 1)
    np.testing.assert_allclose(np.stack(got), expected, rtol=1e-3, atol=1e-3)


def test_many_requests_take_no_more_memory(tiny: TinyEngine, backend: str) -> None:
    vision, language = (session_of(tiny, graph, backend, picture_cache_mb=1) for graph in ("vision", "language"))

    def request(batch: int) -> None:
        rows = vision.run(pixels(tiny, 2), keep=["image_embeds"]).kept["image_embeds"].split()
        feeds, state = prompts(batch), language.allocate_state(batch)
        language.run(feeds | {"image_embeds": rows}, state)
        for step in range(6):
            language.run(next_tokens(feeds, step), state)

    for batch in (1, 2, 3) * 4:
        request(batch)
    before = free_bytes()
    for batch in (1, 2, 3) * 20:
        request(batch)
    assert before - free_bytes() < 2**20


def test_threads_get_what_each_gets_alone(tiny: TinyEngine, backend: str) -> None:
    session = session_of(tiny, "language", backend, concurrency=4)
    expected, got = {seed: follow(session, prompts(2, seed=seed), 6) for seed in range(4)}, dict[int, np.ndarray]()
    together = threading.Barrier(4)

    def ask(seed: int) -> None:
        together.wait()
        got[seed] = follow(session, prompts(2, seed=seed), 6)

    threads = [threading.Thread(target=ask, args=[seed]) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, logits in expected.items():
        np.testing.assert_allclose(got[seed], logits, rtol=1e-3, atol=1e-3)


def test_compiled_kernels_are_kept_and_taken(tiny: TinyEngine, backend: str) -> None:
    session = session_of(tiny, "language", backend, SHA)
    expected = follow(session, prompts(2), 4)
    path = cache_path(
        tiny.directory / "language.engine", SHA, trt_module(backend).__version__, session.device.capability
    )
    session.close()
    if backend == "trt":
        assert not path.parent.exists()
        return
    written = path.read_bytes()
    again = session_of(tiny, "language", backend, SHA)
    np.testing.assert_allclose(follow(again, prompts(2), 4), expected, rtol=1e-3, atol=1e-3)
    assert again._contexts.kernels is not None
    assert again._contexts.kernels._saved  # what was read fitted, so its hash is known
    assert len(path.read_bytes()) >= len(written) // 2


def test_layers_are_timed(tiny: TinyEngine, backend: str) -> None:
    session = session_of(tiny, "language", backend, profile=True)
    follow(session, prompts(1), 2)
    times = session.layer_times()
    assert times
    assert max(time.calls for time in times) == 3
    assert sum(time.total_ms for time in times) > 0


MEASURE = """
import json, pickle, sys
from pathlib import Path
from engines.sessions.cuda_device import CudaDevice
from engines.sessions.trt_session import TrtSession

path, backend = Path(sys.argv[1]), sys.argv[2]
contract = pickle.loads(sys.stdin.buffer.read())
device = CudaDevice(backend)  # before anything is measured: CUDA itself takes memory
before = free_bytes()
session = TrtSession(path, contract, backend, device)
print(json.dumps([before - free_bytes(), session.memory_bytes()]))
"""


def test_memory_is_what_it_says(tiny: TinyEngine, backend: str) -> None:
    """In a process of its own: in this one, memory comes from what earlier sessions left in the pool."""
    path, script = tiny.directory / "language.engine", f"import ctypes\n{inspect.getsource(free_bytes)}{MEASURE}"
    command = [sys.executable, "-c", script, str(path), backend]
    done = subprocess.run(
        command, input=pickle.dumps(contract_of(tiny, "language")), stdout=subprocess.PIPE, check=True
    )
    taken, told = json.loads(done.stdout)
    assert taken >= told["cache"] + told["buffers"] + told["scratch"]
    assert told["weights"] == path.stat().st_size
