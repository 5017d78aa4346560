"""The line before the engine, driven by events: no test here depends on how fast anything is."""

from __future__ import annotations

import gc
import logging
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

import engines.runtime.control
from engines.runtime.control import Control
from engines.runtime.counters import Counters
from engines.runtime.gate import Gate
from flowcut.errors import EngineError, FlowCutError, QueueFull, RequestCancelled, RequestTimeout

PATIENCE_S = 60.0


class Line(Counters):
    """Says when somebody has begun to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = threading.Semaphore(0)

    def wait(self, change: int) -> None:
        super().wait(change)
        if change > 0:
            self.joined.release()


class Caller(threading.Thread):
    """Enters, says so, and stays until it is let go."""

    def __init__(self, gate: Gate, control: Control | None = None, then: Callable[[], Any] = lambda: None) -> None:
        super().__init__(daemon=True)
        self.gate, self.control, self.then = gate, control or Control(), then
        self.inside, self.go = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.gate.enter(self.control):
                self.then()
                self.inside.set()
                assert self.go.wait(PATIENCE_S)
        except FlowCutError as error:
            self.error = error

    def is_in(self) -> bool:
        return self.inside.wait(PATIENCE_S)

    def end(self) -> BaseException | None:
        self.go.set()
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.error


class GivesUp(Control):
    """Looks whether it may go on, and the last time, which is after it has begun to wait, may not.

    Args:
        meanwhile: what happens before that.
        last: the look that is the last, 2 or more.
    """

    def __init__(self, meanwhile: Callable[[], Any] = lambda: None, last: int = 2) -> None:
        super().__init__()
        self.looks, self.meanwhile, self.last = 0, meanwhile, last

    def wait_s(self) -> float:
        return 0.0

    def check(self) -> None:
        self.looks += 1
        if self.looks == self.last:
            self.meanwhile()
            raise RequestCancelled("now")


def waits(gate: Gate, line: Line, **given: Any) -> Caller:
    """A caller that is in line when this returns."""
    caller = Caller(gate, **given)
    assert line.joined.acquire(timeout=PATIENCE_S)
    return caller


def is_free(gate: Gate, places: int) -> bool:
    """Whether so many may enter at once, and no more."""
    with ExitStack() as stack:
        for _ in range(places):
            stack.enter_context(gate.enter(Control(PATIENCE_S)))
        with pytest.raises(RequestCancelled), gate.enter(GivesUp(), bounded=False):
            pass
    return gate.queued == 0


def test_as_many_work_at_once_as_there_are_places() -> None:
    gate, meeting, inside, most = Gate(3, 9), threading.Barrier(3), list[int](), list[int]()

    def work() -> None:
        with gate.enter(Control()):
            inside.append(1)
            most.append(len(inside))
            meeting.wait(PATIENCE_S)  # which opens only where three are in here
            inside.pop()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert max(most) == 3
    assert len(most) == 9
    assert is_free(gate, 3)


def test_they_enter_in_the_order_they_came() -> None:
    line, order = Line(), list[int]()
    gate = Gate(1, 9, line)
    first = Caller(gate)
    assert first.is_in()
    others = [waits(gate, line, then=lambda i=i: order.append(i)) for i in range(6)]
    assert gate.queued == 6
    first.end()
    for caller in others:
        assert caller.is_in()
        caller.end()
    assert order == list(range(6))
    assert line.snapshot()["waiting"] == {"now": 0, "most": 6}


def test_one_more_than_may_wait_is_refused_at_once() -> None:
    line = Line()
    gate = Gate(1, 2, line)
    first = Caller(gate)
    assert first.is_in()
    others = [waits(gate, line) for _ in range(2)]
    with pytest.raises(QueueFull, match=r"must be at most 2 \(load_engine's waiting\), got one more"):
        gate.enter(Control()).__enter__()
    first.end()
    assert [caller.end() for caller in others] == [None, None]
    assert is_free(gate, 1)


def test_without_room_to_wait_a_free_place_is_still_taken() -> None:
    gate = Gate(1, 0)
    with gate.enter(Control()), pytest.raises(QueueFull):
        gate.enter(Control()).__enter__()
    with gate.enter(Control()):
        pass


def test_what_is_counted_elsewhere_waits_beside_the_others() -> None:
    line = Line()
    gate = Gate(1, 1, line)
    with gate.enter(Control()):
        other = waits(gate, line)
        control = GivesUp()
        with pytest.raises(RequestCancelled), gate.enter(control, bounded=False):
            pass
    assert control.looks == 2
    assert other.end() is None
    assert line.snapshot()["waiting"] == {"now": 0, "most": 1}


@pytest.mark.parametrize("error", [RequestTimeout, RequestCancelled])
def test_one_that_gives_up_does_not_hold_up_those_behind(
    error: type[FlowCutError], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, cancel, now = Line(), threading.Event(), [0.0]
    monkeypatch.setattr(engines.runtime.control, "monotonic", lambda: now[0])
    gate = Gate(1, 9, line)
    first = Caller(gate)
    assert first.is_in()
    impatient = waits(gate, line, control=Control(5.0, cancel))
    behind = waits(gate, line)
    if error is RequestTimeout:
        now[0] = 5.0
    else:
        cancel.set()
    assert isinstance(impatient.end(), error)
    assert gate.queued == 1
    assert not behind.inside.is_set()
    first.end()
    assert behind.is_in()
    assert behind.end() is None
    assert is_free(gate, 1)


def test_who_is_cancelled_already_does_not_even_wait() -> None:
    gate, control = Gate(1, 9), Control()
    control.call_off()
    with pytest.raises(RequestCancelled):
        gate.enter(control).__enter__()
    assert is_free(gate, 1)


def test_a_place_granted_to_one_that_gives_up_goes_to_the_next() -> None:
    line = Line()
    gate = Gate(1, 9, line)
    first = Caller(gate)
    assert first.is_in()

    control = GivesUp(first.end)
    with pytest.raises(RequestCancelled, match="now"):
        gate.enter(control).__enter__()
    assert control.looks == 2
    assert is_free(gate, 1)


def test_an_error_inside_gives_the_place_back() -> None:
    gate = Gate(1, 0)
    with pytest.raises(ValueError, match="mine"), gate.enter(Control()):
        raise ValueError("mine")
    assert is_free(gate, 1)


def holding(gate: Gate) -> Iterator[int]:
    """A stream, so to speak."""
    with gate.enter(Control()):
        yield 1


def test_an_abandoned_stream_gives_its_place_back() -> None:
    gate = Gate(1, 0)
    stream = holding(gate)
    assert next(stream) == 1
    del stream
    assert is_free(gate, 1)


def test_a_stream_that_the_garbage_collector_ends_within_the_lock_harms_nobody() -> None:
    class Collecting(deque[Any]):
        """At whose growth the garbage collector happens to run."""

        collected = 0

        def append(self, item: Any) -> None:
            super().append(item)
            self.collected += gc.collect()

    gate = Gate(1, 1)
    stream = holding(gate)
    next(stream)
    cycle = [stream]
    cycle.append(cycle)  # type: ignore[arg-type]
    gate._line = Collecting()
    gc.disable()
    try:
        del stream, cycle
        caller = Caller(gate)
        assert caller.is_in()
    finally:
        gc.enable()
    assert caller.end() is None
    assert gate._line.collected
    assert is_free(gate, 1)


def test_a_closed_gate_refuses_who_waits_and_who_comes_and_lets_the_others_finish() -> None:
    line, ends = Line(), list[str]()
    gate = Gate(2, 9, line)
    working = [Caller(gate), Caller(gate)]
    assert all(caller.is_in() for caller in working)
    waiting = [waits(gate, line), waits(gate, line)]
    gate.close(lambda: ends.append("first"))
    gate.close(lambda: ends.append("second"))
    for caller in waiting:
        assert isinstance(caller.end(), EngineError)
    with pytest.raises(EngineError, match=r"engine must be open, got a request after its close\(\)"):
        gate.enter(Control()).__enter__()
    assert working[0].end() is None
    assert ends == []
    assert working[1].end() is None
    assert ends == ["first"]
    assert line.snapshot()["waiting"]["now"] == 0


class Meanwhile:
    """What a thread does within the gate's lock; somebody leaves meanwhile, who finds the lock taken.

    Attributes:
        leaves: the caller that does, once.
    """

    def __init__(self) -> None:
        self.leaves: list[Caller] = []

    def __call__(self) -> None:
        if self.leaves:
            assert self.leaves.pop().end() is None


class MeanwhileLock(Meanwhile):
    """The gate's lock."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.acquire, self.release = self.lock.acquire, self.lock.release

    def __enter__(self) -> None:
        self.acquire()
        self()

    def __exit__(self, *error: object) -> None:
        self.release()


