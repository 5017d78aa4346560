"""Engines of another library or GPU are refused before anything is opened, with the command that builds them again."""

from __future__ import annotations

import importlib
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import pytest
from tiny_engine import write_engine

from engines import load_engine, loading, trust
from engines.inspection import inspect_directory
from engines.trust import OLDEST_ONNXRUNTIME, check_content, checks_here
from flowcut.artifacts import Manifest, read_manifest, write_manifest
from flowcut.errors import EngineError, FlowCutError

COMMAND = "flowcut engine llava-tiny --backend rtx"
LIBRARIES = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each backend, not to be changed."""
    folder = tmp_path_factory.mktemp("trust")
    made = {backend: write_engine(folder / backend, backend=backend).directory for backend in ("ort", "rtx", "trt")}
    for directory in made.values():
        write_manifest(directory, replace(read_manifest(directory), command=COMMAND))
    return made


@pytest.fixture
def directory(built: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(built["rtx"], tmp_path / "engine")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_gpu.FakeGpu:
    return fake_gpu.install(monkeypatch)


def rewrite(directory: Path, **changes: Any) -> Manifest:
    return write_manifest(directory, replace(read_manifest(directory), **changes))


def refused(directory: Path, backend: str = "auto") -> str:
    """What load_engine and `flowcut inspect --check` say alike."""
    with pytest.raises(EngineError) as caught:
        load_engine(directory, backend)
    found = inspect_directory(directory, check=True)
    assert not found.ok
    assert found.complaint == str(caught.value)
    assert "\n" not in found.complaint
    return str(caught.value)


@pytest.fixture
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_sessions", lambda *_: pytest.fail("a file was opened"))


@pytest.mark.usefixtures("gpu", "nothing_is_opened")
@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_a_plan_of_another_version_is_refused(built: dict[str, Path], tmp_path: Path, backend: str) -> None:
    directory = shutil.copytree(built[backend], tmp_path / "engine")
    rewrite(directory, versions={LIBRARIES[backend]: "1.2.3.5", "python": "3.11"})
    for name in ("auto", backend):
        assert refused(directory, name) == (
            f"{LIBRARIES[backend]} must be 1.2.3.5, which compiled the engines, got {fake_gpu.VERSION}. "
            f"Build it again: {COMMAND}"
        )


@pytest.mark.usefixtures("gpu", "nothing_is_opened")
def test_a_plan_of_nobody_knows_which_version_is_refused(directory: Path) -> None:
    rewrite(directory, versions={}, command="")
    assert refused(directory) == (
        "tensorrt_rtx must be what compiled the engines, which nobody recorded, "
        f"got {fake_gpu.VERSION}. Build it again."
    )


@pytest.mark.usefixtures("gpu", "nothing_is_opened")
@pytest.mark.parametrize(
    ("targets", "sm"),
    [(("sm86",), 89), (("sm80", "sm86"), 89), (("sm90 and later",), 89), (("sm120",), 121), (("sm89", "sm86"), 75)],
)
def test_a_plan_for_another_gpu_is_refused(
    directory: Path, targets: tuple[str, ...], sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_gpu, "SM", sm)
    monkeypatch.setattr(trust, "target_capabilities", lambda module: {f"sm{sm}": 1})
    rewrite(directory, compute_capabilities=targets)
    assert refused(directory, "rtx") == (
        f"GPU must be {' or '.join(targets)}, which the engines were compiled for, got sm{sm}. "
        f"Build it again: {COMMAND} --compute-capability sm{sm}"
    )


@pytest.mark.usefixtures("gpu", "nothing_is_opened")
def test_for_a_gpu_that_cannot_be_named_the_command_names_none(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX's default runs on those of its generation and later."""
    monkeypatch.setattr(fake_gpu, "SM", 90)
    monkeypatch.setattr(trust, "target_capabilities", lambda module: {"sm86": 1})
    rewrite(directory, compute_capabilities=("sm86",), command=f"{COMMAND} --compute-capability sm86 --out '/e 1'")
    assert refused(directory).endswith(f"got sm90. Build it again: {COMMAND} --out '/e 1'")


