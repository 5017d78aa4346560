"""Kernels of TensorRT-RTX on disk: written, read, refused. On the fake GPU, whose library compiles for new shapes."""

from __future__ import annotations

import gc
import logging
import shutil
from pathlib import Path

import fake_gpu
import pytest
from fake_gpu import VERSION, FakeGpu
from tiny_engine import TinyEngine, write_engine
from trt_feeds import close, follow, prompts, reference, session_of

from engines import load_engine
from engines.runtime.sampling import Sampling
from engines.sessions import runtime_cache
from engines.sessions.runtime_cache import cache_path
from flowcut.artifacts import check_files, read_manifest
from flowcut.errors import EngineError

SHA = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("kernels") / "engine", precision="fp16", backend="rtx")


@pytest.fixture
def tiny(built: TinyEngine, tmp_path: Path) -> TinyEngine:
    directory = shutil.copytree(built.directory, tmp_path / "engine")
    return TinyEngine(directory, built.model, built.schedule, built.budget)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def file(tiny: TinyEngine) -> Path:
    return tiny.directory.parent / "engine.runtime-cache" / f"language-{SHA[:16]}-{VERSION}-sm{fake_gpu.SM}.bin"


def ask(tiny: TinyEngine, gpu: FakeGpu, sha256: str = SHA) -> int:
    """Kernels that a session compiles for a prompt and four steps, from its start to its end."""
    before, session = gpu.compiled, session_of(tiny, "language", "rtx", sha256)
    assert close(follow(session, prompts()), follow(reference(tiny, "language"), prompts()))
    session.close()
    return gpu.compiled - before


def test_what_one_start_compiles_the_next_one_has(tiny: TinyEngine, gpu: FakeGpu, file: Path) -> None:
    assert ask(tiny, gpu) == 2
    assert cache_path(tiny.directory / "language.engine", SHA, VERSION, f"sm{fake_gpu.SM}") == file
    content = file.read_bytes()
    assert ask(tiny, gpu) == 0
    assert file.read_bytes() == content


def test_it_is_written_behind_the_first_run(tiny: TinyEngine, gpu: FakeGpu, file: Path) -> None:
    session = session_of(tiny, "language", "rtx", SHA)
    assert not file.exists()
    follow(session, prompts(), 0)
    first = file.read_bytes()
    follow(session, prompts(), 3)
    assert file.read_bytes() == first  # not behind each
    follow(session, prompts(), 8)
    assert len(file.read_bytes()) > len(first)


def test_it_is_written_when_the_session_goes(tiny: TinyEngine, gpu: FakeGpu, file: Path) -> None:
    session = session_of(tiny, "language", "rtx", SHA)
    follow(session, prompts(), 3)
    first = file.read_bytes()
    del session
    gc.collect()
    assert len(file.read_bytes()) > len(first)


def test_it_is_beside_the_directory_which_stays_as_it_was(tiny: TinyEngine, gpu: FakeGpu) -> None:
    engine = load_engine(tiny.directory, "rtx")
    engine.generate([], "hello", Sampling(2))
    engine.close()
    assert check_files(tiny.directory, read_manifest(tiny.directory)) == []
    written = sorted(path.name for path in (tiny.directory.parent / "engine.runtime-cache").iterdir())
    files = read_manifest(tiny.directory).files
    ending = f"{VERSION}-sm{fake_gpu.SM}.bin"
    assert f"language-{files['language.engine'].sha256[:16]}-{ending}" in written
    assert all(name.endswith(ending) for name in written)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "foreign"])
def test_a_damaged_one_is_ignored_and_replaced(
    tiny: TinyEngine, gpu: FakeGpu, file: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ask(tiny, gpu)
    whole = file.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    file.write_bytes({"flipped": flipped, "cut": whole[:-1], "empty": b"", "foreign": b"something else"}[damage])
    assert ask(tiny, gpu) == 2
    assert "is damaged, so kernels are compiled again" in caplog.text
    assert file.read_bytes() == whole


def test_one_that_the_library_refuses_is_replaced(
    tiny: TinyEngine, gpu: FakeGpu, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer driver, say, which the file's name does not tell."""
    caplog.set_level(logging.INFO, "flowcut")
    ask(tiny, gpu)
    old = file.read_bytes()
    monkeypatch.setattr("fake_tensorrt.VERSION", "of another driver")
    session = session_of(tiny, "language", "rtx", SHA)
    follow(session, prompts())
    session.close()
    assert "is of another library or GPU" in caplog.text
    assert file.read_bytes() != old


def test_an_unwritable_place_is_said_once_and_no_error(
    tiny: TinyEngine, gpu: FakeGpu, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.write_text("a file where the folder should be", encoding="utf-8")
    session = session_of(tiny, "language", "rtx", SHA)
    for _ in range(3):
        follow(session, prompts(), 6)
    session.close()
    said = [r for r in caplog.records if r.levelno >= logging.WARNING and "not kept for the next start" in r.message]
    assert len(said) == 1


def test_a_full_disk_is_no_error(
    tiny: TinyEngine, gpu: FakeGpu, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise EngineError(f"{path} must be writable, got: No space left on device.")

    monkeypatch.setattr(runtime_cache, "write_file", full)
    assert ask(tiny, gpu) == 2
    assert "No space left on device" in caplog.text
    assert not file.exists()


def test_kernels_of_an_engine_that_was_replaced_go(tiny: TinyEngine, gpu: FakeGpu, file: Path) -> None:
    ask(tiny, gpu)
    others = [file.with_name(f"{graph}-{SHA[:16]}-{VERSION}-sm89.bin") for graph in ("vision", "language.0")]
    same = file.with_name(f"language-{'f' * 16}-9.9-sm120.bin")
    for path in (*others, same):
        path.write_bytes(b"")
    ask(tiny, gpu, "f" * 64)
    assert not file.exists()
    assert all(path.exists() for path in (*others, same))


@pytest.mark.parametrize("backend", ["trt", "rtx"])
def test_without_its_hash_or_with_tensorrt_nothing_is_kept(tiny: TinyEngine, gpu: FakeGpu, backend: str) -> None:
    session = session_of(tiny, "language", backend, SHA if backend == "trt" else "")
    follow(session, prompts())
    session.close()
    assert [path.name for path in tiny.directory.parent.iterdir()] == ["engine"]
