"""A process of our own that talks over a pipe."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any


def start_child(
    module: str, connection: Connection, environment: Mapping[str, str] | None = None, **streams: Any
) -> subprocess.Popen[bytes]:
    """Run `module.serve(fileno)` with the child's end of a pipe.

    A fresh interpreter rather than multiprocessing's spawn, which would import the caller's script again. In a process
    group of its own, so that a terminal's Ctrl-C reaches the caller, who then ends the child.

    Args:
        environment: what differs from this process's.
        streams: stdout and stderr, as Popen takes them.
    """
    code = f"from {module} import serve; serve({connection.fileno()})"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
    arguments, fds = [sys.executable, "-c", code], [connection.fileno()]
    return subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, pass_fds=fds, env=variables, process_group=0, **streams
    )


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, however that comes (Linux's prctl).

    Waiting for the end of the pipe would do but for libraries that hold Python's lock through long calls.
    """
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