@pytest.mark.usefixtures("gpu", "nothing_is_opened")
@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ("m --out '/e --compute-capability sm86'", "m --out '/e --compute-capability sm86'"),
        ("m --compute-capability sm86 --compute-capability sm89 --out e", "m --out e"),
        ("m --out 'e", "m --out 'e"),  # which no build wrote
    ],
)
def test_a_path_in_the_command_stays_as_it_is(
    directory: Path, recorded: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_gpu, "SM", 90)
    monkeypatch.setattr(trust, "target_capabilities", lambda module: {})
    rewrite(directory, compute_capabilities=("sm86",), command=recorded)
    assert refused(directory).endswith(f"got sm90. Build it again: {said}")


@pytest.mark.usefixtures("gpu", "nothing_is_opened")
def test_full_tensorrt_compiles_for_the_gpu_at_hand(built: dict[str, Path], tmp_path: Path) -> None:
    """So its command is as it was."""
    directory = shutil.copytree(built["trt"], tmp_path / "engine")
    rewrite(directory, compute_capabilities=("sm86",))
    assert refused(directory).endswith(f"got sm89. Build it again: {COMMAND}")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("targets", "sm"),
    [(("sm80 and later",), 80), (("sm80 and later",), 121), (("sm80", "sm86"), 86), (("sm121",), 121)],
)
def test_a_plan_for_this_gpu_passes(
    directory: Path, targets: tuple[str, ...], sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_gpu, "SM", sm)
    checks = checks_here(rewrite(directory, compute_capabilities=targets), "rtx")
    assert [(each.name, each.verdict) for each in checks] == [
        ("tensorrt_rtx", "ok"),
        ("GPU", "ok"),
        ("onnxruntime", "not applicable here"),
    ]
    assert inspect_directory(directory, check=True).ok


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("targets", "driver"), [(("unknown",), 89), (("sm86",), None)])
def test_where_the_driver_tells_nothing_tensorrt_is_left_to_judge(
    directory: Path, targets: tuple[str, ...], driver: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "gpu_sm", lambda: driver)
    check = checks_here(rewrite(directory, compute_capabilities=targets), "rtx")[1]
    assert (check.name, check.verdict) == ("GPU", "not applicable here")
    assert "the driver" in check.detail


