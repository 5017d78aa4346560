"""Replacing a directory, or a file, whole or not at all.

The new content grows under a hidden name beside the target and is swapped in when it is complete and on the disk, so
that at any moment, a kill included, the target is the old one, the new one, or absent as it was before. A file system
that cannot exchange two directories (renameat2) has none of the two for the moment between two renames; what was moved
aside comes back at the next build.

Hidden names are locked by the process that fills them. What carries one and is not locked was left by a killed process,
and whoever writes beside it next removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from flowcut.errors import EngineError

LOG = logging.getLogger("flowcut.disk")
_NOTHING = 1 << 22  # bytes; a disk with less counts as full
_LEFTOVER = re.compile(r"\.(.+)\.\d+\.[0-9a-f]{8}\.(partial|old)")  # as _sibling makes them
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
    errno.EBUSY: "A disk is mounted there: build into a folder on it.",
    errno.EIO: "The disk reports a fault: build into a directory on another one.",
}


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise EngineError if the disk that holds, or will hold, `path` has less than `needed_bytes` free."""
    if (free := _free(path)) < needed_bytes:
        raise EngineError(
            f"free space for {path} must be at least {_megabytes(needed_bytes)}, got {_megabytes(free)}. "
            + _REMEDIES[errno.ENOSPC]
        )


def remove_leftovers(target: Path) -> None:
    """Remove what killed builds left in the folder of `target`; bring back what they had moved aside.

    `replacing` and `write_file` do so themselves. Before a check of the free space, as leftovers may be what fills it.
    """
    folder = Path(os.path.realpath(target)).parent
    with suppress(OSError), _locked(folder):
        _clean(folder)


@contextmanager
def replacing(target: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield an empty directory that replaces `target` when the block ends well, and vanishes when it does not.

    `check` is called with `target` at the start and just before the swap; it raises if what is there may not go.

    Raises:
        EngineError: the disk refuses (space, permission, ...).
    """
    target = Path(os.path.realpath(target))
    with _write_errors(target):
        # Behind the lock, else where directories take two renames another build's could be in the midst of them.
        with _locked(target.parent) if target.parent.is_dir() else nullcontext():
            check(target)
            _check_movable(target)
        with ExitStack() as stack:
            try:
                partial = _begin(target, stack)
            except FileNotFoundError:  # a build that failed took away the folder, which it had made
                partial = _begin(target, stack)
            yield partial
            _sync(partial)
            with _locked(target.parent):
                check(target)
                _swap(partial, target)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that `path` is the old one or the new one, complete.

    Raises:
        EngineError: the disk refuses, or the folder does not exist.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise EngineError(f"{path.parent} must be a directory to write {path.name} into, got none. Create it first.")
    if path.exists() and not path.is_file():  # root could even replace /dev/null
        found = "a directory" if path.is_dir() else "a device or pipe"
        raise EngineError(f"{path} must be a file to write, got {found}. Choose another name.")
    with _write_errors(path):
        try:
            with _hidden(path, Path.touch) as partial:
                partial.write_bytes(content)
                _sync_file(partial)
                partial.replace(path)
                _sync_folder(path.parent)
        except OSError as error:
            error.filename = str(path)  # the name that the user gave
            raise


def _check_movable(target: Path) -> None:
    """What the last step would refuse, before hours of work. A parent's permission alone would do to rename."""
    if target.is_mount():
        raise OSError(errno.EBUSY, "", str(target))
    if target.exists() and not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, "", str(target))


def _begin(target: Path, stack: ExitStack) -> Path:
    """The hidden directory, in a folder that is made if need be."""
    stack.enter_context(_folders(target.parent))
    return stack.enter_context(_hidden(target, Path.mkdir))


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; those that nothing is in at the end go again."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]  # deepest first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            _sync_folder(made.parent)
        yield
    finally:
        for made in missing:
            with suppress(OSError):
                made.rmdir()


