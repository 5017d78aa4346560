"""Replacing a directory whole or not at all.

The new content grows in a hidden directory beside the target and is swapped in when it is complete, so that at any
moment, a kill included, the target is the old directory, the new one, or absent as it was before.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flowcut.errors import EngineError

_NOTHING = 1 << 22  # bytes; a disk with less counts as full
_NO_FOLDER = "A part of that path is a file or a link to itself: move it away, or build elsewhere."
_REMEDIES = {
    errno.ENOSPC: "Free some space there, or build into a directory on another disk.",
    errno.EDQUOT: "Free some of your quota, or build into a directory on another disk.",
    errno.EFBIG: "Raise the file size limit (ulimit -f), or build into a directory on another file system.",
    errno.EROFS: "Build into a directory on a writable disk.",
    errno.EACCES: "Build into a directory that you may write to.",
    errno.EPERM: "Build into a directory that you may write to.",
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.ELOOP: _NO_FOLDER,
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EXDEV: "This file system cannot replace the old directory: remove it, then build again.",
    errno.EIO: "The disk reports a fault: build into a directory on another one.",
}


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise EngineError if the disk that holds, or will hold, `path` has less than `needed_bytes` free."""
    if (free := _free(path)) < needed_bytes:
        raise EngineError(
            f"free space for {path} must be at least {_megabytes(needed_bytes)}, got {_megabytes(free)}. "
            + _REMEDIES[errno.ENOSPC]
        )


@contextmanager
def replacing(target: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield an empty directory that replaces `target` when the block ends well, and vanishes when it does not.

    `check` is called with `target` at the start and just before the swap; it raises if what is there may not go.

    Raises:
        EngineError: the disk refuses (space, permission, ...).
    """
    target = Path(os.path.realpath(target))
    with _write_errors(target):
        check(target)
        new_parent = not target.parent.exists()
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent):
            _clean(target)
            partial = _sibling(target, "partial")
            partial.mkdir()
            lock = _lock(partial)
        try:
            yield partial
            _sync(partial)
            with _locked(target.parent):
                check(target)
                _swap(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # after a swap this is the old directory
            os.close(lock)
            if new_parent:
                with suppress(OSError):  # not empty: the target is in it
                    target.parent.rmdir()


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that `path` is the old one or the new one, complete.

    Raises:
        EngineError: the disk refuses, or the folder does not exist.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise EngineError(f"{path.parent} must be a directory to write {path.name} into, got none. Create it first.")
    if path.is_dir():
        raise EngineError(f"{path} must be a file to write, got a directory. Choose another name.")
    partial = _sibling(path, "partial")
    with _write_errors(path):
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            error.filename = str(path)  # the name that the user gave
            raise
        finally:
            partial.unlink(missing_ok=True)


def _swap(new: Path, target: Path) -> None:
    """Put `new` where `target` is; a replaced directory is left at `new`."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        old = _sibling(target, "old")
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
        old.rename(new)
    with _opened(target.parent) as directory:
        os.fsync(directory)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two paths atomically (Linux's renameat2), or return False where that does not exist."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _clean(target: Path) -> None:
    """Remove what killed builds of `target` left; bring back an old directory they had moved aside.

    A living build holds a lock on its directory. Process ids prove nothing: containers share disks, not ids.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.[0-9a-f]+\.(partial|old)")
    for path in sorted(p for p in target.parent.iterdir() if pattern.fullmatch(p.name)):
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
            continue
        with suppress(OSError), _opened(path) as directory:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.{kind}")


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(directory: Path) -> int:
    """A descriptor that holds the lock of `directory` until it is closed or the process dies."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # a file system without locks: builds there must not run at the same time
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock = _lock(directory)
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Turn what the disk says into one line with the remedy. Other OSErrors are not ours to explain and pass."""
    try:
        yield
    except OSError as error:
        # numpy's tofile reports a full disk without an errno.
        code = error.errno or (errno.ENOSPC if _free(target) < _NOTHING else 0)
        where = str(error.filename or target)
        if code not in _REMEDIES or not (target.is_relative_to(where) or where.startswith(str(target.parent))):
            raise
        raise EngineError(
            f"{where} must be writable, got: {os.strerror(code)} ({_megabytes(_free(target))} free). " + _REMEDIES[code]
        ) from error


def _free(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or that would."""
    # os.path.isdir, because Path.is_dir raises where a folder on the way is closed to us.
    absolute = path.absolute()
    return shutil.disk_usage(next(p for p in (absolute, *absolute.parents) if os.path.isdir(p))).free  # noqa: PTH112


def _sync(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file)
        with _opened(Path(folder)) as descriptor:
            os.fsync(descriptor)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
