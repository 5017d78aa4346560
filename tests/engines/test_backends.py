"""Which backend `auto` means, and what a missing or broken library says."""

import sys
from pathlib import Path

import pytest

from engines import backends
from flowcut.errors import EngineError, FlowCutError


@pytest.fixture
def broken_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyPI's tensorrt is without NVIDIA's own index: bindings whose library is missing."""
    source = "raise ImportError('libnvinfer.so.11: cannot open shared object file')"
    (tmp_path / "tensorrt.py").write_text(source, encoding="ascii")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


@pytest.mark.parametrize("name", ["rtx", "trt", "ort"])
def test_a_named_backend_is_taken_as_it_is(name: str) -> None:
    assert backends.resolve_backend(name) == name


def test_auto_without_a_gpu_is_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "gpu_present", lambda: False)
    assert backends.resolve_backend("auto") == "rtx"


@pytest.mark.usefixtures("broken_tensorrt")
def test_auto_with_a_gpu_but_a_broken_tensorrt_is_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "gpu_present", lambda: True)
    assert backends.resolve_backend("auto") == "rtx"


def test_auto_with_a_gpu_and_a_working_tensorrt_is_trt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(backends, "gpu_present", lambda: True)
    assert backends.resolve_backend("auto") == "trt"
    monkeypatch.delitem(sys.modules, "tensorrt")


@pytest.mark.parametrize("name", ["trt", "auto"])
def test_a_directory_without_code_is_not_taken_for_tensorrt(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt").mkdir()  # what tensorrt-stubs installs, and what any folder of that name is
    (tmp_path / "tensorrt" / "__init__.pyi").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # a real one elsewhere would be found first
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(backends, "gpu_present", lambda: True)
    if name == "auto":
        assert backends.resolve_backend(name) == "rtx"
    else:
        with pytest.raises(EngineError, match=r"tensorrt must be NVIDIA's library, got a directory .*pip install"):
            backends.trt_module(name)
    monkeypatch.delitem(sys.modules, "tensorrt")


@pytest.mark.usefixtures("broken_tensorrt")
def test_a_library_that_does_not_load_says_why() -> None:
    with pytest.raises(EngineError, match=r"tensorrt is installed but does not load: libnvinfer\.so\.11"):
        backends.trt_module("trt")


def test_a_library_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.MODULES, "rtx", "surely_not_installed")
    with pytest.raises(FlowCutError, match=r"pip install -e .\.\[rtx\]"):
        backends.trt_module("rtx")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(EngineError, match="backend must be one of auto, rtx, trt, ort, got 'cuda'"):
        backends.resolve_backend("cuda")
    with pytest.raises(EngineError, match="got 'ort'"):
        backends.trt_module("ort")


def test_gpu_presence_is_answered_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(backends.ctypes, "CDLL", missing)
    assert backends.gpu_present() is False
    assert backends.gpu_sm() is None


def test_manifest_names_what_engines_were_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.built_for("rtx", ("SM86", "sm120")) == ("sm86", "sm120")
    assert backends.built_for("rtx", ()) == ("sm80 and later",)
    assert backends.built_for("ort", ()) == ()
    monkeypatch.setattr(backends.ctypes, "CDLL", lambda _: FakeDriver())
    assert backends.built_for("trt", ()) == ("sm90",)
    assert backends.gpu_sm() == 90


class FakeDriver:
    """libcuda of a GPU of compute capability 9.0."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: int) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]  # type: ignore[attr-defined]
        return 0
