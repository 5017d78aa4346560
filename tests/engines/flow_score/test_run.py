"""Scoring torch tensors: what is refused, what is launched, the interpreter's process and the path to a GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.flow_score import cache, interpreter, run
from engines.flow_score.launch import COMBINE, COMBINE_MASKED, LOGITS, Call, Variant, float_bits
from flowcut.errors import EngineError, FlowCutError

torch = pytest.importorskip("torch")

HALF = torch.float16
SHAPES: dict[str, tuple[int, ...]] = {
    "q": (2, 3, 1, 32),
    "v_source": (2, 3, 1, 32),
    "k": (2, 3, 9, 32),
    "v": (2, 3, 9, 32),
}
OTHER_DEVICE = torch.zeros(2, 3, 9, 32, dtype=HALF, device="meta")


def arguments(**changes: Any) -> dict[str, Any]:
    return {name: torch.zeros(shape, dtype=HALF) for name, shape in SHAPES.items()} | {"logit_scale": 0.1} | changes


def never(*arguments: Any) -> None:
    raise AssertionError("launched")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 9, 32)}, r"k must have 4 dimensions, got shape \[2, 9, 32\]"),
        ({"k": torch.zeros(SHAPES["k"], dtype=torch.float64)}, "k must be float16, bfloat16 or float32, got float64"),
        ({"q": torch.zeros(SHAPES["q"])}, r"q must be \[2, 3, 1, 32\] float16 on cpu, got \[2, 3, 1, 32\] float32"),
        ({"v": torch.zeros(2, 3, 8, 32, dtype=HALF)}, r"v must be \[2, 3, 9, 32\] float16 on cpu, got \[2, 3, 8, 32\]"),
        ({"v_source": torch.zeros(2, 3, 32, dtype=HALF)}, r"v_source must be \[2, 3, 1, 32\] .* got \[2, 3, 32\]"),
        ({"q": torch.zeros(2, 3, 0, 32, dtype=HALF)}, r"q must be \[2, 3, 1, 32\] .* got \[2, 3, 0, 32\]"),
        ({"q": torch.zeros(2, 3, 2, 32, dtype=HALF), "group": 4}, r"q must be \[2, 3, 4, 32\] .* got \[2, 3, 2, 32\]"),
        ({"v": torch.zeros(2, 3, 32, 9, dtype=HALF).mT}, r"v must be contiguous, got strides .* v\.contiguous\(\)"),
        ({"v": OTHER_DEVICE}, r"v must be \[2, 3, 9, 32\] float16 on cpu, got .* on meta"),
        ({"k": torch.zeros(2, 3, 9, 20, dtype=HALF)}, "head_size must be a multiple of 8 from 32 to 128 .* got 20"),
        ({"k": torch.zeros(2, 3, 9, 136, dtype=HALF)}, "head_size must be a multiple of 8 from 32 to 128 .* got 136"),
        ({"group": 0}, "group must be .* got 0"),
        ({"group": 2, "token_major": True}, "group must be 1 where token_major is set.* got 2"),
        ({"history": 0.5}, r"running must be \[2, 8\] float32 where history is 0.5, got None"),
        ({"history": 1.5}, "history must be from 0 to 1, got 1.5"),
        ({"history": float("nan")}, "history must be from 0 to 1, got nan"),
        ({"logit_scale": -1.0}, "scales and weights of FlowScore must be finite and 0 or more, got -1.0"),
        ({"running": torch.zeros(2, 9)}, r"running must be \[2, 8\] float32 on cpu, got \[2, 9\]"),
        ({"running": torch.zeros(2, 8, dtype=HALF)}, r"running must be \[2, 8\] float32 on cpu, got \[2, 8\] float16"),
        ({"key_valid": torch.ones(2, 9)}, r"key_valid must be \[2, 9\] bool on cpu, got \[2, 9\] float32"),
        ({"source_in_keys": 2}, "source_in_keys must be 0 or 1, got 2"),
        (
            {x: torch.zeros(2, 3, 1, 32, dtype=HALF) for x in "kv"},
            "k must have images, heads and more than 1 keys, got",
        ),
        (
            {x: torch.zeros(2, 128, 1 << 20, 32, dtype=HALF, device="meta") for x in "kv"}
            | {x: torch.zeros(2, 128, 1, 32, dtype=HALF, device="meta") for x in ("q", "v_source")},
            r"k must have fewer than 2\^31 elements an image, got 1048576 keys of 128 heads of 32",
        ),
    ],
)
def test_what_the_kernels_are_not_made_for_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message) as raised:
        run.score(never, **arguments(**changes))
    assert "\n" not in str(raised.value)


def launches(**changes: Any) -> list[tuple[Variant, tuple[int, int], list[Any], list[int], list[Any]]]:
    calls: list[Any] = []
    run.score(lambda *call: calls.append(call), **arguments(**changes))
    return calls


def test_two_kernels_are_launched_over_all_keys_and_over_all_scores() -> None:
    given = arguments(k=torch.zeros(2, 3, 67, 32, dtype=HALF), v=torch.zeros(2, 3, 67, 32, dtype=HALF))
    first, second = launches(**given)
    assert first[:2] == (Variant(LOGITS, "fp16", 32), (17, 2))
    assert [x is given[name] for x, name in zip(first[2], SHAPES, strict=True)] == [True] * 4
    assert first[3] == Call(2, 3, 67).logits_integers(0.1, 1.0)
    assert [tuple(x.shape) for x in first[4]] == [(2, 6, 67), (2, 67)]
    assert second[:2] == (Variant(COMBINE), (2, 2))
    assert second[2][0] is first[4][0]
    assert second[2][1] is first[4][1]
    assert tuple(second[4][0].shape) == (2, 66)


def test_a_mask_selects_the_kernel_that_takes_one() -> None:
    valid = torch.ones(2, 9, dtype=torch.bool)
    _, (variant, grid, inputs, _, outputs) = launches(key_valid=valid)
    assert (variant, grid) == (Variant(COMBINE_MASKED), (1, 2))
    assert inputs[3] is valid
    assert [tuple(x.shape) for x in outputs] == [(2, 8), (2, 1)]


def test_switches_and_weights_reach_the_second_kernel() -> None:
    running = torch.zeros(2, 9)
    _, (_, _, inputs, integers, _) = launches(
        history=0.5, running=running, source_in_keys=0, semantic=False, strength=False
    )
    assert inputs[2] is running
    assert integers == [float_bits(0.5), 3, 3, 9, 0, 9, 0, 0]


def test_rows_of_the_source_and_layout_reach_the_first_kernel() -> None:
    major = {name: torch.zeros(2, 9, 3, 32, dtype=HALF) for name in SHAPES}
    assert launches(**major, token_major=True)[0][3] == Call(2, 3, 9, 1, 9, 9, True).logits_integers(0.1, 1.0)
    grouped = launches(q=torch.zeros(2, 3, 4, 32, dtype=HALF), v_source=arguments()["v"], group=4)
    assert grouped[0][3] == Call(2, 3, 9, 4, 1, 9).logits_integers(0.1, 1.0)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Processes that the interpreter starts."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(interpreter.subprocess, "Popen", start)
    return started


def test_the_interpreter_lives_in_a_process_that_ends_with_it(children: list[subprocess.Popen[bytes]]) -> None:
    pytest.importorskip("triton")
    launch = run.interpreter()
    assert "TRITON_INTERPRET" not in os.environ
    with pytest.raises(EngineError, match=r"flow_score_combine failed in Triton's interpreter: .*missing"):
        launch(Variant(COMBINE), (1, 1), [torch.zeros(1)], [], [torch.zeros(1)])
    running, _ = run.score(launch, **arguments(v=torch.ones(SHAPES["v"], dtype=HALF)))  # it lives on
    np.testing.assert_allclose(running, 2 * 32 / 8, rtol=1e-6)
    (child,) = children
    assert child.poll() is None
    del launch
    gc.collect()
    assert child.returncode is not None


def test_a_process_may_compile_what_it_interprets_elsewhere() -> None:
    """Interpreting here would leave Triton's language patched, or not work, by which came first."""
    triton = pytest.importorskip("triton")
    launch = run.interpreter()
    from engines.flow_score import kernel

    before = triton.language.load
    run.score(launch, **arguments())
    assert isinstance(kernel.flow_score_logits, triton.runtime.jit.JITFunction)
    assert triton.language.load is before


