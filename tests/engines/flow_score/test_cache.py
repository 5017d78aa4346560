"""PTX by content: where it is looked for, what is never used, what is said where there is none."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.flow_score import cache
from engines.flow_score.cache import ARCHIVE, SHIPPED, archive, encoded, fetch, file_name, kernel, look_up, target_for
from engines.flow_score.compile import TARGETS, CompiledKernel
from engines.flow_score.launch import COMBINE, LOGITS, Variant
from flowcut.errors import EngineError

ROOT = Path(__file__).parents[3]
RARE = Variant(LOGITS, "bf16", 72)
REGENERATE = "run `python docs/results/flow_score_kernels.py` and commit what it writes"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flowcut-trt" / "ptx"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Variant, int]]:
    """What the compiler, a fake one, was asked for."""
    asked: list[tuple[Variant, int]] = []

    def compile_kernel(variant: Variant, sm: int) -> CompiledKernel:
        asked.append((variant, sm))
        return fake(variant, sm)

    monkeypatch.setattr(cache, "compile_kernel", compile_kernel)
    monkeypatch.setattr(cache, "available", lambda module: True)
    return asked


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "available", lambda module: False)


def fake(variant: Variant, sm: int) -> CompiledKernel:
    return CompiledKernel(variant, sm, variant.kernel, f".version 8.7\n.target sm_{sm}\n", 128, 0, 40, 0, "3.9.0")


def test_shipped_ptx_is_of_the_kernels_as_they_are() -> None:
    names = [file_name(variant, sm) for variant in SHIPPED for sm in TARGETS]
    assert zipfile.ZipFile(ARCHIVE).namelist() == names, f"kernel.py or launch.py changed: {REGENERATE}"


def test_ships_every_kernel_type_and_target_in_less_than_a_megabyte(place: Path, without_triton: None) -> None:
    types = {(dtype, size) for dtype in ("fp16", "bf16", "fp32") for size in (32, 64, 128)}
    assert {(v.dtype, v.head_size) for v in SHIPPED if v.kernel == LOGITS} == types
    for sm in (80, 86, 89, 90, 100, 120):
        for variant in SHIPPED:
            found = fetch(variant, sm)
            assert (found.source, found.kernel.sm, found.kernel.variant) == ("shipped", sm, variant)
            assert f".target sm_{sm}\n" in found.kernel.ptx
    assert ARCHIVE.stat().st_size < 1e6
    assert not place.exists()


def test_looking_up_shipped_ptx_does_not_import_triton() -> None:
    code = (
        "import sys; from engines.flow_score.cache import SHIPPED, kernel; kernel(SHIPPED[0], 80); "
        "assert 'triton' not in sys.modules and 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("gpu", "target"),
    [(80, 80), (87, 86), (89, 89), (90, 90), (95, 90), (103, 100), (110, 100), (121, 120), (130, 120)],
)
def test_a_newer_gpu_takes_the_nearest_lower_targets_ptx(gpu: int, target: int) -> None:
    assert target_for(gpu) == target
    assert kernel(SHIPPED[0], gpu).sm == target


def test_an_older_gpu_is_refused() -> None:
    with pytest.raises(EngineError, match=r"^GPU must be sm_80 or newer for FlowScore's kernels, got sm_75\. .*ort"):
        kernel(SHIPPED[0], 75)


def test_the_rest_is_compiled_once_and_kept(place: Path, compiled: list[tuple[Variant, int]]) -> None:
    assert look_up(RARE, 87) is None
    assert not place.exists()
    first = fetch(RARE, 87)
    assert (first.source, first.kernel) == ("compiled", fake(RARE, 86))
    assert compiled == [(RARE, 86)]
    assert [path.name for path in place.iterdir()] == [file_name(RARE, 86)]
    assert fetch(RARE, 86) == (fake(RARE, 86), "cached")
    assert compiled == [(RARE, 86)]


def test_nothing_to_compile_with_says_what_is_shipped(place: Path, without_triton: None) -> None:
    with pytest.raises(EngineError) as error:
        kernel(RARE, 103)
    message = str(error.value)
    assert message.startswith("PTX of flow_score_logits-bf16-72 for sm_100 must be there, got none: ")
    for said in ("head sizes 32, 64, 128", "fp16, bf16, fp32", "80, 86, 89, 90, 100, 120", "'.[kernels]'"):
        assert said in message
    assert "\n" not in message


def corrupt(content: bytes) -> bytes:
    return content.replace(b".target", b".tarGet")


@pytest.mark.parametrize(
    "damage",
    [corrupt, lambda x: x[:-3], lambda x: b"", lambda x: b"\xff" + x, lambda x: encoded(fake(RARE, 80))],
    ids=["changed", "cut", "empty", "binary", "another's"],
)
def test_damage_in_the_users_cache_is_compiled_anew(
    place: Path,
    compiled: list[tuple[Variant, int]],
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernel(RARE, 90)
    path = place / file_name(RARE, 90)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert fetch(RARE, 90).source == "compiled"
    assert path.read_bytes() == whole
    assert f"{path} is not used" in caplog.text


def damaged_archive(tmp_path: Path, damage: Callable[[bytes], bytes]) -> Path:
    """The archive of one kernel."""
    path = tmp_path / "shipped.zip"
    path.write_bytes(damage(archive([fake(SHIPPED[0], 80)])))
    return path


@pytest.mark.parametrize(
    "damage",
    [lambda x: x[:-30], lambda x: x[:90] + bytes([x[90] ^ 255]) + x[91:], lambda x: b""],
    ids=["cut", "changed", "empty"],
)
def test_damage_in_what_is_shipped_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: list[tuple[Variant, int]],
    damage: Callable[[bytes], bytes],
) -> None:
    monkeypatch.setattr(cache, "ARCHIVE", damaged_archive(tmp_path, lambda x: x))
    assert kernel(SHIPPED[0], 80) == fake(SHIPPED[0], 80)
    monkeypatch.setattr(cache, "ARCHIVE", damaged_archive(tmp_path, damage))
    with pytest.raises(EngineError, match=r"shipped\.zip must be as shipped, got: .+ Install flowcut-trt again\.$"):
        kernel(SHIPPED[0], 80)
    assert compiled == []


def test_a_shipped_file_whose_hash_is_wrong_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shipped.zip"
    with zipfile.ZipFile(path, "w") as file:  # with a checksum that is right
        file.writestr(file_name(SHIPPED[0], 80), corrupt(encoded(fake(SHIPPED[0], 80))))
    monkeypatch.setattr(cache, "ARCHIVE", path)
    with pytest.raises(EngineError, match="its content does not match its hash"):
        kernel(SHIPPED[0], 80)


def test_a_cached_file_of_another_version_is_compiled_again(
    place: Path, compiled: list[tuple[Variant, int]], caplog: pytest.LogCaptureFixture
) -> None:
    kernel(RARE, 80)
    path = place / file_name(RARE, 80)
    _, _, content = path.read_bytes().partition(b"\n")
    content = content.replace(b'"threads"', b'"warps"')
    path.write_bytes(f"// {hashlib.sha256(content).hexdigest()}\n".encode() + content)
    assert kernel(RARE, 80) == fake(RARE, 80)
    assert len(compiled) == 2
    assert "is not used: its facts are another version's" in caplog.text


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: list[tuple[Variant, int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernel(RARE, 80) == fake(RARE, 80)
    assert kernel(RARE, 80) == fake(RARE, 80)
    assert len(compiled) == 2
    assert "is not kept" in caplog.text


def test_the_key_is_of_all_that_the_ptx_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [*SHIPPED, RARE, Variant(LOGITS, "bf16", 80)]
    keys = {cache.key(variant, sm) for variant in variants for sm in TARGETS}
    assert len(keys) == len(variants) * len(TARGETS)
    before = cache.key(Variant(COMBINE), 80)
    for name, value in {"OPTIONS": {}, "COMPILED_AS": {80: 86}, "FORMAT": 0}.items():
        monkeypatch.setattr(cache, name, value)
        assert cache.key(Variant(COMBINE), 80) != before, name
        monkeypatch.undo()
    assert cache.key(Variant(COMBINE), 80) == before
    for name, value in {"num_warps": 2, "max_registers": 96, "constants": {"BLOCK_S": 32}, "pointers": {}}.items():
        with monkeypatch.context() as patch:
            patch.setattr(Variant, name, value)
            assert cache.key(Variant(COMBINE), 80) != before, name
    source = tmp_path / "kernel.py"
    source.write_bytes(cache._SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(cache, "_SOURCE", source)
    assert cache.key(Variant(COMBINE), 80) != before


def test_the_users_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.user_cache() == tmp_path / ".cache" / "flowcut-trt" / "ptx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.user_cache() == tmp_path / ".cache" / "flowcut-trt" / "ptx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.user_cache() == tmp_path / "x" / "flowcut-trt" / "ptx"


def test_compiling_is_logged(
    place: Path, compiled: list[tuple[Variant, int]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        kernel(RARE, 89)
    assert "compiling flow_score_logits-bf16-72 for sm_89" in caplog.text
