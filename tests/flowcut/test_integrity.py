"""Files are compared with their record by kind, size and content, and nothing but plain files is opened."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flowcut import integrity
from flowcut.integrity import FileRecord, NotPlain, differences, open_plain, record_files

CONTENT = {"a": b"one", "b": b"two2", "deep/c": b""}


def record(content: bytes) -> FileRecord:
    return FileRecord(hashlib.sha256(content).hexdigest(), len(content))


RECORDS = {name: record(content) for name, content in CONTENT.items()}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Beside it lies a file with the content of `a`, for those who leave the directory."""
    (tmp_path / "e" / "deep").mkdir(parents=True)
    for name, content in CONTENT.items():
        (tmp_path / "e" / name).write_bytes(content)
    (tmp_path / "e" / "manifest.json").touch()
    (tmp_path / "secret").write_bytes(CONTENT["a"])
    return tmp_path / "e"


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def bind(path: Path) -> None:
    """A socket's name may have no more than 108 bytes, so it is made in its folder."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def test_records_are_those_of_every_file_but_the_manifest(directory: Path) -> None:
    assert record_files(directory) == RECORDS
    assert list(record_files(directory)) == sorted(RECORDS)
    assert differences(directory, RECORDS) == []


def test_files_larger_than_one_read_are_hashed_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    (tmp_path / "big").write_bytes(content)
    assert record_files(tmp_path) == {"big": record(content)}


# What is in the way of a file, and what is said.
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "link out": (lambda p: p.symlink_to(p.parent.parent / "secret"), "a symbolic link"),
    "link inside": (lambda p: p.symlink_to(p.parent / "b"), "a symbolic link"),
    "link to nothing": (lambda p: p.symlink_to("nowhere"), "a symbolic link"),
    "link to a folder": (lambda p: p.symlink_to("deep"), "a symbolic link"),
    "pipe": (os.mkfifo, "a pipe"),
    "socket": (bind, "a socket"),
}


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_not_opened(directory: Path, kind: str, hashes: bool) -> None:
    make, said = KINDS[kind]
    replace_by(directory / "a", make)
    assert differences(directory, RECORDS, hashes) == [f"a: expected a plain file, got {said}"]
    with pytest.raises(NotPlain):
        open_plain(directory / "a")
    make(directory / "new")
    assert f"new: not in the manifest, {said}" in differences(directory, RECORDS, hashes)


def test_a_folder_in_a_files_place_is_missing_it(directory: Path) -> None:
    replace_by(directory / "a", Path.mkdir)
    assert differences(directory, RECORDS) == ["a: expected a plain file, got a folder"]


def test_an_empty_folder_shows(directory: Path) -> None:
    (directory / "empty").mkdir()
    (directory / "deep" / "er" / "est").mkdir(parents=True)
    assert differences(directory, RECORDS) == [
        "deep/er/est: not in the manifest, a folder",
        "empty: not in the manifest, a folder",
    ]
    with pytest.raises(NotPlain, match="a folder"):
        record_files(directory)


def test_an_empty_directory_has_nothing(tmp_path: Path) -> None:
    assert record_files(tmp_path) == {}


def test_a_link_in_a_folders_place_is_not_followed(directory: Path) -> None:
    (directory / "deep").rename(directory.parent / "deep")
    (directory / "deep").symlink_to(directory.parent / "deep")
    assert differences(directory, RECORDS) == ["deep: not in the manifest, a symbolic link", "deep/c: missing"]


def test_what_became_a_pipe_after_it_was_listed_is_not_waited_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a path and its opening somebody may exchange it."""
    plain = os.lstat(directory / "b")
    replace_by(directory / "a", os.mkfifo)
    monkeypatch.setattr(integrity.os, "lstat", lambda path: plain)
    with pytest.raises(NotPlain, match="a pipe"):
        open_plain(directory / "a")


def test_files_exchanged_with_each_other_show(directory: Path) -> None:
    (directory / "a").rename(directory / "x")
    (directory / "b").rename(directory / "a")
    (directory / "x").rename(directory / "b")
    assert differences(directory, RECORDS) == ["a: expected 3 bytes, got 4", "b: expected 4 bytes, got 3"]


def test_content_shows_only_where_it_is_read(directory: Path) -> None:
    (directory / "a").write_bytes(b"ONE")
    assert differences(directory, RECORDS, hashes=False) == []
    (line,) = differences(directory, RECORDS)
    assert line == f"a: expected sha256 {RECORDS['a'].sha256}, got {hashlib.sha256(b'ONE').hexdigest()}"


def test_names_stay_on_one_line(directory: Path) -> None:
    name = os.fsdecode(b"a\nb\xff")
    (directory / name).touch()
    assert differences(directory, RECORDS) == [r"a\nb\udcff: not in the manifest"]


def test_what_cannot_be_read_is_a_difference(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "open_plain", refuse)
        assert differences(directory, RECORDS) == [f"{name}: cannot be read (Permission denied)" for name in RECORDS]
        with pytest.raises(PermissionError):
            record_files(directory)
    monkeypatch.setattr(integrity.os, "scandir", refuse)
    assert differences(directory, RECORDS) == [f"{directory}: cannot be read (Permission denied)"]


def test_several_files_are_hashed_at_a_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hashes meet, which one after another could not."""
    barrier, digest = threading.Barrier(2, timeout=60), integrity._digest
    monkeypatch.setattr(integrity.os, "cpu_count", lambda: 2)

    def meet(path: Path, stop: threading.Event) -> FileRecord:
        if path.name in "ab":
            barrier.wait()
        return digest(path, stop)

    monkeypatch.setattr(integrity, "_digest", meet)
    assert differences(directory, RECORDS) == []


def test_an_interruption_ends_hashing_at_the_next_piece(directory: Path) -> None:
    """`stop` is what Ctrl-C sets."""
    stop = threading.Event()
    stop.set()
    assert integrity._digest(directory / "a", stop).bytes == 0

    def interrupted(name: str, digest: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        integrity._in_threads(interrupted, ["a", "b"])