def test_a_dead_interpreter_is_an_error(children: list[subprocess.Popen[bytes]]) -> None:
    launch = run.interpreter()
    children[0].kill()
    with pytest.raises(EngineError, match="process of its own, which ended"):
        run.score(launch, **arguments())


def test_the_interpreter_without_triton_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from engines.flow_score.interpreter import interpret\n"
        "interpret(None, (1, 1), [], [], [])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "FlowCutError: triton is not installed" in done.stderr
    assert "kernels" in done.stderr


class FakeCuda(ModuleType):
    """cuda.core as far as a launch goes: two GPUs of sm_86, modules from PTX, launches written down."""

    def __init__(self) -> None:
        super().__init__("cuda.core")
        self.current = 1
        self.loaded: list[tuple[bytes, str]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.failing: dict[str, Exception] = {}
        fake = self

        def fail(where: str) -> None:
            if where in fake.failing:
                raise fake.failing[where]

        class Device:
            compute_capability = (8, 6)
            name = "A10"

            def __init__(self, number: int | None = None) -> None:
                fail("Device")
                self.device_id = fake.current if number is None else number

            def set_current(self) -> None:
                fake.current = self.device_id

        def from_ptx(module: bytes, *, name: str = "") -> Any:
            assert isinstance(module, bytes), "a str is the name of a file"
            fake.loaded.append((module, name))
            device = fake.current

            def get_kernel(entry: str) -> Any:
                fail("get_kernel")  # cuda.core loads a module when it is first asked for a kernel
                return device, entry

            return SimpleNamespace(get_kernel=get_kernel)

        def launch(stream: Any, config: Any, kernel: Any, *arguments: Any) -> None:
            fail("launch")
            fake.launched.append((stream, vars(config), kernel, arguments))

        self.Device, self.launch = Device, launch
        self.ObjectCode = SimpleNamespace(from_ptx=from_ptx)
        self.LaunchConfig = SimpleNamespace
        self.Stream = SimpleNamespace(from_handle=lambda handle: ("stream", handle))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    def kernel(variant: Variant, sm: int) -> Any:
        return SimpleNamespace(ptx=f"{variant.label} sm_{sm}", entry="entry", threads=128, shared_bytes=512)

    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.core", fake)
    monkeypatch.setattr(cache, "kernel", kernel)
    run._load.cache_clear()
    yield fake
    run._load.cache_clear()


def test_ptx_of_the_gpu_is_launched_with_addresses_and_32_bit_integers(cuda: FakeCuda) -> None:
    run.ptx_launch(stream=7)(Variant(COMBINE), (3, 2), [1 << 40, 2, 3], [float_bits(0.5), 8], [4])
    assert cuda.loaded == [(b"flow_score_combine sm_86", "flow_score_combine")]
    ((stream, config, kernel, given),) = cuda.launched
    assert (stream, kernel) == (("stream", 7), (1, "entry"))
    assert config == {"grid": (3, 2), "block": 128, "shmem_size": 512}
    assert given == (1 << 40, 2, 3, float_bits(0.5), 8, 4)
    assert [type(x) for x in given] == [int, int, int, np.int32, np.int32, int]


def test_a_kernel_is_loaded_once_a_gpu(cuda: FakeCuda) -> None:
    for device in (0, 1, 0):
        run.ptx_launch(device=device)(Variant(COMBINE), (1, 1), [1, 2, 3], [], [4])
    assert len(cuda.loaded) == 2
    assert [kernel for _, _, kernel, _ in cuda.launched] == [(0, "entry"), (1, "entry"), (0, "entry")]


def test_tensors_are_passed_by_address_and_must_be_on_the_gpu(cuda: FakeCuda) -> None:
    on_gpu = SimpleNamespace(is_cuda=True, data_ptr=lambda: 99)
    run.ptx_launch()(Variant(COMBINE), (1, 1), [on_gpu], [], [4])
    assert cuda.launched[0][3] == (99, 4)
    with pytest.raises(EngineError, match="must be on a GPU to be scored there, got cpu"):
        run.score(run.ptx_launch(), **arguments())


class CudaError(Exception):
    """cuda.core's, which is no RuntimeError."""


@pytest.mark.parametrize("where", ["get_kernel", "launch"])
def test_what_cuda_refuses_names_kernel_gpu_reason_and_driver(cuda: FakeCuda, where: str) -> None:
    cuda.failing[where] = CudaError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the PTX was\n compiled by a newer one.")
    with pytest.raises(EngineError) as raised:
        run.ptx_launch()(Variant(LOGITS, "bf16", 64), (1, 1), [1, 2, 3, 4], [], [5, 6])
    assert str(raised.value) == (
        "flow_score_logits-bf16-64 must load and launch on A10, got: CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the PTX was "
        "compiled by a newer one. FlowScore's PTX needs NVIDIA's driver R570 or newer."
    )
    assert isinstance(raised.value.__cause__, CudaError)
    cuda.failing.clear()
    run.ptx_launch()(Variant(LOGITS, "bf16", 64), (1, 1), [1, 2, 3, 4], [], [5, 6])  # nothing of it stays
    assert len(cuda.launched) == 1


def test_what_this_project_refuses_is_not_put_down_to_cuda(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(variant: Variant, sm: int) -> Any:
        raise EngineError("GPU must be sm_80 or newer.")

    monkeypatch.setattr(cache, "kernel", no_kernel)
    with pytest.raises(EngineError, match=r"^GPU must be sm_80 or newer\.$"):
        run.ptx_launch()(Variant(COMBINE), (1, 1), [1, 2, 3], [], [4])


def test_a_driver_that_does_not_start_is_no_gpu(cuda: FakeCuda) -> None:
    cuda.failing["Device"] = RuntimeError("CUDA driver library not found")
    with pytest.raises(EngineError, match="runs on a GPU, and no CUDA GPU is present"):
        run.ptx_launch()(Variant(COMBINE), (1, 1), [1, 2, 3], [], [4])


def test_without_cuda_core_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(FlowCutError, match=r"cuda.core cannot be imported .*\[trt\]"):
        run.ptx_launch()(Variant(COMBINE), (1, 1), [1, 2, 3], [], [4])
