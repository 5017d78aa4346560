"""Single requests on their way through a queue, and which of them can be answered together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from engines.runtime.clock import Clock
from engines.runtime.control import Control
from engines.runtime.generation import Generation
from engines.runtime.reading import Request
from flowcut.contract import Limits
from flowcut.errors import FlowCutError, RequestCancelled


class Ticket(Future[Generation]):
    """The answer to come of one request: a Future, but that `cancel` works while it is being answered too.

    `result` raises what `LlavaEngine.generate` would: RequestCancelled of one that was cancelled. Callbacks run in the
    thread that answers others, or that cancels, and should be short.
    """

    def __init__(self, control: Control, withdraw: Callable[[Ticket], None]) -> None:
        super().__init__()
        self._control, self._withdraw = control, withdraw

    def cancel(self) -> bool:
        """Call the request off: at once where it still waits, else at the next step of its answer.

        Returns:
            Whether this came in time, as far as is known by now.
        """
        self._control.call_off()
        self._withdraw(self)
        return not self.done() or self.cancelled()

    def cancelled(self) -> bool:
        """Whether it was called off."""
        return self.done() and isinstance(self.exception(), RequestCancelled)

    def add_done_callback(self, fn: Callable[[Future[Generation]], object]) -> None:
        """As of any Future, which logs what `fn` raises and goes on: SystemExit and the like too, but in the main
        thread."""
        super().add_done_callback(partial(_call, fn))


@dataclass(frozen=True, eq=False)
class Job:
    """A request in the queue.

    Attributes:
        clock: since it was submitted.
        arrived_s: when it joined the queue, on the queue's own clock.
    """

    request: Request
    ticket: Ticket
    clock: Clock
    arrived_s: float

    def over(self) -> FlowCutError | None:
        """Why it is to end, if so."""
        try:
            self.request.control.check()
        except FlowCutError as error:
            return error
        return None


def _call(callback: Callable[[Future[Generation]], object], ticket: Future[Generation]) -> None:
    """A Future lets whatever is no Exception end the thread, and with it everybody's answers."""
    try:
        callback(ticket)
    except BaseException as error:
        if isinstance(error, Exception) or threading.current_thread() is threading.main_thread():
            raise
        raise RuntimeError(f"a ticket's callback raised {type(error).__name__}") from error


def together(jobs: Iterable[Job], limits: Limits) -> list[Job]:
    """The batch to run next, of jobs by age: the oldest, and every later one that there is still room for.

    No job waits for ever, since each is the oldest one day. Nothing but the counts of prompts and pictures can refuse
    a batch of requests none of which is refused alone: every sequence has its own positions and cache.
    """
    batch: list[Job] = []
    for job in jobs:
        if len(batch) < limits.max_batch and pictures_of([*batch, job]) <= limits.max_images:
            batch.append(job)
    return batch


def is_full(batch: list[Job], limits: Limits) -> bool:
    """Whether no further request with a picture would fit."""
    return len(batch) >= limits.max_batch or pictures_of(batch) >= limits.max_images


def pictures_of(jobs: Iterable[Job]) -> int:
    """How many there are in all."""
    return sum(len(job.request.pictures) for job in jobs)
