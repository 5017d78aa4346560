"""ONNX file with external weights -> TensorRT engine file.

The compiler runs in a child process. TensorRT can be cancelled between the steps of a build, but one step holds most
of it (7 of 9 s for an unpruned CLIP tower), and some graphs abort the process from inside the parser. A child can be
killed at Ctrl-C, turns an abort into an error, and gives its memory back before the next graph. It also builds once
only: a second builder in one process ignores its logger while objects of the first live, and hangs when Python's
garbage collector frees those from within a log call.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, cast

from rich.progress import Progress

from engines.backends import Backend, check_build
from engines.child import die_with_parent, start_child
from engines.compiler import BuildReport, BuildRequest, compile_engine
from engines.progress import Phases
from flowcut.contract import GraphContract
from flowcut.errors import EngineError, FlowCutError

__all__ = ["BuildReport", "build_engine"]

LOG = logging.getLogger("flowcut.tensorrt")


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    contract: GraphContract,
    backend: Backend,
    compute_capabilities: Sequence[str] = (),
    progress: Progress | None = None,
    plugin: bool = True,
) -> BuildReport:
    """Compile `onnx_path` for `backend` ("rtx" or "trt") into `engine_path`.

    compute_capabilities: "sm80", "sm86", ..; rtx only. Empty means TensorRT-RTX's default, Ampere and later.
    progress: where to draw the phases (`engines.progress.terminal_progress`); without one they are logged.
    plugin: trt only. False keeps FlowScore in standard operators, to compare with.

    Raises:
        EngineError: graph, target, library, GPU or disk; `engine_path` is then removed, as on Ctrl-C.
    """
    check_build(backend, compute_capabilities)
    level = LOG.getEffectiveLevel()
    request = BuildRequest(onnx_path, engine_path, contract, backend, tuple(compute_capabilities), level, plugin)
    phases = Phases(contract.name, progress)
    try:
        return _compile_in_child(request, phases)
    except BaseException:
        with suppress(OSError):
            engine_path.unlink()
        raise
    finally:
        phases.close()


def _compile_in_child(request: BuildRequest, phases: Phases) -> BuildReport:
    ours, theirs = Pipe()
    with ours, TemporaryFile() as output:
        # TensorRT prints past its logger, which would otherwise end up between the caller's lines.
        child = start_child("engines.build", theirs, stdout=output, stderr=output)
        theirs.close()
        try:
            ours.send(request)
            report = _follow(ours, phases)
            child.wait()
            return report
        except (EOFError, ConnectionError):
            raise EngineError(_epitaph(request, child.wait(), output)) from None
        finally:
            child.kill()
            child.wait()


def _follow(connection: Connection, phases: Phases) -> BuildReport:
    """Pass the child's events on until it reports."""
    while True:
        kind, *details = connection.recv()
        match kind:
            case "log":
                LOG.log(*details)
            case "start":
                phases.start(*details)
            case "step":
                phases.step(*details)
            case "finish":
                phases.finish(*details)
            case "failed":
                raise details[0]
            case "done":
                return cast(BuildReport, details[0])


def _epitaph(request: BuildRequest, status: int, output: IO[bytes]) -> str:
    """Why a child that never reported ended, with the last line it printed."""
    output.seek(0)
    text = output.read().decode(errors="replace").strip()
    LOG.debug("output of the build process: %s", text)
    cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    hint = " (out of memory? STAGES=2 or PRECISION=int4 take less)" if status == -signal.SIGKILL else ""
    last = text.splitlines()[-1] if text else "it printed nothing"
    return f"{request.onnx_path} could not be built: TensorRT's process ended with {cause}{hint}: {last}"


def serve(fileno: int) -> None:
    """The child: receive a BuildRequest, send events, then ("done", BuildReport) or ("failed", FlowCutError)."""
    die_with_parent()
    connection = Connection(fileno)
    request = connection.recv()
    threading.Thread(target=_exit_with_parent, args=[connection], daemon=True).start()
    try:
        connection.send(("done", compile_engine(request, lambda *event: _send(connection, event))))
    except FlowCutError as error:
        connection.send(("failed", error))


def _send(connection: Connection, event: tuple[Any, ...]) -> None:
    try:
        connection.send(event)
    except ConnectionError:
        os._exit(1)


def _exit_with_parent(connection: Connection) -> None:
    """The parent sends nothing more: this returns when its end of the pipe closes, however it ended."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
