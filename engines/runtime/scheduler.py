"""Requests of many threads, put together into batches that the engine was built for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Self

from engines.runtime.clock import Clock
from engines.runtime.control import LOOK_S, Control
from engines.runtime.counters import Counters
from engines.runtime.decoding import Answering, Reply
from engines.runtime.gate import Gate
from engines.runtime.generation import forget_frames, member
from engines.runtime.reading import Pictures, Request
from engines.runtime.sampling import GREEDY, Sampling
from engines.runtime.ticket import Job, Ticket, is_full, together
from flowcut.config import is_integer, is_number
from flowcut.contract import Limits
from flowcut.errors import ConfigError, EngineError, FlowCutError, QueueFull, RequestCancelled

LOG = logging.getLogger("flowcut.engines.scheduler")


@dataclass(frozen=True)
class Work:
    """What a queue needs of an engine.

    Attributes:
        read: pictures, prompt, sampling and control to a request, prepared in the caller's thread.
        answer: a batch, in a place that is held already.
    """

    read: Callable[[Pictures, str, Sampling, Control], Request]
    answer: Callable[[Sequence[Request]], Answering]
    gate: Gate
    counters: Counters
    limits: Limits


class Batching:
    """A queue before an engine: see LlavaEngine.batching. Safe to use from several threads.

    Of its threads one at a time waits: for a request, for others to join it, for a place at the engine. Then it takes
    the batch, and another thread waits for the next while it runs this one. They hold the queue and its engine until
    it is closed.

    Args:
        threads: batches at work at once.
        now: the seconds by which `max_wait_ms` is measured.

    Raises:
        ConfigError: not a number of milliseconds, or of requests.
    """

    def __init__(
        self, work: Work, max_wait_ms: float, waiting: int, threads: int, now: Callable[[], float] = monotonic
    ) -> None:
        if not is_number(max_wait_ms) or max_wait_ms < 0:
            raise ConfigError(f"max_wait_ms must be a number of milliseconds, at least 0, got {max_wait_ms!r}.")
        if not is_integer(waiting) or waiting < 1:
            raise ConfigError(f"waiting must be a whole number, at least 1, got {waiting!r}.")
        self._work, self._max_wait_s, self._waiting, self._now = work, max_wait_ms / 1e3, waiting, now
        self._jobs: list[Job] = []  # by age
        self._closed = False
        self._changed, self._leading = threading.Condition(), threading.Lock()
        names = (f"flowcut-batching-{i}" for i in range(threads))
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Requests that wait now."""
        return len(self._jobs)

    def submit(
        self,
        images: Pictures,
        prompt: str,
        sampling: Sampling = GREEDY,
        *,
        timeout_s: float | None = None,
        cancel: threading.Event | None = None,
    ) -> Ticket:
        """Ask one question. It is read here, in the caller's thread; the answer is the ticket's result.

        Args:
            images, prompt: a picture or a list of pictures, and their prompt; all else as in LlavaEngine.generate.

        Raises:
            InputError, ConfigError: a request that cannot be answered.
            QueueFull: as many requests wait already as may.
            EngineError: the queue or the engine is closed.
        """
        clock = Clock()
        try:
            control = Control(timeout_s, cancel)
            self._check_room()
            request = self._work.read(images, prompt, sampling, control)
            clock.stop("preprocess")
            return self._join_queue(request, Ticket(control, self._withdraw), clock)
        except BaseException as error:
            self._work.counters.ended(error, 0, 0, clock.stages)
            raise

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, finish those that wait (or cancel them), and wait until everything has ended. In a
        ticket's callback it does not wait: that thread has to go on."""
        with self._changed:
            self._closed = True
            dropped = self._take(self._jobs) if cancel else []
            self._changed.notify_all()
        for job in dropped:
            self._fail(job, RequestCancelled("the request was cancelled: its queue was closed."))
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    def _join_queue(self, request: Request, ticket: Ticket, clock: Clock) -> Ticket:
        with self._changed:
            self._check_room()
            self._jobs.append(Job(request, ticket, clock, self._now()))
            self._work.counters.wait(1)
            self._changed.notify()
        return ticket

    def _check_room(self) -> None:
        if self._closed:
            raise EngineError("the queue must be open, got a request after its close(). Make another with batching().")
        if len(self._jobs) >= self._waiting:
            raise QueueFull(
                f"requests that wait must be at most {self._waiting} (batching's waiting), got one more. Send it again "
                "later, or make a queue with a greater one."
            )

    def _take(self, jobs: Sequence[Job]) -> list[Job]:
        """Out of the queue, whose lock is held."""
        taken = set(jobs)
        self._jobs = [job for job in self._jobs if job not in taken]
        self._work.counters.wait(-len(taken))
        return list(jobs)

    def _withdraw(self, ticket: Ticket) -> None:
        """A ticket was cancelled: if it waits, it ends here."""
        with self._changed:
            dropped = self._take([job for job in self._jobs if job.ticket is ticket])
        for job in dropped:
            self._fail(job, job.over())

    def _sweep(self) -> None:
        """End those in the queue whose time is up, or that were called off."""
        with self._changed:
            ends = {job: error for job in self._jobs if (error := job.over()) is not None}
            self._take(list(ends))
        for job, error in ends.items():  # without the lock, for their callbacks may do what they like
            self._fail(job, error)

    def _serve(self) -> None:
        going = True
        while going:
            try:
                going = self._turn()
            except BaseException as error:  # nobody's own, such as a failure to close the engine: nobody may hang by it
                LOG.exception("a thread of a queue goes on behind an error")
                self._refuse(EngineError(f"the queue must go on, got {type(error).__name__}, which its log tells of."))

    def _turn(self) -> bool:
        """Run one batch, or none where all who waited have gone. False once there will be no more."""
        with ExitStack() as place:
            with self._leading:
                if not self._wait_until_due():
                    return False
                try:
                    place.enter_context(self._work.gate.enter(_Patience(self), bounded=False))
                except RequestCancelled:  # by _Patience; whoever has come since has a turn of its own
                    return True
                except FlowCutError as error:
                    self._refuse(error)
                    return True
                with self._changed:
                    jobs = self._take(together(self._jobs, self._work.limits))
            self._run(jobs)
        return True

    def _wait_until_due(self) -> bool:
        """Whether there is a batch that should be run now, rather than none any more."""
        while True:
            self._sweep()
            with self._changed:
                if self._jobs:
                    if (left := self._left_s()) <= 0:
                        return True
                    self._changed.wait(min(left, LOOK_S))
                elif self._closed:
                    return False
                else:
                    self._changed.wait()

    def _left_s(self) -> float:
        """Seconds to wait for others that fit."""
        if self._closed or is_full(together(self._jobs, self._work.limits), self._work.limits):
            return 0.0
        return self._jobs[0].arrived_s + self._max_wait_s - self._now()

    def _refuse(self, error: FlowCutError) -> None:
        """There is no place for those who wait, if any: the engine was closed."""
        with self._changed:
            jobs = self._take(self._jobs)
        for job in jobs:
            self._fail(job, type(error)(*error.args))

    def _run(self, jobs: Sequence[Job]) -> None:
        """Answer jobs together, or where that fails one by one, so that the error is only the guilty one's."""
        for job in jobs:
            job.clock.stop("queue")
            job.ticket.set_running_or_notify_cancel()
        if len(jobs) > 1:
            replies: list[Reply] = []
            try:
                self._answer(jobs, replies)
            except BaseException as error:  # raised again by whom it belongs to
                LOG.warning("a batch of %d failed and is run again one by one: %s", len(jobs), error)
                forget_frames(error)
                lost = [reply for job, reply in zip(jobs, replies, strict=False) if not job.ticket.done()]
                self._work.counters.retry(tokens_of(lost))
        for job in jobs:
            if not job.ticket.done():
                self._run_alone(job)

    def _run_alone(self, job: Job) -> None:
        job.clock.stop("queue")  # a batch that failed was a way of waiting
        replies: list[Reply] = []
        try:
            self._answer([job], replies)
        except BaseException as error:  # the ticket's result, like that of any executor's work
            self._fail(job, error, tokens_of(replies))

    def _answer(self, jobs: Sequence[Job], replies: list[Reply]) -> None:
        """Fills `replies`, which tell how far jobs came that end in an error."""
        answering = self._work.answer([job.request for job in jobs])
        replies += answering.replies
        with closing(iter(answering)) as steps:
            for _ in steps:
                self._hand_out(jobs, answering)
                self._sweep()

    def _hand_out(self, jobs: Sequence[Job], answering: Answering) -> None:
        """Each answer that is complete, while others go on."""
        for index, (job, reply) in enumerate(zip(jobs, answering.replies, strict=True)):
            if not reply.done or job.ticket.done():
                continue
            tokens = len(reply.token_ids)
            if reply.error is not None:
                self._fail(job, reply.error, tokens)
            else:
                answer = member(answering, index, job.clock)
                self._work.counters.ended(None, 1, tokens, answer.latency_ms)
                job.ticket.set_result(answer)

    def _fail(self, job: Job, error: BaseException | None, tokens: int = 0) -> None:
        forget_frames(error)
        self._work.counters.ended(error, 1, tokens, job.clock.stages)
        job.ticket.set_exception(error)


def tokens_of(replies: Sequence[Reply]) -> int:
    """How many they came to."""
    return sum(len(reply.token_ids) for reply in replies)


class _Patience(Control):
    """Of a queue that waits for a place: as long as anybody waits in it."""

    def __init__(self, queue: Batching) -> None:
        super().__init__()
        self._queue = queue

    def wait_s(self) -> float:
        return LOOK_S

    def check(self) -> None:
        self._queue._sweep()
        if not self._queue.queued:
            raise RequestCancelled("nobody waits any more.")
