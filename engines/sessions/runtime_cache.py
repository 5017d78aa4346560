"""Kernels that TensorRT-RTX compiled for this GPU, kept on disk so that the next start need not compile them again.

They are beside the engine directory, whose content the manifest fixes:

    <directory>.runtime-cache/<graph>-<engine's sha256, 16 digits>-<library's version>-<sm of the GPU>.bin

A file begins with the SHA-256 of the rest: one that is damaged is ignored and replaced, as is one that the library
finds to be of another version or GPU. **It is executable code**, as the engine itself is, and like the manifest's
hashes this one shows integrity, not authenticity: whoever may write there may run code in this process. Removing the
folder is always safe.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from pathlib import Path
from typing import Any

from engines.sessions.cuda_device import CudaDevice
from flowcut.atomic import write_file
from flowcut.errors import FlowCutError

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
        self._writable, self._saved = True, ""
        self._load()

    def count_run(self) -> None:
        """Say that the engine has run; saves now and then."""
        if next(self._runs) in _SAVE_AFTER:
            with self._device.lock:  # nobody may compile meanwhile
                content = self._content()
            self._write(content)

    def close(self) -> None:
        """Save, at the end of the engine's life."""
        try:
            self._device.set_current()
            self._write(self._content())
        except Exception as error:  # the driver may be gone already when Python ends
            LOG.debug("%s was not written: %s", self._path, error)

    def _load(self) -> None:
        try:
            stored = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            LOG.warning("%s cannot be read (%s), so kernels are compiled again.", self._path, error.strerror)
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
            self._path.parent.mkdir(exist_ok=True)
            write_file(self._path, _header(content) + content)
            self._remove_old()
        except (FlowCutError, OSError) as error:
            self._writable = False
            LOG.warning("kernels are not kept for the next start: %s", " ".join(str(error).split()))
        self._saved = digest

    def _remove_old(self) -> None:
        """Kernels of engines that this one has replaced, or they would pile up."""
        graph, sha256 = self._path.name.split("-")[:2]
        for path in self._path.parent.glob(f"{graph}-*.bin"):
            if not path.name.startswith(f"{graph}-{sha256}-"):
                path.unlink(missing_ok=True)


def _header(content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n"
