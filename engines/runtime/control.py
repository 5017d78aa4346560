"""What may end a request before its answer is complete: its time is up, or its owner calls it off."""

from __future__ import annotations

import threading
from time import monotonic

from flowcut.config import is_number
from flowcut.errors import ConfigError, RequestCancelled, RequestTimeout

LOOK_S = 0.02
"""How often one that waits looks whether it was cancelled: an Event wakes nobody who waits for something else, too."""
_LONG_S = 60.0


class Control:
    """Looked at between the steps of a request: a step that runs is not broken off.

    Args:
        timeout_s: seconds from now; None for no limit.
        cancel: an event that its owner sets to call the request off.

    Raises:
        ConfigError: not a positive number of seconds, or not an event.
    """

    def __init__(self, timeout_s: float | None = None, cancel: threading.Event | None = None) -> None:
        if timeout_s is not None and not (is_number(timeout_s) and timeout_s > 0):
            raise ConfigError(f"timeout_s must be a number of seconds above 0, or None, got {timeout_s!r}.")
        if cancel is not None and not isinstance(cancel, threading.Event):
            raise ConfigError(
                f"cancel must be a threading.Event or None, got {type(cancel).__name__}. Another thread sets it."
            )
        self._timeout_s, self._start, self._cancel, self._off = timeout_s, monotonic(), cancel, False

    def call_off(self) -> None:
        """Cancel this request and no other, whoever else looks at `cancel`."""
        self._off = True

    def left_s(self) -> float | None:
        """Seconds until its time is up, 0 or less behind that; None where it has no limit."""
        return None if self._timeout_s is None else self._start + self._timeout_s - monotonic()

    def wait_s(self) -> float:
        """Seconds, 0 or more, that one may wait before it has to `check` again."""
        left, longest = self.left_s(), _LONG_S if self._cancel is None else LOOK_S
        return longest if left is None else max(0.0, min(left, longest))

    def check(self) -> None:
        """Raise where the request is to end.

        Raises:
            RequestCancelled: its owner called it off.
            RequestTimeout: its time is up.
        """
        if self._off or (self._cancel is not None and self._cancel.is_set()):
            raise RequestCancelled("the request was cancelled by its owner.")
        left = self.left_s()
        if left is not None and left <= 0:
            raise RequestTimeout(
                f"the request must be answered within timeout_s={self._timeout_s}, got no answer by then. Allow more "
                "time, ask for fewer tokens, or send fewer requests at once."
            )
