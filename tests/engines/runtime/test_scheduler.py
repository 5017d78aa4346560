"""Batches of what threads submit. Seeded weights answer at length, each picture and question otherwise; the decoder is
held up by events, so that no test depends on how fast anything is."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import LIMITS, write_engine
from watched_engine import PATIENCE_S, Watched, is_step, picture, question, watched

import engines.runtime.control
from engines.runtime.control import Control
from engines.runtime.decoding import Reply
from engines.runtime.engine import LlavaEngine, Sampling
from engines.runtime.generation import Generation
from engines.runtime.scheduler import Batching, Work
from engines.runtime.ticket import Ticket
from engines.sessions.session import Feed, shape_of
from flowcut.errors import ConfigError, EngineError, InputError, QueueFull, RequestCancelled, RequestTimeout

LENGTH = 8
WORDS = ("circle", "square", "larger object", "red object at the left", "number on the sign")
Made = Callable[..., tuple[LlavaEngine, Watched]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("scheduler") / "engine", random=True).directory


@pytest.fixture
def made(directory: Path) -> Made:
    """made(concurrency=1, ..) -> an engine and its decoder."""
    return lambda **options: watched(directory, endless=True, **{"concurrency": 1, **options})


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[Generation]:
    """The answers to `ask`, one after the other, each of which is far from any other."""
    engine, _ = watched(directory, endless=True)
    margins, add = [], Reply.add

    def spy(reply: Reply, logits: np.ndarray) -> Any:
        second, first = np.sort(logits)[-2:]
        margins.append(first - second)
        return add(reply, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reply, "add", spy)
        answers = [engine.generate(*asked(i), Sampling(LENGTH)) for i in range(len(WORDS))]
    assert min(margins) > 1e-3  # rounding differs by 1e-5 in a batch
    assert len({tuple(answer.token_ids[0]) for answer in answers}) == len(WORDS)
    return answers


def asked(number: int) -> tuple[Any, str]:
    return picture(number), question(f"What is the {WORDS[number]}?")


def ask(queue: Batching, number: int, length: int = LENGTH, **limits: Any) -> Ticket:
    return queue.submit(*asked(number), Sampling(length), **limits)


def same(answer: Generation, expected: Generation, length: int = LENGTH) -> bool:
    assert [kept.tolist() for kept in answer.kept[0]] == [kept.tolist() for kept in expected.kept[0]]
    assert answer.prompt_tokens == expected.prompt_tokens
    return answer.token_ids == [expected.token_ids[0][:length]]


class Hold:
    """Stops the decoder at its first run, or the first of those that `at` names, until `go` is set."""

    def __init__(self, decoder: Watched, at: Callable[[Mapping[str, Feed]], bool] = lambda feeds: True) -> None:
        self.reached, self.go, self.at = threading.Event(), threading.Event(), at
        decoder.before = self

    def __call__(self, feeds: Mapping[str, Feed]) -> None:
        if self.at(feeds) and not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(PATIENCE_S)

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE_S)


def test_what_comes_while_one_is_answered_is_answered_together(made: Made, expected: list[Generation]) -> None:
    engine, decoder = made()
    hold = Hold(decoder)
    with engine.batching(max_wait_ms=0) as queue:
        tickets = [ask(queue, 0)]
        hold.wait()
        tickets += [ask(queue, i) for i in range(1, 5)]
        assert [ticket.running() for ticket in tickets] == [True] + 4 * [False]
        assert queue.queued == engine.counters()["waiting"]["now"] == 4
        hold.go.set()
        answers = [ticket.result(PATIENCE_S) for ticket in tickets]
    assert decoder.prefills == [1, LIMITS.max_batch, 1]
    assert all(same(*pair) for pair in zip(answers, expected, strict=True))
    found = engine.counters()
    assert found["requests"]["answered"] == found["prompts"] == 5
    assert found["tokens"] == 5 * LENGTH
    assert found["waiting"] == {"now": 0, "most": 4}


def test_pictures_bound_a_batch_and_the_oldest_is_always_in_it(made: Made) -> None:
    engine, decoder = made()
    hold = Hold(decoder)
    sizes: list[int] = []

    def submit(queue: Batching, count: int) -> Ticket:
        ticket = queue.submit([picture(i, 40, 40) for i in range(count)], question("All?", count), Sampling(1))
        ticket.add_done_callback(lambda done: sizes.append(count))
        return ticket

    with engine.batching(max_wait_ms=0) as queue:
        submit(queue, 0)
        hold.wait()
        for count in (2, 3, 1, 2, 0):
            submit(queue, count)
        hold.go.set()
    assert LIMITS.max_images == 4
    assert sizes == [0, 2, 1, 0, 3, 2]
    assert decoder.prefills == [1, 3, 1, 1]


def test_a_request_waits_for_others_so_long_and_no_longer(made: Made) -> None:
    engine, decoder = made()
    now, looked = [100.0], threading.Semaphore(0)

    def clock() -> float:
        looked.release()
        return now[0]

    def looks(count: int) -> None:
        for _ in range(count):
            assert looked.acquire(timeout=PATIENCE_S)

    work = Work(engine._read_one, engine._together, engine.gate, engine._counters, LIMITS)
    with Batching(work, 5.0, 9, threads=2, now=clock) as queue:
        first = ask(queue, 0, 1)
        looks(4)
        now[0] += 0.0049
        second = ask(queue, 1, 1)
        looks(4)
        assert decoder.prefills == []
        now[0] += 0.0002  # 5.1 ms behind the first
        for ticket in (first, second):
            ticket.result(PATIENCE_S)
        assert decoder.prefills == [2]
        third = [ask(queue, i, 1) for i in range(3)]  # a full batch need not wait
        for ticket in third:
            ticket.result(PATIENCE_S)
    assert decoder.prefills == [2, 3]


def test_each_answer_is_handed_out_when_it_is_complete(made: Made, expected: list[Generation]) -> None:
    engine, decoder = made()
    with engine.batching(max_wait_ms=1e6) as queue:
        hold = Hold(decoder, at=is_step)
        tickets = [ask(queue, i, length) for i, length in enumerate((LENGTH, 1, 4))]
        hold.wait()
        short = tickets[1].result(PATIENCE_S)
        assert [ticket.done() for ticket in tickets] == [False, True, False]
        hold.go.set()
        others = tickets[0].result(PATIENCE_S), tickets[2].result(PATIENCE_S)
    assert decoder.prefills == [3]
    assert same(short, expected[1], 1)
    assert same(others[0], expected[0])
    assert same(others[1], expected[2], 4)
    assert short.finish == ["length"]
    assert "decode_per_token" not in short.latency_ms
    for answer in (short, *others):
        stages = {name: answer.latency_ms[name] for name in ("preprocess", "queue", "vision", "prefill", "decode")}
        assert min(stages.values()) >= 0
        assert sum(stages.values()) <= answer.latency_ms["total"]
        assert sum(stages.values()) - stages["decode"] <= answer.latency_ms["time_to_first_token"]
        assert answer.latency_ms["time_to_first_token"] <= answer.latency_ms["total"]


def test_one_that_waits_is_cancelled_at_once(made: Made, expected: list[Generation]) -> None:
    engine, decoder = made()
    hold = Hold(decoder)
    with engine.batching(max_wait_ms=0, waiting=2) as queue:
        first = ask(queue, 0)
        hold.wait()
        gone, stays = ask(queue, 1), ask(queue, 2)
        assert gone.cancel()
        assert gone.done()
        assert gone.cancelled()
        assert queue.queued == 1
        also = ask(queue, 3)  # there is room again
        with pytest.raises(RequestCancelled, match="cancelled by its owner"):
            gone.result(0)
        assert gone.cancel()  # again, which changes nothing
        hold.go.set()
        assert same(first.result(PATIENCE_S), expected[0])
        assert same(stays.result(PATIENCE_S), expected[2])
        assert same(also.result(PATIENCE_S), expected[3])
        assert not first.cancel()
        assert not first.cancelled()
    assert decoder.prefills == [1, 2]
    assert engine.counters()["requests"]["cancelled"] == 1


@pytest.mark.parametrize("by", ["ticket", "event"])
def test_one_that_is_answered_is_cancelled_at_its_next_step(made: Made, expected: list[Generation], by: str) -> None:
    engine, decoder = made()
    with engine.batching(max_wait_ms=1e6) as queue:
        hold, event = Hold(decoder, at=is_step), threading.Event()
        tickets = [ask(queue, 0), ask(queue, 1, cancel=event), ask(queue, 2)]
        hold.wait()
        if by == "ticket":
            assert tickets[1].cancel()
            assert not event.is_set()  # which is its owner's
        else:
            event.set()
        assert not tickets[1].done()
        hold.go.set()
        with pytest.raises(RequestCancelled):
            tickets[1].result(PATIENCE_S)
        assert same(tickets[0].result(PATIENCE_S), expected[0])
        assert same(tickets[2].result(PATIENCE_S), expected[2])
    assert tickets[1].cancelled()
    assert decoder.prefills == [3]
    assert engine.counters()["tokens"] == 2 * LENGTH + 1  # the cancelled one's first


def test_a_batch_all_of_whom_are_cancelled_ends(made: Made) -> None:
    engine, decoder = made()
    with engine.batching(max_wait_ms=1e6) as queue:
        hold = Hold(decoder, at=is_step)
        tickets = [ask(queue, i) for i in range(3)]
        hold.wait()
        for ticket in tickets:
            ticket.cancel()
        hold.go.set()
        assert all(isinstance(ticket.exception(PATIENCE_S), RequestCancelled) for ticket in tickets)
    assert engine.counters()["decode_steps"] == 1


def test_time_runs_out_in_the_queue_and_on_the_way(
    made: Made, expected: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(engines.runtime.control, "monotonic", lambda: now[0])
    engine, decoder = made()
    with engine.batching(max_wait_ms=0) as queue:
        hold = Hold(decoder, at=is_step)
        late = ask(queue, 0, timeout_s=5.0)
        hold.wait()
        queued, patient = ask(queue, 1, timeout_s=5.0), ask(queue, 2, timeout_s=50.0)
        now[0] = 6.0
        hold.go.set()
        for ticket in (late, queued):
            with pytest.raises(RequestTimeout, match=r"timeout_s=5\.0"):
                ticket.result(PATIENCE_S)
        assert same(patient.result(PATIENCE_S), expected[2])
    assert decoder.prefills == [1, 1]
    assert engine.counters()["requests"]["timed_out"] == 2


def test_one_in_the_queue_ends_in_time_though_another_is_still_answered(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, begun, steps = [0.0], threading.Event(), threading.Semaphore(0)
    monkeypatch.setattr(engines.runtime.control, "monotonic", lambda: now[0])
    engine, decoder = made()

    def one_step(feeds: Mapping[str, Feed]) -> None:
        begun.set()
        assert steps.acquire(timeout=PATIENCE_S)

    decoder.before = one_step
    with engine.batching(max_wait_ms=0) as queue:
        first = ask(queue, 0)
        assert begun.wait(PATIENCE_S)
        waiting = ask(queue, 1, timeout_s=5.0)
        now[0] = 6.0
        steps.release(3)
        assert isinstance(waiting.exception(PATIENCE_S), RequestTimeout)
        assert not first.done()
        steps.release(LENGTH)
        first.result(PATIENCE_S)


def test_one_in_the_queue_ends_in_time_though_there_is_no_place(made: Made) -> None:
    engine, _ = made()
    event = threading.Event()
    with engine.batching(max_wait_ms=0) as queue:
        with engine.gate.enter(Control()):  # as somebody's stream does
            waiting, behind = ask(queue, 1, cancel=event), ask(queue, 0, 1)
            event.set()
            assert isinstance(waiting.exception(PATIENCE_S), RequestCancelled)
            assert not behind.done()
        behind.result(PATIENCE_S)


def test_who_comes_when_the_last_that_waited_has_gone_is_answered(
    made: Made, expected: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = made()
    waits, gone, came = threading.Event(), threading.Event(), list[Ticket]()
    wait, withdraw = engine.gate._wait, engine.gate._withdraw

    def waiting(*given: Any) -> None:
        waits.set()
        wait(*given)

    def withdrawing(*given: Any) -> None:  # the queue leaves the line, for nobody waits in it, and then somebody does
        withdraw(*given)
        if not came:
            came.append(ask(queue, 1))
            gone.set()

    with engine.batching(max_wait_ms=0) as queue:
        with engine.gate.enter(Control()):
            monkeypatch.setattr(engine.gate, "_wait", waiting)
            monkeypatch.setattr(engine.gate, "_withdraw", withdrawing)
            first = ask(queue, 0)
            assert waits.wait(PATIENCE_S)
            first.cancel()
            assert gone.wait(PATIENCE_S)
        assert same(came[0].result(PATIENCE_S), expected[1])


class Fails:
    """Breaks every prefill of a prompt that has `tokens` tokens, whoever is in it."""

    def __init__(self, decoder: Watched, tokens: int) -> None:
        self.tokens = tokens
        decoder.before = self

    def __call__(self, feeds: Mapping[str, Feed]) -> None:
        if not is_step(feeds) and self.tokens - 1 in np.asarray(feeds["last_token"]):
            raise EngineError("language failed in its library: no reason.")


def test_only_the_guilty_one_of_a_batch_gets_the_error(
    made: Made, expected: list[Generation], caplog: pytest.LogCaptureFixture
) -> None:
    engine, decoder = made()
    assert len({answer.prompt_tokens[0] for answer in expected[1:4]}) == 3
    Fails(decoder, expected[3].prompt_tokens[0])
    with engine.batching(max_wait_ms=1e6) as queue:
        tickets = [ask(queue, i) for i in (1, 3, 2)]
        with pytest.raises(EngineError, match="no reason"):
            tickets[1].result(PATIENCE_S)
        assert same(tickets[0].result(PATIENCE_S), expected[1])
        assert same(tickets[2].result(PATIENCE_S), expected[2])
    assert decoder.prefills == [3, 1, 1, 1]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["a batch of 3 failed and is run again one by one: language failed in its library: no reason."]
    found = engine.counters()
    assert (found["retried"], found["requests"]["failed"], found["requests"]["answered"]) == (1, 1, 2)


def test_a_batch_that_fails_on_its_way_is_begun_again_without_those_who_have_their_answer(
    made: Made, expected: list[Generation]
) -> None:
    engine, decoder = made()
    failed: list[int] = []

    def once(feeds: Mapping[str, Feed]) -> None:
        if is_step(feeds) and engine.counters()["decode_steps"] == 3 and not failed:
            failed.append(shape_of(feeds["input_ids"])[0])
            raise ZeroDivisionError("a bug")  # whatever it is

    decoder.before = once
    with engine.batching(max_wait_ms=1e6) as queue:
        tickets = [ask(queue, i, length) for i, length in enumerate((LENGTH, 2, LENGTH))]
        answers = [ticket.result(PATIENCE_S) for ticket in tickets]
    assert failed == [3]
    assert decoder.prefills == [3, 1, 1]
    assert all(same(answers[i], expected[i], n) for i, n in enumerate((LENGTH, 2, LENGTH)))
    assert engine.counters()["tokens"] == 2 * LENGTH + 2 + 2 * 3  # the latter: what the two had when it failed


def test_tokens_of_an_answer_that_fails_on_its_way_are_counted(made: Made) -> None:
    engine, decoder = made()

    def fail(feeds: Mapping[str, Feed]) -> None:
        if is_step(feeds) and engine.counters()["decode_steps"] == 2:
            raise EngineError("broken")

    decoder.before = fail
    with engine.batching(max_wait_ms=0) as queue:
        assert isinstance(ask(queue, 0).exception(PATIENCE_S), EngineError)
    assert engine.counters()["requests"]["failed"] == 1
    assert engine.counters()["tokens"] == 2  # of the prefill and of the first step


class Bug(BaseException):
    """No Exception, as SystemExit is none, and the panic of a library in Rust."""


def test_what_ends_threads_is_a_requests_own_error(made: Made, expected: list[Generation]) -> None:
    engine, decoder = made()

    def fail(feeds: Mapping[str, Feed]) -> None:
        if not is_step(feeds) and expected[3].prompt_tokens[0] - 1 in np.asarray(feeds["last_token"]):
            raise Bug

    decoder.before = fail
    with engine.batching(max_wait_ms=1e6) as queue:
        tickets = [ask(queue, i) for i in (1, 3, 2)]
        assert isinstance(tickets[1].exception(PATIENCE_S), Bug)
        assert same(tickets[0].result(PATIENCE_S), expected[1])
        assert same(tickets[2].result(PATIENCE_S), expected[2])


@pytest.mark.parametrize("error", [SystemExit, Bug, ValueError])
def test_a_callback_ends_nobody_elses_answer_whatever_it_raises(
    made: Made, expected: list[Generation], error: type[BaseException]
) -> None:
    engine, decoder = made()
    hold, event, called = Hold(decoder), threading.Event(), list[Ticket]()

    def breaks(ticket: Any) -> None:
        raise error

    with engine.batching(max_wait_ms=0) as queue:
        tickets = [ask(queue, 0)]
        hold.wait()
        gone = [ask(queue, i, cancel=event) for i in (3, 4)]  # which end together
        tickets += [ask(queue, i) for i in (1, 2)]
        for ticket in (*gone, *tickets):
            ticket.add_done_callback(breaks)
            ticket.add_done_callback(called.append)  # type: ignore[arg-type]
        event.set()
        hold.go.set()
        assert all(isinstance(ticket.exception(PATIENCE_S), RequestCancelled) for ticket in gone)
        assert all(same(ticket.result(PATIENCE_S), expected[i]) for i, ticket in enumerate(tickets))
        assert same(ask(queue, 3).result(PATIENCE_S), expected[3])
    assert called == [*gone, *tickets]
    assert decoder.prefills == [1, 2, 1]
    assert engine.counters()["retried"] == 0


def test_those_who_wait_are_told_when_the_engine_cannot_even_be_closed(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, decoder = made()
    hold = Hold(decoder)

    def fail() -> None:
        raise Bug

    monkeypatch.setattr(engine.model, "close", fail)
    with engine.batching(max_wait_ms=0) as queue:
        first = ask(queue, 0)
        hold.wait()
        waiting = [ask(queue, i) for i in (1, 2)]
        engine.close()
        hold.go.set()
        assert first.result(PATIENCE_S).token_ids
        assert all(isinstance(ticket.exception(PATIENCE_S), EngineError) for ticket in waiting)
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == [
        "a thread of a queue goes on behind an error"
    ]


def test_an_error_does_not_keep_the_cache(made: Made) -> None:
    engine, decoder = made()

    def fail(feeds: Mapping[str, Feed]) -> None:
        raise EngineError("broken")

    decoder.before = fail
    with engine.batching(max_wait_ms=1e6) as queue:
        errors = [ticket.exception(PATIENCE_S) for ticket in [ask(queue, i) for i in range(3)]]
    with pytest.raises(EngineError, match="broken") as caught:
        engine.generate(*asked(0), Sampling(1))
    assert len(decoder.states) == 5
    assert decoder.living() == 0
    assert [str(error) for error in (*errors, caught.value)] == ["broken"] * 4


@pytest.mark.parametrize(
    ("images", "prompt", "given", "error"),
    [
        (b"not a picture", question("What?"), {}, InputError),
        ([], question("What?"), {}, InputError),
        ([picture(0, 9, 9)] * 5, question("What?", 5), {}, InputError),
        ([], "word " * 200, {}, InputError),
        ([], "", {}, InputError),
        ([], "Hi", {"sampling": Sampling(33)}, InputError),
        ([], "Hi", {"timeout_s": 0}, ConfigError),
        ([], "Hi", {"cancel": True}, ConfigError),
    ],
)
def test_bad_input_is_refused_where_it_is_submitted(
    made: Made, images: Any, prompt: str, given: dict[str, Any], error: type[Exception]
) -> None:
    engine, decoder = made()
    with engine.batching(max_wait_ms=0) as queue:
        with pytest.raises(error) as caught:
            queue.submit(images, prompt, **{"sampling": Sampling(1), **given})
        assert queue.queued == 0
        ask(queue, 0, 1).result(PATIENCE_S)
    assert "\n" not in str(caught.value)
    assert decoder.prefills == [1]
    assert engine.counters()["requests"] | {"answered": 1, "refused": 1} == engine.counters()["requests"]


def test_a_full_queue_refuses_the_next(made: Made) -> None:
    engine, decoder = made()
    hold = Hold(decoder)
    with engine.batching(max_wait_ms=0, waiting=2) as queue:
        ask(queue, 0)
        hold.wait()
        tickets = [ask(queue, i) for i in (1, 2)]
        with pytest.raises(QueueFull, match=r"at most 2 \(batching's waiting\), got one more"):
            ask(queue, 3)
        hold.go.set()
        assert all(ticket.result(PATIENCE_S) for ticket in tickets)
        ask(queue, 3)
    assert engine.counters()["requests"]["queue_full"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_wait_ms": -1}, "max_wait_ms must be a number of milliseconds, at least 0, got -1"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms must be"),
        ({"max_wait_ms": "5"}, "max_wait_ms must be"),
        ({"waiting": 0}, "waiting must be a whole number, at least 1, got 0"),
        ({"waiting": 2.5}, "waiting must be"),
    ],
)
def test_a_queue_of_impossible_numbers_is_refused(made: Made, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made()[0].batching(**given)


def threads_of_queues() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flowcut-batching")]


def test_the_end_of_with_finishes_what_waits(made: Made, expected: list[Generation]) -> None:
    engine, _ = made(concurrency=2)
    with engine.batching(max_wait_ms=1e9) as queue:  # none of which the end waits for
        assert len(threads_of_queues()) == 2
        tickets = [ask(queue, i) for i in range(5)]
    assert all(ticket.done() for ticket in tickets)
    assert all(same(ticket.result(0), answer) for ticket, answer in zip(tickets, expected, strict=True))
    assert threads_of_queues() == []
    with pytest.raises(EngineError, match=r"queue must be open, got a request after its close\(\)") as caught:
        ask(queue, 0)
    assert "\n" not in str(caught.value)
    queue.close()  # again, which changes nothing
    assert engine.generate(*asked(0), Sampling(1)).token_ids  # the engine is well


def closing_by_error(queue: Batching) -> None:
    with pytest.raises(KeyboardInterrupt), queue:
        raise KeyboardInterrupt


@pytest.mark.parametrize("end", [lambda queue: queue.close(cancel=True), closing_by_error])
def test_a_queue_may_be_closed_without_finishing_what_waits(made: Made, end: Callable[[Batching], None]) -> None:
    engine, decoder = made()
    hold = Hold(decoder)
    queue = engine.batching(max_wait_ms=0)
    first, waiting = ask(queue, 0), threading.Event()
    hold.wait()
    others = [ask(queue, i) for i in (1, 2)]
    others[-1].add_done_callback(lambda done: waiting.set())
    closer = threading.Thread(target=end, args=(queue,))
    closer.start()
    assert waiting.wait(PATIENCE_S)
    assert not first.done()
    hold.go.set()
    closer.join(PATIENCE_S)
    assert first.result(0).token_ids
    for ticket in others:
        with pytest.raises(RequestCancelled, match="its queue was closed"):
            ticket.result(0)
    assert threads_of_queues() == []


def test_a_callback_may_close_its_queue_and_break(made: Made) -> None:
    engine, _ = made(concurrency=2)
    queue = engine.batching(max_wait_ms=0)
    ended = threading.Event()

    def done(ticket: Any) -> None:
        queue.close()
        ended.set()
        raise ValueError("a callback's own fault")

    ask(queue, 0, 1).add_done_callback(done)
    assert ended.wait(PATIENCE_S)
    queue.close()
    assert threads_of_queues() == []


def test_a_queue_that_is_forgotten_does_not_hold_the_interpreter(made: Made) -> None:
    queue = made()[0].batching()
    found = [thread for thread in threading.enumerate() if thread.name.startswith("flowcut-batching")]
    assert [thread.daemon for thread in found] == [True]
    queue.close()


def test_those_who_wait_at_an_engine_that_is_closed_are_refused(made: Made) -> None:
    engine, decoder = made()
    hold = Hold(decoder)
    with engine.batching(max_wait_ms=0) as queue:
        first = ask(queue, 0)
        hold.wait()
        waiting = [ask(queue, i) for i in (1, 2)]
        engine.close()
        hold.go.set()
        assert first.result(PATIENCE_S).token_ids
        for ticket in waiting:
            with pytest.raises(EngineError, match="engine must be open"):
                ticket.result(PATIENCE_S)
        with pytest.raises(EngineError, match="engine must be open"):
            ask(queue, 3)


def test_a_queue_and_direct_calls_share_the_places_in_turn(made: Made, expected: list[Generation]) -> None:
    engine, decoder = made()
    at_once, most, lock = [0], [0], threading.Lock()
    run = decoder.run

    def counting(*args: Any) -> Any:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        try:
            return run(*args)
        finally:
            with lock:
                at_once[0] -= 1

    decoder.run = counting  # type: ignore[method-assign]
    with engine.batching(max_wait_ms=0) as queue:
        tickets = [ask(queue, i) for i in range(3)]
        direct = [engine.generate(*asked(i), Sampling(LENGTH)) for i in (3, 4)]
        answers = [*(ticket.result(PATIENCE_S) for ticket in tickets), *direct]
    assert all(same(*pair) for pair in zip(answers, expected, strict=True))
    assert most == [1]


def test_a_queue_waits_for_its_place_however_few_may(made: Made) -> None:
    engine, _ = made(waiting=0)
    with engine.batching(max_wait_ms=0) as queue:
        with engine.gate.enter(Control()):
            ticket, other = ask(queue, 0, 1), ask(queue, 1, 1)
            with pytest.raises(QueueFull):
                engine.generate(*asked(2), Sampling(1))
            ticket.cancel()  # which wakes nobody
            assert not other.done()
        assert other.result(PATIENCE_S).token_ids
    assert engine.counters()["requests"]["queue_full"] == 1


def test_two_batches_are_at_work_at_once_where_there_are_two_places(made: Made) -> None:
    engine, decoder = made(concurrency=2)
    meeting = threading.Barrier(2)
    decoder.before = lambda feeds: None if is_step(feeds) else meeting.wait(PATIENCE_S) and None
    with engine.batching(max_wait_ms=1e6) as queue:
        tickets = [ask(queue, i % 5) for i in range(6)]
        assert all(ticket.result(PATIENCE_S) for ticket in tickets)
    assert decoder.prefills == [3, 3]


def test_a_ticket_is_awaited_like_any_future(made: Made, expected: list[Generation]) -> None:
    engine, _ = made()

    async def both(queue: Batching) -> list[Generation]:
        futures = [asyncio.wrap_future(ask(queue, i)) for i in range(2)]
        return await asyncio.wait_for(asyncio.gather(*futures), PATIENCE_S)

    async def cancelled(queue: Batching) -> None:
        future = asyncio.wrap_future(ask(queue, 0))
        future.cancel()
        await future

    with engine.batching() as queue:
        answers = asyncio.run(both(queue))
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled(queue))
    assert all(same(answers[i], expected[i]) for i in range(2))
