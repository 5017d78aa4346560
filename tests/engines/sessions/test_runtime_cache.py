"""Kernels of TensorRT-RTX on disk: written, read, refused. On the fake GPU, whose library compiles for new shapes."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import fake_gpu
import pytest
from fake_gpu import VERSION, FakeGpu, WatchedLock
from tiny_engine import TinyEngine, write_engine
from trt_feeds import close, follow, prompts, reference, session_of

from engines import load_engine
from engines.runtime.sampling import Sampling
from engines.sessions import runtime_cache
from engines.sessions.cuda_device import CudaDevice
from engines.sessions.runtime_cache import RuntimeCache, cache_path
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


def writable_file(file: Path) -> None:
    file.chmod(0o620)


def writable_folder(file: Path) -> None:
    file.parent.chmod(0o702)


def linked_file(file: Path) -> None:
    file.symlink_to(file.rename(file.parent.parent / "elsewhere"))


def linked_folder(file: Path) -> None:
    file.parent.symlink_to(file.parent.rename(file.parent.parent / "elsewhere"))


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (writable_file, "bin must be yours or root's, and writable for nobody else, got -rw--w---- of user"),
        (writable_folder, "engine.runtime-cache must be yours or root's, and writable for nobody else, got drwx----w-"),
        (linked_file, "bin cannot be read (a symbolic link, not a plain file)"),
        (linked_folder, "engine.runtime-cache must be yours or root's, and writable for nobody else, got lrwxrwxrwx"),
        (pipe, "bin cannot be read (a pipe, not a plain file)"),
    ],
)
def test_what_somebody_else_may_have_written_is_not_used(
    tiny: TinyEngine,
    gpu: FakeGpu,
    file: Path,
    change: Callable[[Path], None],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ask(tiny, gpu)
    change(file)
    before = {path: path.stat().st_mtime_ns for path in file.parent.parent.rglob("*") if path.is_file()}
    assert ask(tiny, gpu) == 2
    assert said in caplog.text
    after = {path: path.stat().st_mtime_ns for path in before if path != file}
    assert after == {path: time for path, time in before.items() if path != file}
    if change in (writable_file, linked_file):  # in a folder that is ours: replaced
        assert not file.is_symlink()
        assert ask(tiny, gpu) == 0


@pytest.mark.parametrize(
    ("owner", "mode", "ours"),
    [(0, 0o755, True), (7, 0o700, True), (8, 0o700, False), (7, 0o770, False), (0, 0o757, False)],
)
def test_owner_and_mode_decide(owner: int, mode: int, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_cache.os, "geteuid", lambda: 7)
    status = os.stat_result((stat.S_IFDIR | mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))
    with nullcontext() if ours else pytest.raises(EngineError, match=rf"^x must be yours .* of user {owner}\. Remove"):
        runtime_cache._check_ours(Path("x"), status)


def test_it_is_its_owners_alone_whatever_the_umask(tiny: TinyEngine, gpu: FakeGpu, file: Path) -> None:
    before = os.umask(0)
    try:
        ask(tiny, gpu)
    finally:
        os.umask(before)
    assert (stat.S_IMODE(file.parent.stat().st_mode), stat.S_IMODE(file.stat().st_mode)) == (0o700, 0o600)
    assert ask(tiny, gpu) == 0


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


def test_who_ends_last_does_not_remove_what_the_directory_has_now(tiny: TinyEngine, gpu: FakeGpu, file: Path) -> None:
    """The engine was built again while a process still ran the old one."""
    new = read_manifest(tiny.directory).files["language.engine"].sha256
    ours, old = (cache_path(tiny.directory / "language.engine", sha, VERSION, "sm89") for sha in (new, SHA))
    first, second = (session_of(tiny, "language", "rtx", sha) for sha in (SHA, new))
    for session in (first, second):
        follow(session, prompts(), 0)
    assert (ours.exists(), old.exists()) == (True, False)
    follow(first, prompts(), 3)
    first.close()
    assert (ours.exists(), old.exists()) == (True, True)
    follow(second, prompts(), 3)
    second.close()
    assert (ours.exists(), old.exists()) == (True, False)


def test_kernels_of_another_version_go_those_for_another_gpu_stay(tiny: TinyEngine, gpu: FakeGpu, file: Path) -> None:
    file.parent.mkdir(mode=0o700)
    version, other_gpu = (file.with_name(f"language-{SHA[:16]}-{v}") for v in ("0.9-sm89.bin", "0.9-sm90.bin"))
    for path in (version, other_gpu):
        path.write_bytes(b"")
    ask(tiny, gpu)
    assert [path.exists() for path in (file, version, other_gpu)] == [True, False, True]


@pytest.mark.parametrize("returned", [None, RuntimeError("out of\nmemory")])
def test_a_library_that_gives_no_kernels_spoils_no_answer(
    tiny: TinyEngine,
    gpu: FakeGpu,
    file: Path,
    returned: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def serialize(cache: object) -> object:
        if isinstance(returned, Exception):
            raise returned
        return returned

    monkeypatch.setattr("fake_tensorrt.RuntimeCache.serialize", serialize)
    assert ask(tiny, gpu) == 2
    assert f"{file} was not written" in caplog.text
    assert not file.exists()


def test_the_later_kernels_are_written_later(
    gpu: FakeGpu, file: Path, tiny: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first thread is held while it writes, until the second one waits for it or, wrongly, is done."""
    device, contents, write = CudaDevice("rtx"), iter([b"old", b"new"]), runtime_cache.write_file
    cache = RuntimeCache(file, SimpleNamespace(serialize=lambda: next(contents)), device)
    writes, may_go = threading.Event(), threading.Event()

    def held(path: Path, content: bytes) -> None:
        if content.endswith(b"old"):
            writes.set()
            assert may_go.wait(60)
        write(path, content)

    def second_run() -> None:
        cache.close()
        may_go.set()

    monkeypatch.setattr(runtime_cache, "write_file", held)
    first, second = threading.Thread(target=cache.count_run), threading.Thread(target=second_run)
    cache._saving = WatchedLock(  # type: ignore[assignment]
        cache._saving, lambda: may_go.set() if threading.current_thread() is second else None
    )
    first.start()
    assert writes.wait(60)
    second.start()
    for thread in (first, second):
        thread.join()
    assert file.read_bytes().endswith(b"new")


@pytest.mark.parametrize("backend", ["trt", "rtx"])
def test_without_its_hash_or_with_tensorrt_nothing_is_kept(tiny: TinyEngine, gpu: FakeGpu, backend: str) -> None:
    session = session_of(tiny, "language", backend, SHA if backend == "trt" else "")
    follow(session, prompts())
    session.close()
    assert [path.name for path in tiny.directory.parent.iterdir()] == ["engine"]
