"""Milliseconds of consecutive stages of a request."""

from __future__ import annotations

import time


class Clock:
    """Starts when it is made. What happens between two calls of `stop` belongs to the second's stage."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.stages: dict[str, float] = {}

    def stop(self, stage: str) -> None:
        """What happened since the last stop was `stage`, or more of it."""
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now

    def skip(self) -> None:
        """What happened since the last stop belongs to nobody."""
        self._last = time.perf_counter()

    def since_start(self) -> float:
        """Milliseconds."""
        return (time.perf_counter() - self._start) * 1e3
