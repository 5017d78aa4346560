"""Kills, interrupts and errors of the disk, brought about at the n-th step of a process on a folder.

`python faults.py FOLDER NUMBER HOW ARGUMENT...` is the flowcut command with a fault; NUMBER 0 only counts the steps and
prints how many there were as the last line of stdout.
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowcut import atomic

STEPS = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"),
    *("fsync", "renameat2", "fcntl.flock"),
}
"""Python's audit events, which come before the deed and may raise, and two of our own. Of calls that write or only ask
there are none."""
FAULTS = ("kill", "ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")
"""What `install` takes as `how`; `interrupt` too."""


def install(folder: Path, number: int, how: str, lasting: bool = False, sync: bool = True) -> Callable[[], int]:
    """Have the `number`-th step on what is in `folder` fail, with `lasting` each from there on. For good: fork before.

    Returns how many steps there were so far.

    Args:
        how: "kill", "interrupt", or the name of an error.
        sync: false leaves out what only a power cut would show.
    """
    count, inside = 0, str(folder)
    fsync, exchange = os.fsync, atomic._exchange

    def step(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in STEPS or not (by_descriptor(event, arguments) or str(arguments[0]).startswith(inside)):
            return
        count += 1
        if number and (count == number or (lasting and count > number)):
            happen(how, None if isinstance(arguments[0], int) else str(arguments[0]))

    def synced(descriptor: int) -> None:
        sys.audit("fsync", descriptor)
        if sync:
            fsync(descriptor)

    def exchanged(a: Path, b: Path) -> bool:
        sys.audit("renameat2", str(a))
        return exchange(a, b)

    os.fsync = synced  # type: ignore[assignment]
    atomic._exchange = exchanged
    sys.addaudithook(step)
    return lambda: count


def by_descriptor(event: str, arguments: tuple[Any, ...]) -> bool:
    """Of something open, or of a name in a folder that is, as shutil.rmtree goes about it."""
    return isinstance(arguments[0], int) or (event in ("os.remove", "os.rmdir") and arguments[1] >= 0)


def happen(how: str, path: str | None) -> None:
    """The fault itself."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupt":
        raise KeyboardInterrupt
    code = getattr(errno, how)
    raise OSError(code, os.strerror(code), path)


if __name__ == "__main__":
    counted = install(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    if sys.argv[2] == "0":
        atexit.register(lambda: print(counted()))
    from flowcut.cli import main

    main(sys.argv[4:])
