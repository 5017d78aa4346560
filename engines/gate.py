"""How many requests may be at work at once, and how many may wait for that: in the order they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from engines.control import Control
from flowcut.errors import QueueFull

_LOOK_S = 0.02
"""How often one that waits looks whether it was cancelled."""


class Gate:
    """Bounds what is at work and what waits.

    Args:
        places: requests at work at once.
        waiting: requests that may wait.
    """

    def __init__(self, places: int, waiting: int) -> None:
        self._free, self._waiting = places, waiting
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def queued(self) -> int:
        """Requests that wait now."""
        return len(self._queue)

    @contextmanager
    def enter(self, control: Control) -> Iterator[None]:
        """Wait for a place and hold it.

        Raises:
            QueueFull: as many wait already as may.
            RequestTimeout, RequestCancelled: by `control`, while it waited.
        """
        self._take(control)
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()

    def _take(self, control: Control) -> None:
        control.check()
        ticket = object()
        with self._changed:
            if (self._queue or not self._free) and len(self._queue) >= self._waiting:
                raise QueueFull(
                    f"requests that wait must be at most {self._waiting} (load_engine's waiting), got one more. Send "
                    "it again later, or load the engine with a greater one."
                )
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or not self._free:
                    left = control.left_s()
                    self._changed.wait(_LOOK_S if left is None else max(0.0, min(left, _LOOK_S)))
                    control.check()
                self._free -= 1
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
