"""How many requests may be at work at once, and how many may wait for that: in the order they came."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from engines.runtime.control import Control
from engines.runtime.counters import Counters
from flowcut.errors import EngineError, QueueFull

LOG = logging.getLogger("flowcut.engines.gate")


class _Waiter:
    """One in line, whose `turn` opens when it is granted a place or, with the gate closed, refused one.

    turn: a bare lock. Whoever is interrupted by the end of an abandoned stream may be granted by it, while it holds
        the lock that an Event has within.
    """

    def __init__(self, bounded: bool) -> None:
        self.bounded, self.thread, self.granted = bounded, threading.get_ident(), False
        self.turn = threading.Lock()
        self.turn.acquire()


class Gate:
    """Bounds what is at work and what waits. A place that becomes free goes to the first in line, who is woken alone.

    A thread which keeps as many places as there are, by streams that it does not finish, and asks for another waits
    for itself. This is logged and no error, since another thread may be the one that finishes them.

    Args:
        places: requests at work at once.
        waiting: requests that may wait.
    """

    def __init__(self, places: int, waiting: int, counters: Counters | None = None) -> None:
        self._places, self._waiting, self._counters = places, waiting, counters or Counters()
        self._lock = threading.Lock()
        self._line: deque[_Waiter] = deque()
        self._at_work: list[int] = []  # the threads that entered
        self._left: deque[int] = deque()  # those of them whose place is to be given on
        self._closed, self._then = False, _nothing

    @property
    def queued(self) -> int:
        """Requests that wait now."""
        return len(self._line)

    @contextmanager
    def enter(self, control: Control, bounded: bool = True) -> Iterator[None]:
        """Wait for a place and hold it.

        Args:
            bounded: False for what is counted and bounded elsewhere.

        Raises:
            QueueFull: as many wait already as may.
            RequestTimeout, RequestCancelled: by `control`, while it waited.
            EngineError: the gate is closed.
        """
        waiter = self._join_line(control, bounded)
        try:
            self._wait(waiter, control)
        except BaseException:
            self._withdraw(waiter)
            raise
        try:
            yield
        finally:
            self._leave(waiter.thread)

    def close(self, then: Callable[[], None]) -> None:
        """Refuse those that wait and whoever comes; call `then` once nobody is at work any more."""
        with self._locked():
            if self._closed:
                return
            self._closed, self._then = True, then
            while self._line:
                self._line.popleft().turn.release()

    def _join_line(self, control: Control, bounded: bool) -> _Waiter:
        control.check()
        waiter = _Waiter(bounded)
        with self._locked():
            if self._closed:
                raise closed()
            self._take_back()
            free = self._places - len(self._at_work)
            if bounded and sum(each.bounded for each in self._line) - free >= self._waiting:
                raise QueueFull(
                    f"requests that wait must be at most {self._waiting} (load_engine's waiting), got one more. Send "
                    "it again later, or load the engine with a greater one."
                )
            self._line.append(waiter)
        return waiter

    def _wait(self, waiter: _Waiter, control: Control) -> None:
        if not waiter.turn.acquire(blocking=False):
            if set(self._at_work) == {waiter.thread}:
                LOG.warning(
                    "a request waits for its own thread, which holds all %d places: close its streams, or raise "
                    "concurrency",
                    self._places,
                )
            with self._counters.waiting() if waiter.bounded else nullcontext():
                while not waiter.turn.acquire(timeout=control.wait_s()):
                    control.check()
        if not waiter.granted:
            raise closed()

    def _withdraw(self, waiter: _Waiter) -> None:
        """Of one that gave up, perhaps when it had just been granted a place."""
        with self._locked():
            if waiter in self._line:
                self._line.remove(waiter)
            if waiter.granted:
                self._left.append(waiter.thread)

    def _leave(self, thread: int) -> None:
        self._left.append(thread)
        self._serve()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock, and behind it, even where an error ends what is done within, whatever others left to its holder."""
        try:
            with self._lock:
                yield
        finally:
            self._serve()

    def _serve(self) -> None:
        """Give free places to the first in line.

        Called behind whatever holds the lock. Who finds it taken goes on, for its holder comes here next. An abandoned
        stream is ended wherever the garbage collector runs, even in a thread that holds the lock: to wait for it there
        would be for ever.
        """
        while self._something_to_do() and self._lock.acquire(blocking=False):
            then = _nothing
            try:
                self._take_back()
                while self._line and len(self._at_work) < self._places:
                    self._grant(self._line.popleft())
                if not self._at_work:
                    then, self._then = self._then, _nothing
            finally:
                self._lock.release()
            then()

    def _something_to_do(self) -> bool:
        ready = self._line and len(self._at_work) < self._places
        return bool(self._left or ready or (self._then is not _nothing and not self._at_work))

    def _take_back(self) -> None:
        """The places of those that left. The lock is held."""
        while self._left:
            self._at_work.remove(self._left.popleft())

    def _grant(self, waiter: _Waiter) -> None:
        self._at_work.append(waiter.thread)
        waiter.granted = True
        waiter.turn.release()


def closed() -> EngineError:
    """The refusal of an engine that was closed."""
    return EngineError("the engine must be open, got a request after its close(). Load the directory again.")


def _nothing() -> None:
    """Nobody closed the gate, or nothing more is to follow."""
