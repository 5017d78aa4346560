"""The files of a directory against a record of them: listed without following links, compared by kind, size and hash.

Nothing is opened that is not a plain file: a link may lead out of the directory, a pipe would keep its reader waiting.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flowcut.errors import ConfigError
from flowcut.printable import printable

MANIFEST = "manifest.json"
NOT_LISTED = "not in the manifest"
_CHUNK_BYTES, _MOST_THREADS = 1 << 20, 8
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}
_Result = TypeVar("_Result")
Hash = Callable[[Path], "FileRecord"]


@dataclass(frozen=True)
class FileRecord:
    """One file of an engine directory."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError(f"sha256 must be 64 lower-case hex digits, got {self.sha256!r}.")
        if self.bytes < 0:
            raise ConfigError(f"bytes must be 0 or more, got {self.bytes}.")


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is a relative path, with `/`, that stays inside its directory."""
    if name == MANIFEST or "\0" in name or {"", ".", ".."} & set(name.split("/")):
        raise ConfigError(f"files must be named by paths inside the directory, got {name!r}.")


def files_in(directory: Path) -> dict[str, os.stat_result]:
    """Everything in `directory` and its folders, but the manifest and folders that hold something, by its path with
    `/`; of a link the link itself.

    Raises:
        OSError: a folder that cannot be read.
    """
    found: dict[str, os.stat_result] = {}
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(directory / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                found[name] = entry.stat(follow_symlinks=False)
                found.pop(prefix[:-1], None)  # which is not empty
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
    found.pop(MANIFEST, None)
    return found


def kind_of(status: os.stat_result) -> str:
    """What a path leads to, in words; empty for a plain file."""
    return "" if stat.S_ISREG(status.st_mode) else _KINDS.get(stat.S_IFMT(status.st_mode), "something else")


class NotPlain(OSError):
    """A link, a pipe or another thing that is not opened."""


def open_plain(path: Path) -> io.FileIO:
    """Open a plain file, unbuffered. Anything else is neither followed nor waited for.

    Raises:
        NotPlain, OSError: it cannot be opened.
    """
    kind = kind_of(os.lstat(path))
    descriptor = -1 if kind else os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor >= 0 and (kind := kind_of(os.fstat(descriptor))):  # exchanged in between
        os.close(descriptor)
    if kind:
        raise NotPlain(errno.EINVAL, f"{kind}, not a plain file", str(path))
    return io.FileIO(descriptor)


def record_files(directory: Path) -> dict[str, FileRecord]:
    """A record of every file in `directory`, as `differences` wants it.

    Raises:
        OSError: something that is no plain file or cannot be read.
    """
    found = files_in(directory)
    names = sorted(found, key=lambda name: (-found[name].st_size, name))  # the largest first, to end together
    records = _in_threads(lambda name, digest: digest(directory / name), names)
    return dict(sorted(zip(names, records, strict=True)))


def differences(directory: Path, expected: Mapping[str, FileRecord], hashes: bool = True) -> list[str]:
    """How the files of `directory` differ from `expected`, a line each, in the order of their names; empty where all
    is well. Files are hashed several at a time, where they have the right size and `hashes` is true."""
    try:
        found = files_in(directory)
    except OSError as error:
        return [f"{printable(str(error.filename))}: cannot be read ({error.strerror})"]
    lines, equal = {}, list[str]()
    for name in found.keys() | expected.keys():
        if line := _visible(found.get(name), expected.get(name)):
            lines[name] = line
        else:
            equal.append(name)
    if hashes:
        equal.sort(key=lambda name: (-expected[name].bytes, name))
        hidden = _in_threads(lambda name, digest: _hidden(directory / name, expected[name], digest), equal)
        lines |= {name: line for name, line in zip(equal, hidden, strict=True) if line}
    return [f"{printable(name)}: {line}" for name, line in sorted(lines.items())]


def _visible(found: os.stat_result | None, expected: FileRecord | None) -> str:
    """What differs that can be seen without opening the file."""
    if found is None:
        return "missing"
    if expected is None:
        return ", ".join([NOT_LISTED, *filter(None, [kind_of(found)])])
    if kind := kind_of(found):
        return f"expected a plain file, got {kind}"
    if found.st_size != expected.bytes:
        return f"expected {expected.bytes} bytes, got {found.st_size}"
    return ""


def _hidden(path: Path, expected: FileRecord, digest: Hash) -> str:
    try:
        got = digest(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if got == expected else f"expected sha256 {expected.sha256}, got {got.sha256}"


def _in_threads(work: Callable[[str, Hash], _Result], names: Iterable[str]) -> list[_Result]:
    """work(name, digest) for each name, several at a time: hashlib and reads leave the interpreter to others.

    Ctrl-C ends it at once, rather than after gigabytes.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        try:
            return list(pool.map(lambda name: work(name, lambda path: _digest(path, stop)), names))
        except BaseException:
            stop.set()
            raise


def _digest(path: Path, stop: threading.Event) -> FileRecord:
    """The record of a file as far as it was read before `stop`."""
    found, size, chunk = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK_BYTES))
    with open_plain(path) as file:
        while not stop.is_set() and (count := file.readinto(chunk)):
            found.update(chunk[:count])
            size += count
    return FileRecord(found.hexdigest(), size)
