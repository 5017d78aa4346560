"""What TensorRT calls back while it builds (logger, progress monitor, stream writer) and runs (logger, profiler).

The base classes belong to a module that is a parameter (tensorrt_rtx or tensorrt), so each class is made by a
function. An exception that leaves a callback is printed and dropped by the bindings, and a short count from the
writer is not looked at: the builder reports success. So each callback keeps its failure for its owner to raise.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

# Sends one event from the builder's threads to whoever watches: ("start", phase, parent, steps) and so on.
Notify = Callable[..., None]

UNUSED = re.compile(r"Unused Input: (\S+)")
# Said of every int64 input and output.
HARMLESS = re.compile(r"has Int64 binding|A node named .* already exists")
# Messages that are kept of each kind, the last ones: a session's log is as old as its process.
KEPT = 16
# Follows any failure on a machine without a GPU.
NOISE = re.compile(r"CUDA driver version is insufficient")


@dataclass
class BuildLog:
    """What the parser and the builder said, or the runtime."""

    errors: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT))
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT))
    unused_inputs: set[str] = field(default_factory=set)

    def add(self, level: int, text: str) -> int:
        """Keep a message where it matters; returns the level at which to log it."""
        if level >= logging.ERROR:
            # Errors become the EngineError's text, as do unused inputs; at this level they would be printed twice.
            self.errors.append(text)
            return logging.DEBUG
        if level < logging.WARNING or HARMLESS.search(text):
            return logging.DEBUG
        self.warnings.append(text)
        if unused := UNUSED.search(text):
            self.unused_inputs.add(unused[1])
            return logging.DEBUG
        return level

    def reasons(self) -> str:
        """The errors on one line, without those that merely follow from having no GPU."""
        errors = list(self.errors)  # other threads may be adding to it
        telling = [e.rstrip(".") for e in errors if not NOISE.search(e)]
        return "; ".join(telling or errors) or "no reason was logged"

    def take(self) -> str:
        """The reasons of one failure, which the next one is not to repeat."""
        reasons = self.reasons()
        self.errors.clear()
        return reasons


class Channel:
    """Passes events on one at a time, whichever builder thread they come from."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._lock = threading.Lock()

    def __call__(self, *event: Any) -> None:
        with self._lock:
            self._notify(*event)


def make_logger(trt: Any, log: BuildLog, notify: Notify, level: int) -> Any:
    """A trt.ILogger that fills `log` and notifies ("log", level, text) for messages at `level` and above."""
    severity = trt.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.WARNING}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            text = " ".join(msg.split())
            if (wanted := log.add(levels.get(severity, logging.DEBUG), text)) >= level:
                notify("log", wanted, text)

    return Logger()


def make_monitor(trt: Any, notify: Notify, cancelled: Callable[[], bool]) -> Any:
    """A trt.IProgressMonitor that notifies of phases and steps and stops the build once `cancelled()`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            notify("start", phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            notify("step", phase_name)
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            notify("finish", phase_name)

    return Monitor()


def make_writer(trt: Any, file: BinaryIO) -> Any:
    """A trt.IStreamWriter into an unbuffered file. `written` counts bytes, `failure` is the first OSError or None."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.written = 0
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.failure is not None:
                return 0
            view = memoryview(data)
            try:
                while view:
                    view = view[file.write(view) :]  # one write(2) takes at most 2 GiB
            except OSError as error:
                self.failure = error
                return 0
            self.written += len(data)
            return len(data)

    return Writer()


def make_profiler(trt: Any) -> Any:
    """A trt.IProfiler. `times` maps a layer's name to [calls, milliseconds of all of them]."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            total = self.times.setdefault(layer_name, [0, 0.0])
            total[0] += 1
            total[1] += ms

    return Profiler()