def test_neither_refuses_onnx_runtime(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(directory, versions={}, compute_capabilities=("sm12",))
    monkeypatch.setattr(loading, "gpu_present", lambda: False)
    for backend in ("auto", "ort"):
        assert load_engine(directory, backend, threads=1).backend == "ort"
    found = inspect_directory(directory, check=True)
    assert found.ok
    assert [(each.name, each.verdict) for each in found.checks] == [
        ("manifest.json", "ok"),
        ("files", "ok"),
        ("tensorrt_rtx", "not applicable here"),
        ("GPU", "not applicable here"),
        ("onnxruntime", "ok"),
    ]
    assert found.checks[2].detail == found.checks[3].detail == "no CUDA GPU is present"
    fake_gpu.install(monkeypatch)
    assert load_engine(directory, "ort", threads=1).backend == "ort"


@pytest.mark.parametrize("version", ["1.29.1", "0.99", "1.9.0"])
def test_an_onnx_runtime_that_cannot_run_the_graphs_is_refused(
    built: dict[str, Path], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "require", lambda name, extra: SimpleNamespace(__version__=version))
    assert refused(built["ort"]) == f"onnxruntime must be at least 1.30, got {version}. Install a later one."


ABSENT = "is not installed. In the checkout, `make setup` installs everything, pip install -e '.[x]' what is missing."


def lacking(name: str) -> Callable[[str, str], Any]:
    """flowcut.deps.require where one library is missing."""

    def require(module: str, extra: str) -> Any:
        if module == name:
            raise FlowCutError(f"{name} {ABSENT}")
        return importlib.import_module(module)

    return require


def test_what_a_missing_onnx_runtime_takes_is_said_whole(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "require", lacking("onnxruntime"))
    assert refused(built["ort"]) == f"onnxruntime {ABSENT}"
    (check,) = (each for each in inspect_directory(built["ort"], check=True).checks if each.name == "onnxruntime")
    assert check.detail == ABSENT.removesuffix(".")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vision alone is bf16; not to be changed."""
    return write_engine(tmp_path_factory.mktemp("bf16") / "e", precision="fp16", vision_precision="bf16").directory


def test_bf16_on_a_cpu_needs_onnx_ir(bf16: Path, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [each.name for each in inspect_directory(bf16, check=True).checks][-2:] == ["onnxruntime", "onnx_ir"]
    assert inspect_directory(bf16, check=True).ok
    monkeypatch.setattr(trust, "require", lacking("onnx_ir"))
    assert refused(bf16) == f"onnx_ir {ABSENT}"
    assert inspect_directory(built["ort"], check=True).ok
    monkeypatch.setattr(trust, "on_cuda", lambda: True)  # whose provider may take bf16 as it is
    assert inspect_directory(bf16, check=True).ok


@pytest.mark.usefixtures("nothing_is_opened")
def test_a_file_that_is_needed_is_said_once_and_as_it_is(directory: Path, gpu: fake_gpu.FakeGpu) -> None:
    plan = directory / "vision.engine"
    manifest = read_manifest(directory)
    content = plan.read_bytes()
    plan.unlink()
    manifest = write_manifest(directory, manifest)  # without it
    assert check_content(directory, manifest, "rtx") == ["vision.engine: neither in the manifest nor there"]
    plan.write_bytes(content)
    assert check_content(directory, manifest, "rtx") == ["vision.engine: not in the manifest"]
    assert "vision.engine: not in the manifest." in refused(directory)


@pytest.mark.parametrize("version", ["1.30.0", "1.31.0.dev20261001", "2.0"])
def test_a_later_onnx_runtime_passes(built: dict[str, Path], version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "require", lambda name, extra: SimpleNamespace(__version__=version))
    assert inspect_directory(built["ort"], check=True).ok


def test_the_oldest_onnx_runtime_is_the_one_that_is_installed_with_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    least = ".".join(map(str, OLDEST_ONNXRUNTIME))
    assert (*extras["cpu"], *extras["gpu"]) == (f"onnxruntime>={least},<2", f"onnxruntime-gpu>={least},<2")


@pytest.mark.usefixtures("nothing_is_opened")
def test_files_that_nobody_uses_are_hashed_too(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans of a directory that ONNX Runtime runs here, the graphs of one that TensorRT does."""
    monkeypatch.setattr(loading, "gpu_present", lambda: False)
    plan = directory / "language.engine"
    content = plan.read_bytes()
    plan.write_bytes(content[::-1])
    assert "language.engine: expected sha256" in refused(directory)
    plan.write_bytes(content)
    fake_gpu.install(monkeypatch)
    graph = directory / "vision.onnx"
    graph.write_bytes(graph.read_bytes()[::-1])
    assert "vision.onnx: expected sha256" in refused(directory)


@pytest.mark.usefixtures("gpu")
def test_everything_that_differs_is_said_on_one_line(directory: Path) -> None:
    rewrite(directory, versions={}, compute_capabilities=("sm86",))
    (directory / "new").touch()
    said = inspect_directory(directory, check=True).complaint
    assert "\n" not in said
    for words in ("new: not in the manifest", "tensorrt_rtx must be", "GPU must be sm86"):
        assert words in said


def test_without_check_no_file_is_opened_but_the_manifest(built: dict[str, Path], tmp_path: Path) -> None:
    """Content may change unseen; names, kinds and sizes may not."""
    directory = shutil.copytree(built["ort"], tmp_path / "engine")
    weights = directory / "vision.onnx.data"
    weights.write_bytes(weights.read_bytes()[::-1])
    found = inspect_directory(directory)
    assert (found.ok, found.checks, found.complaint) == (True, (), "")
    assert found.to_dict().keys() == {"manifest", "differences", "ok"}
    weights.unlink()
    found = inspect_directory(directory)
    assert not found.ok
    assert found.complaint.startswith(f"{directory} must hold what was built there, got vision.onnx.data: missing.")
