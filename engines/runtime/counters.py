"""What an engine has done so far, counted, and one line of log for each request."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flowcut.errors import ConfigError, InputError, QueueFull, RequestCancelled, RequestTimeout

LOG = logging.getLogger("flowcut.engines.requests")

OUTCOMES: dict[str, tuple[type[BaseException], ...]] = {
    "answered": (),
    "refused": (InputError, ConfigError),
    "timed_out": (RequestTimeout,),
    "cancelled": (RequestCancelled, GeneratorExit),  # the latter: a stream that its reader closed
    "queue_full": (QueueFull,),
    "failed": (BaseException,),
}
"""What may become of a request, by the error that ends it."""
SUMS = ("prompts", "tokens", "decode_steps", "retried", "seen", "from_cache")


class Counters:
    """Safe to use from several threads, and by what the garbage collector ends in the midst of a count."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._requests, self._sums, self._batches = dict.fromkeys(OUTCOMES, 0), dict.fromkeys(SUMS, 0), Counter[int]()
        self._waiting = self._most_waiting = 0

    def snapshot(self) -> dict[str, Any]:
        """Everything since the engine was loaded, fit for JSON.

        requests: calls by outcome. prompts and tokens: of these, those read and those generated, also where the
        outcome was none, or where a batch failed and its tokens were generated again. decode_steps: runs of the
        decoder behind a prefill, one for a whole batch. batches: prefills by their size. retried: batches that failed
        and were run again one by one. pictures: those that vision looked at, and those that were known. waiting:
        requests in line now, and the most there ever were.
        """
        with self._lock:
            return {
                "requests": dict(self._requests),
                **{name: self._sums[name] for name in ("prompts", "tokens", "decode_steps", "retried")},
                "batches": {str(size): self._batches[size] for size in sorted(self._batches)},
                "pictures": {"seen": self._sums["seen"], "from_cache": self._sums["from_cache"]},
                "waiting": {"now": self._waiting, "most": self._most_waiting},
            }

    def batch(self, size: int) -> None:
        """A prefill of `size` prompts."""
        with self._lock:
            self._batches[size] += 1

    def pictures(self, seen: int, from_cache: int) -> None:
        """Those of a batch: vision looked at them, or they were known."""
        with self._lock:
            self._sums["seen"] += seen
            self._sums["from_cache"] += from_cache

    def step(self) -> None:
        """A decode step of a batch."""
        with self._lock:
            self._sums["decode_steps"] += 1

    def retry(self, tokens: int) -> None:
        """A batch that failed, behind so many tokens of answers that are begun again."""
        with self._lock:
            self._sums["retried"] += 1
            self._sums["tokens"] += tokens

    def wait(self, change: int) -> None:
        """So many more are in line, or fewer."""
        with self._lock:
            self._waiting += change
            self._most_waiting = max(self._most_waiting, self._waiting)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """One is in line."""
        self.wait(1)
        try:
            yield
        finally:
            self.wait(-1)

    def ended(self, error: BaseException | None, prompts: int, tokens: int, stages: Mapping[str, float]) -> None:
        """A request came to its end.

        Args:
            error: what ended it; None of one that was answered.
            stages: milliseconds of each, as far as it came.
        """
        outcome = outcome_of(error)
        with self._lock:
            self._requests[outcome] += 1
            self._sums["prompts"] += prompts
            self._sums["tokens"] += tokens
        if LOG.isEnabledFor(logging.DEBUG):
            times = ", ".join(f"{stage} {ms:.2f} ms" for stage, ms in stages.items())
            LOG.debug("%s: %d prompts, %d tokens; %s", outcome, prompts, tokens, times or "not begun")


def outcome_of(error: BaseException | None) -> str:
    """The name in OUTCOMES of a request that ended so."""
    if error is None:
        return "answered"
    return next(name for name, kinds in OUTCOMES.items() if isinstance(error, kinds))
