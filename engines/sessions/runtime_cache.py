"""Kernels that TensorRT-RTX compiled for this GPU, kept on disk so that the next start need not compile them again.

They are beside the engine directory, whose content the manifest fixes:

    <directory>.runtime-cache/<graph>-<engine's sha256, 16 digits>-<library's version>-<sm of the GPU>.bin

A file begins with the SHA-256 of the rest: one that is damaged is ignored and replaced, as is one that the library
finds to be of another version or GPU. **It is executable code**, as the engine itself is, and like the manifest's
hashes this one shows integrity, not authenticity: whoever may write there may run code in this process. So the folder
is made for its owner alone, and it and its files are used only where they belong to this user or root and nobody else
may write to them. Who may write to the folder that it is in can put another in its place: that one counts too. Removing
it is always safe.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import stat
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from engines.sessions.cuda_device import CudaDevice
from flowcut.atomic import write_file
from flowcut.errors import EngineError, FlowCutError
from flowcut.integrity import MANIFEST, open_plain

LOG = logging.getLogger("flowcut.tensorrt")
_MAGIC = b"flowcut runtime cache 1 "
_HEADER = len(_MAGIC) + 65  # then a sha256 in hex and a newline
_SAVE_AFTER = {1, 10, 100, 1000}
"""Runs behind which to look for new kernels: those for a shape are compiled while its first runs are under way."""


def cache_path(plan: Path, sha256: str, version: str, capability: str) -> Path:
    """Where the kernels of an engine file belong."""
    directory = Path(os.path.realpath(plan.parent))
    name = f"{plan.stem}-{sha256[:16]}-{version}-{capability}.bin"
    return directory.with_name(f"{directory.name}.runtime-cache") / name


class RuntimeCache:
    """The library's cache of one engine, and its file.

    Args:
        cache: an IRuntimeCache, filled from the file where that is whole and fits.
    """

    def __init__(self, path: Path, cache: Any, device: CudaDevice) -> None:
        self.cache = cache
        self._path, self._device, self._runs = path, device, itertools.count(1)
        self._writable, self._saved, self._saving = True, "", threading.Lock()
        self._load()

    def count_run(self) -> None:
        """Say that the engine has run; saves now and then."""
        if next(self._runs) in _SAVE_AFTER:
            self._save(self._device.lock, logging.WARNING)  # nobody may compile meanwhile

    def close(self) -> None:
        """Save, at the end of the engine's life: nobody compiles any more. The driver may be gone when Python ends."""
        self._save(nullcontext(), logging.DEBUG)

    def _save(self, lock: AbstractContextManager[Any], level: int) -> None:
        """Nothing that goes wrong here spoils a request. The later content is written later."""
        try:
            with self._saving:
                self._device.set_current()
                with lock:
                    content = self._content()
                self._write(content)
        except Exception as error:  # whatever the library raises, or returns in place of bytes
            LOG.log(level, "%s was not written: %s", self._path, " ".join(str(error).split()))

    def _load(self) -> None:
        try:
            stored = _read(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            LOG.warning("%s cannot be read (%s), so kernels are compiled again.", self._path, error.strerror)
            return
        except EngineError as error:
            LOG.warning("kernels are compiled again: %s", error)
            return
        header, content = stored[:_HEADER], stored[_HEADER:]
        if header != _header(content):
            LOG.warning("%s is damaged, so kernels are compiled again and it is replaced.", self._path)
        elif not self.cache.deserialize(content):
            LOG.info("%s is of another library or GPU, so it is replaced.", self._path)
        else:
            self._saved = hashlib.sha256(content).hexdigest()

    def _content(self) -> bytes:
        return bytes(memoryview(self.cache.serialize()))

    def _write(self, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        if digest == self._saved or not self._writable:
            return
        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            _check_ours(self._path.parent, os.lstat(self._path.parent))
            if self._path.is_symlink():
                self._path.unlink()  # or what it leads to would be written
            write_file(self._path, _header(content) + content)
            self._path.chmod(0o600)  # whatever the umask: it would not be read again
            self._remove_old()
        except (FlowCutError, OSError) as error:
            self._writable = False
            LOG.warning("kernels are not kept for the next start: %s", " ".join(str(error).split()))
        self._saved = digest

    def _remove_old(self) -> None:
        """Kernels of other versions for this GPU, and of engines that the directory no longer has: they would pile up.

        Which it has, the manifest says: a process that still runs a replaced engine may be the last to write.
        """
        graph, sha256, rest = self._path.name.split("-", 2)
        manifest = self._path.parent.with_suffix("") / MANIFEST
        listed = manifest.read_text(encoding="utf-8", errors="replace") if manifest.is_file() else None
        for path in self._path.parent.glob(f"{graph}-*-*-{rest.rpartition('-')[2]}"):
            other = path.name.split("-", 2)[1]
            stale = path != self._path if other == sha256 else listed is not None and other not in listed
            if stale:
                path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    """A file of kernels.

    Raises:
        OSError: it is not there, no plain file, or cannot be read. EngineError: somebody else may have written it.
    """
    _check_ours(path.parent, os.lstat(path.parent))
    with open_plain(path) as file:
        _check_ours(path, os.fstat(file.fileno()))
        return file.read()


def _check_ours(path: Path, status: os.stat_result) -> None:
    """Raise EngineError unless none but this user and root may write to what has this status. A link has no owner of
    what it leads to, and all may write to it: it is refused."""
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        got = f"{stat.filemode(status.st_mode)} of user {status.st_uid}"
        raise EngineError(f"{path} must be yours or root's, and writable for nobody else, got {got}. Remove it.")


def _header(content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n"
