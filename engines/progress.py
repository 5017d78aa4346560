"""Phases of a build: bars on a terminal, one log line each elsewhere."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

LOG = logging.getLogger("flowcut.engines")


def terminal_progress(redraw: bool = True) -> Progress:
    """Bars on stderr that vanish when done; disabled where stderr is not a terminal.

    redraw: by a thread, ten times a second; False: only when `refresh` is called, so that nothing else runs meanwhile.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    hidden = not sys.stderr.isatty()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden, auto_refresh=redraw)


class Phases:
    """Follows one build's phases. TensorRT nests them by the parent's name and reuses names once they end."""

    def __init__(self, graph: str, progress: Progress | None) -> None:
        self._graph = graph
        self._progress = None if progress is None or progress.disable else progress
        self._depth: dict[str, int] = {}
        self._tasks: dict[str, TaskID] = {}
        self._logged: set[str] = set()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        depth = self._depth[phase] = self._depth.get(parent, -1) + 1 if parent else 0
        if self._progress is not None:
            label = f"{self._graph}: {phase}" if depth == 0 else "  " * depth + phase
            self._tasks[phase] = self._progress.add_task(label, total=steps)
        elif phase not in self._logged:
            self._logged.add(phase)
            LOG.info("%s: %s", self._graph, phase)

    def step(self, phase: str) -> None:
        if self._progress is not None and phase in self._tasks:
            self._progress.advance(self._tasks[phase])

    def finish(self, phase: str) -> None:
        self._depth.pop(phase, None)
        if self._progress is not None and phase in self._tasks:
            self._progress.remove_task(self._tasks.pop(phase))

    def close(self) -> None:
        """Drop what a cancelled build left open."""
        for phase in list(self._tasks):
            self.finish(phase)
