"""What may end a request before its answer is complete: its time is up, or its owner calls it off."""

from __future__ import annotations

import threading
import time

from flowcut.errors import ConfigError, RequestCancelled, RequestTimeout


class Control:
    """Looked at between the steps of a request: a step that runs is not broken off.

    Args:
        timeout_s: seconds from now; None for no limit.
        cancel: an event that its owner sets to call the request off.

    Raises:
        ConfigError: not a positive number of seconds.
    """

    def __init__(self, timeout_s: float | None = None, cancel: threading.Event | None = None) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"timeout_s must be more than 0 or None, got {timeout_s!r}.")
        self._timeout_s, self._start, self._cancel = timeout_s, time.monotonic(), cancel

    def left_s(self) -> float | None:
        """Seconds until its time is up, 0 or less behind that; None where it has no limit."""
        return None if self._timeout_s is None else self._start + self._timeout_s - time.monotonic()

    def check(self) -> None:
        """Raise where the request is to end.

        Raises:
            RequestCancelled: its owner called it off.
            RequestTimeout: its time is up.
        """
        if self._cancel is not None and self._cancel.is_set():
            raise RequestCancelled("the request was cancelled by its owner.")
        left = self.left_s()
        if left is not None and left <= 0:
            raise RequestTimeout(
                f"the request must be answered within timeout_s={self._timeout_s}, got no answer by then. Allow more "
                "time, ask for fewer tokens, or send fewer requests at once."
            )
