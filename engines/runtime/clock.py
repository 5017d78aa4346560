"""Milliseconds of consecutive stages of a request."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Starts when it is made. What happens between two calls of `stop` belongs to the second's stage.

    Args:
        now: seconds; a benchmark's waits for the device before it looks (engines.bench.timing.synchronised).
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = self._last = now()
        self.stages: dict[str, float] = {}

    def stop(self, stage: str) -> None:
        """What happened since the last stop was `stage`, or more of it."""
        now = self._now()
        self.stages[stage] = self.stages.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now

    def skip(self) -> None:
        """What happened since the last stop belongs to nobody."""
        self._last = self._now()

    def since_start(self) -> float:
        """Milliseconds."""
        return (self._now() - self._start) * 1e3