@contextmanager
def _hidden(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """What `make` makes under a name beside `target`, which is gone at the end, whatever is there by then."""
    partial, lock = _sibling(target), -1
    try:
        try:
            with _locked(target.parent):  # else another's cleaning could come before the lock
                _clean(target.parent)
                make(partial)
                lock = _lock(partial)
            yield partial
        finally:
            _remove(partial)  # after a swap this is the old directory
    finally:  # once more, as Ctrl-C may have come in the midst of that
        _remove_or_warn(partial)
        if lock >= 0:
            os.close(lock)


def _swap(new: Path, target: Path) -> None:
    """Put `new` where `target` is; a replaced directory is left at `new`."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        _rename_twice(new, target)
    _sync_folder(target.parent)


def _rename_twice(new: Path, target: Path) -> None:
    """As _exchange, for file systems that cannot. A kill between the renames leaves the old directory to `_clean`."""
    old = new.with_suffix(".old")
    try:
        target.rename(old)
        new.rename(target)
    finally:
        if not target.exists():  # refused or interrupted on the way
            old.rename(target)
        elif old.exists():
            old.rename(new)


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


def _clean(folder: Path) -> None:
    """Remove what killed processes left in `folder`; bring back an old directory they had moved aside.

    A living process holds a lock. Its id would prove nothing: containers share disks, not ids.
    """
    for name in sorted(os.listdir(folder)):  # noqa: PTH208 - once for each file written, and folders may be full
        if match := _LEFTOVER.fullmatch(name):
            with suppress(OSError):  # somebody else's, or just gone
                _clean_one(folder / name, folder / match[1])


def _clean_one(path: Path, target: Path) -> None:
    if path.suffix == ".old" and not os.path.lexists(target):
        path.rename(target)
        return
    with _opened(path) as leftover:
        try:
            fcntl.flock(leftover, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError as error:  # a file system without locks
            LOG.warning("%s: left by a killed build, or a living one's (%s). Remove it if none is.", path, error)
            return
        _remove_or_warn(path)


def _remove_or_warn(path: Path) -> None:
    _remove(path)
    if os.path.lexists(path):
        LOG.warning("%s: left by a build, and could not be removed. Remove it.", path)


def _remove(path: Path) -> None:
    """A file, or a directory with all in it, as far as the disk lets us."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # of a link or pipe nothing is wanted
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    """A descriptor that holds the lock of `path` until it is closed or the process dies."""
    descriptor = os.open(path, os.O_RDONLY)
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
        if code not in _REMEDIES or not _ours(Path(where), target):
            raise
        raise EngineError(
            f"{where} must be writable, got: {os.strerror(code)} ({_megabytes(_free(target))} free). " + _REMEDIES[code]
        ) from error


def _ours(path: Path, target: Path) -> bool:
    """Above the target, at or in it, or in a hidden directory of its. A checkpoint beside it is not."""
    if not path.is_relative_to(target.parent):
        return target.is_relative_to(path)
    name, *_ = *path.relative_to(target.parent).parts, target.name
    match = _LEFTOVER.fullmatch(name)
    return (match[1] if match else name) == target.name


def _free(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or that would."""
    # os.path.isdir, because Path.is_dir raises where a folder on the way is closed to us.
    absolute = path.absolute()
    return shutil.disk_usage(next(p for p in (absolute, *absolute.parents) if os.path.isdir(p))).free  # noqa: PTH112


def _sync(directory: Path) -> None:
    """What is in files before their names: a power cut keeps what was on the disk, in no other order."""
    for folder, _, names in os.walk(directory, onerror=_raise):
        for name in names:
            _sync_file(Path(folder) / name)
        _sync_folder(Path(folder))


def _raise(error: OSError) -> None:
    raise error


def _sync_file(path: Path) -> None:
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    with _opened(path) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some shared disks cannot, for folders
                raise


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