class MeanwhileLine(deque[Any]):
    """The gate's line, which is looked through to see whether it is full."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile = Meanwhile()

    def __iter__(self) -> Iterator[Any]:
        self.meanwhile()
        return super().__iter__()


def test_a_place_that_becomes_free_while_another_is_refused_goes_to_the_first_in_line() -> None:
    line = Line()
    gate = Gate(1, 1, line)
    gate._line = ahead = MeanwhileLine()
    first = Caller(gate)
    assert first.is_in()
    waiting = waits(gate, line)
    ahead.meanwhile.leaves.append(first)
    with pytest.raises(QueueFull):
        gate.enter(Control()).__enter__()
    assert ahead.meanwhile.leaves == []
    assert waiting.is_in()
    assert waiting.end() is None
    assert is_free(gate, 1)


def entering(gate: Gate) -> None:
    with pytest.raises(EngineError, match="engine must be open"):
        gate.enter(Control()).__enter__()


@pytest.mark.parametrize("knock", [entering, lambda gate: gate.close(lambda: None)])
def test_a_closed_gate_ends_though_the_last_leaves_while_another_finds_it_closed(knock: Callable[[Gate], None]) -> None:
    gate, ends = Gate(1, 1), list[int]()
    gate._lock = lock = MeanwhileLock()  # type: ignore[assignment]
    last = Caller(gate)
    assert last.is_in()
    gate.close(lambda: ends.append(1))
    lock.leaves.append(last)
    knock(gate)
    assert lock.leaves == []
    assert ends == [1]


def test_a_place_whose_holder_has_left_is_free_for_who_comes_though_none_may_wait() -> None:
    gate = Gate(1, 0)
    gate._lock = lock = MeanwhileLock()  # type: ignore[assignment]
    first = Caller(gate)
    assert first.is_in()
    lock.leaves.append(first)
    with gate.enter(Control()):
        assert lock.leaves == []
    assert is_free(gate, 1)


def test_a_gate_at_which_nobody_works_closes_at_once() -> None:
    ends: list[int] = []
    Gate(2, 9).close(lambda: ends.append(1))
    assert ends == [1]


def test_a_thread_that_waits_for_itself_is_told(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(2, 9)
    streams = [holding(gate), holding(gate)]
    assert [next(stream) for stream in streams] == [1, 1]
    with pytest.raises(RequestCancelled), gate.enter(GivesUp(), bounded=False):
        pass
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "a request waits for its own thread, which holds all 2 places: close its streams, or raise concurrency"
    ]


@contextmanager
def switching(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("seed", range(4))
def test_no_place_and_no_turn_is_lost_whoever_gives_up_when(seed: int) -> None:
    places, line = 1 + seed % 3, Line()
    gate, inside, wrong, ends = Gate(places, 5, line), list[int](), list[int](), list[str]()

    def calls(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        for _ in range(60):
            controls = [Control(), GivesUp(), GivesUp(last=3), GivesUp(last=9), Control(PATIENCE_S, threading.Event())]
            try:
                with gate.enter(chance.choice(controls)):
                    inside.append(1)
                    if len(inside) > places:
                        wrong.append(len(inside))
                    for _ in range(chance.randrange(9)):
                        time.sleep(0)  # which lets others run, who have to wait
                    inside.pop()
                    ends.append("in")
            except FlowCutError as error:
                ends.append(type(error).__name__)

    threads = [threading.Thread(target=calls, args=(i,), daemon=True) for i in range(8)]
    with switching(1e-5):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert len(ends) == 8 * 60
    assert {"in"} <= set(ends) <= {"in", "QueueFull", "RequestCancelled"}
    assert is_free(gate, places)
    assert line.snapshot()["waiting"]["now"] == 0
