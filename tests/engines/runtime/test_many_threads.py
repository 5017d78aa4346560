"""Many threads at one engine, with everything that users do: good questions, bad ones, cancelled and late ones, streams
that nobody reads on. Every good answer is the one that it has alone, every bad request gets its error, and afterwards
everything is as it was.

The checkpoint's own weights, whose answers are clear: rounding, which differs in a batch, decides nothing. No token
ends an answer here, so that there is something to cancel.
"""

from __future__ import annotations

import ctypes
import gc
import io
import logging
import random
import resource
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from tiny_engine import LIMITS, write_engine
from watched_engine import Watched, picture, question, watched

from engines.runtime.control import Control
from engines.runtime.counters import outcome_of
from engines.runtime.decoding import Reply
from engines.runtime.engine import LlavaEngine, Sampling
from engines.runtime.generation import Generation
from engines.runtime.picture_cache import PictureCache
from engines.runtime.scheduler import Batching
from engines.runtime.ticket import Ticket
from engines.sessions.session import Feed, bytes_of
from flowcut.errors import ConfigError, FlowCutError, InputError, RequestCancelled, RequestTimeout

LOG = logging.getLogger(__name__)
FILES = Path("/proc/self/fd")
pytestmark = pytest.mark.skipif(not FILES.exists(), reason="needs Linux's /proc to count what is held")

SHORT_S, SOAK_S = 120.0, 7200.0
"""After which threads that have not ended are said to hang, in the short version and in the long one."""
MARGIN_BYTES = 96 * 2**20
"""By how much the process may be larger after the second round than after the first: heaps of threads are not returned
to the system piece by piece. A KV cache of this engine takes half a megabyte, a large picture four."""
PICTURES_KEPT = 5
"""Of more than twice as many, so that some go and come again."""


@dataclass(frozen=True, eq=False)
class Case:
    """A question, and what must become of it: its answer, or its error."""

    images: Any
    prompt: Any
    given: dict[str, Any]
    expected: Generation | type[FlowCutError]


Outcomes = Counter[str]


def good(directory: Path) -> list[tuple[Any, str, Sampling]]:
    """Pictures of all kinds and sizes, none to three of them, prompts of all lengths, answers too."""
    file = directory / "picture.png"
    picture(1, 700, 500).save(file)
    stream = io.BytesIO()
    picture(2, 64, 64).convert("P").save(stream, "GIF")
    colour, count = "What color is the circle?", "How many objects are there?"
    return [
        (picture(0), question(colour), Sampling(1)),
        (file, question(count), Sampling(9)),
        (stream.getvalue(), question("What shape is at the left?"), Sampling(17)),
        (np.asarray(picture(3, 90, 300)), question(colour), Sampling(4)),
        (
            picture(4, 1500, 1000),
            question("Is the circle or the square the larger one?"),
            Sampling(LIMITS.max_new_tokens),
        ),
        ([picture(5), picture(6, 33, 47)], question(count, 2), Sampling(12)),
        ([picture(7), picture(0), picture(8)], question("Name all.", 3), Sampling(6)),
        ([], "USER: What color is the sky? ASSISTANT:", Sampling(8)),
        (picture(9).convert("L"), question(count), Sampling(2)),
        (picture(10), question("What is written on the sign at the right of the red square?"), Sampling(20)),
        (picture(0), question(count), Sampling(30)),
    ]


def bad(directory: Path) -> list[Case]:
    """What cannot be answered."""
    one, text = picture(0), question("What?")
    return [
        Case(b"not a picture", text, {}, InputError),
        Case(directory / "absent.png", text, {}, InputError),
        Case(one, "no place for the picture", {}, InputError),
        Case([one] * (LIMITS.max_images + 1), question("What?", LIMITS.max_images + 1), {}, InputError),
        Case(one, question("long " * 100), {}, InputError),
        Case([], " ", {}, InputError),
        Case(one, text, {"sampling": Sampling(LIMITS.max_new_tokens + 1)}, InputError),
        Case(one, text, {"timeout_s": -1}, ConfigError),
        Case(one, text, {"cancel": "yes"}, ConfigError),
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("threads") / "engine").directory


@pytest.fixture(scope="module")
def cases(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Answered one after the other, by another engine, each far from any other answer."""
    engine, _ = watched(directory, endless=True)
    margins, add = [], Reply.add

    def spy(reply: Reply, logits: np.ndarray) -> Any:
        margins.append(float(np.diff(np.sort(logits)[-2:])[0]))
        return add(reply, logits)

    files = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reply, "add", spy)
        answered = [Case(i, p, {"sampling": s}, engine.generate(i, p, s)) for i, p, s in good(files)]
    assert min(margins) > 1e-2  # rounding differs by 1e-5 in a batch
    return answered + bad(files)


class Chaos:
    """Calls off what is at work or waits, at steps of the decoder."""

    def __init__(self, seed: int) -> None:
        self.lock, self.chance, self.pending = threading.Lock(), random.Random(seed), list[Callable[[], Any]]()

    def add(self, cancel: Callable[[], Any]) -> None:
        with self.lock:
            self.pending.append(cancel)

    def __call__(self, feeds: Mapping[str, Feed]) -> None:
        with self.lock:
            due = self.pending.pop() if self.pending and self.chance.random() < 0.3 else None
        if due is not None:
            due()


def check(case: Case, got: Generation | BaseException | None, allowed: tuple[type[FlowCutError], ...]) -> str:
    """The request's outcome; "wrong: .." where it is not among those that it may have."""
    if isinstance(got, BaseException):
        expected = allowed if isinstance(case.expected, Generation) else (case.expected,)
        right = isinstance(got, expected) and "\n" not in str(got)
        return outcome_of(got) if right else f"wrong: {type(got).__name__}: {got}"
    if got is None:  # a stream that was left
        return "cancelled"
    if not isinstance(case.expected, Generation):
        return f"wrong: answered {case.prompt}"
    parts = [
        (each.texts, each.token_ids, each.finish, each.prompt_tokens, [k.tolist() for k in each.kept[0]])
        for each in (got, case.expected)
    ]
    return "answered" if parts[0] == parts[1] else f"wrong: {parts[0]} for {parts[1]}"


class Caller:
    """One thread's requests.

    Args:
        queue: through which it asks; None: the engine itself.
    """

    def __init__(self, engine: LlavaEngine, queue: Batching | None, cases: list[Case], chaos: Chaos, seed: str) -> None:
        self.engine, self.queue, self.chaos, self.chance = engine, queue, chaos, random.Random(seed)
        self.good = [case for case in cases if isinstance(case.expected, Generation)]
        self.bad = [case for case in cases if case not in self.good]
        self.late_s = cycle([1e-9, 1e-2, 1e-1])  # the first of which is over when it is looked at first
        self.outcomes: Outcomes = Counter()

    def ask_all(self, requests: int) -> None:
        """A tenth of them bad, a tenth called off before or on the way, a tenth late, a few streams left alone."""
        kinds = ["bad", "off", "late", "left"]
        for i in range(requests):
            kind = kinds[i % 10] if i % 10 < len(kinds) else "good"
            case = self.chance.choice(self.bad if kind == "bad" else self.good)
            ask = self._directly if self.queue is None else self._queued
            self.outcomes[ask(kind, case)] += 1

    def _directly(self, kind: str, case: Case) -> str:
        given, allowed, cancel = self._limits(kind, case)
        if cancel is not None:
            self.chaos.add(cancel.set)
        try:
            return check(case, self._answer(kind, case, given), allowed)
        except FlowCutError as error:
            return check(case, error, allowed)

    def _answer(self, kind: str, case: Case, given: dict[str, Any]) -> Generation | None:
        if kind != "left":
            return self.engine.generate(case.images, case.prompt, **given)
        stream = self.engine.stream(case.images, case.prompt, **given)
        next(stream)
        if self.chance.random() < 0.5:
            stream.close()
        return None

    def _queued(self, kind: str, case: Case) -> str:
        given, allowed, cancel = self._limits(kind, case)
        assert self.queue is not None
        ahead = self._another() if self.chance.random() < 0.3 else None
        try:
            ticket = self.queue.submit(case.images, case.prompt, **given)
            if cancel is not None:
                self.chaos.add(self.chance.choice([cancel.set, ticket.cancel]))
            got = check(case, ticket.result(), allowed)
        except FlowCutError as error:
            got = check(case, error, allowed)
        if ahead is not None:
            self.outcomes[check(ahead[0], ahead[1].result(), ())] += 1
        return got

    def _another(self) -> tuple[Case, Ticket]:
        """One more, so that the thread has two on their way."""
        case = self.chance.choice(self.good)
        assert self.queue is not None
        return case, self.queue.submit(case.images, case.prompt, **case.given)

    def _limits(
        self, kind: str, case: Case
    ) -> tuple[dict[str, Any], tuple[type[FlowCutError], ...], threading.Event | None]:
        """Of one request: its arguments, the errors that it may end in beside its answer, and its event."""
        if kind == "off":
            event = threading.Event()
            return {**case.given, "cancel": event}, (RequestCancelled,), event
        if kind == "late":
            return {**case.given, "timeout_s": next(self.late_s)}, (RequestTimeout,), None
        return case.given, (), None


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def in_threads(work: list[Callable[[], Any]], hangs_s: float) -> None:
    """All at once. What hangs is left behind, so that it is known at all."""
    running = [threading.Thread(target=each, daemon=True) for each in work]
    end = monotonic() + hangs_s
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(max(0.0, end - monotonic()))
    assert not any(thread.is_alive() for thread in running), "hangs"


def ask_from_threads(callers: list[Caller], requests: int, hangs_s: float) -> Outcomes:
    """Everything that was asked, by outcome."""
    with switching_often():
        in_threads([partial(caller.ask_all, requests) for caller in callers], hangs_s)
    return sum((caller.outcomes for caller in callers), Counter())


def full_batch(engine: LlavaEngine, queue: Batching, cases: list[Case], hangs_s: float) -> Outcomes:
    """As many as fit in one batch, which they are: they come while nobody can be answered."""
    asked = [case for case in cases if not isinstance(case.images, list)][: LIMITS.max_batch]
    with ExitStack() as places:
        for _ in range(engine.options.concurrency):
            places.enter_context(engine.gate.enter(Control()))
        tickets = [queue.submit(case.images, case.prompt, **case.given) for case in asked]
    pairs = zip(asked, tickets, strict=True)
    return Counter(check(case, ticket.result(hangs_s), ()) for case, ticket in pairs)


def resident_bytes() -> int:
    """Of this process, once the allocator has given back what it can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def held(decoder: Watched) -> dict[str, int]:
    """What must be as it was."""
    gc.collect()
    return {"caches": decoder.living(), "threads": threading.active_count(), "files": len(list(FILES.iterdir()))}


def run(directory: Path, cases: list[Case], threads: int, requests: int, hangs_s: float) -> dict[str, Any]:
    """Two rounds of `threads` x `requests`, directly and through a queue; checks them, and says how they went."""
    engine, decoder = watched(directory, endless=True, concurrency=2, waiting=threads)
    engine.generate(cases[0].images, cases[0].prompt, **cases[0].given)
    small = sum(bytes_of(tensor) for seen in engine.model.pictures._pictures.values() for tensor in seen.rows.values())
    engine.model.pictures = PictureCache(limit := PICTURES_KEPT * small)
    decoder.before = chaos = Chaos(0)
    before, sizes, outcomes = held(decoder), list[int](), Counter[str]({"answered": 1})
    for _ in range(2):
        queue = engine.batching(max_wait_ms=2.0)
        outcomes += full_batch(engine, queue, cases, hangs_s)
        for way in (None, queue):
            callers = [Caller(engine, way, cases, chaos, f"{i} {way is None}") for i in range(threads)]
            outcomes += ask_from_threads(callers, requests, hangs_s)
        in_threads([queue.close], hangs_s)
        chaos.pending.clear()
        assert held(decoder) == before
        assert 0 < engine.model.pictures.bytes <= limit
        sizes.append(resident_bytes())
    assert [outcome for outcome in outcomes if outcome.startswith("wrong")] == []
    found = engine.counters()
    assert {name: n for name, n in found["requests"].items() if n} == outcomes
    assert found["waiting"]["now"] == engine.gate.queued == 0
    assert sizes[1] - sizes[0] < MARGIN_BYTES
    engine.close()
    LOG.info("%d threads x %d requests: %s; bytes behind each round: %s", threads, requests, found, sizes)
    return found


def check_round(found: dict[str, Any], threads: int, requests: int) -> None:
    """Everything that was to happen has happened."""
    asked = 4 * threads * requests
    assert sum(found["requests"].values()) >= asked
    assert found["requests"]["refused"] == 4 * threads * len(range(0, requests, 10))
    assert found["requests"]["answered"] > asked / 2
    assert found["requests"]["failed"] == found["requests"]["queue_full"] == found["retried"] == 0
    assert found["requests"]["timed_out"] >= 4 * threads  # the first late one of each
    assert found["requests"]["cancelled"] >= 2 * threads * len(range(3, requests, 10))  # the streams that were left
    assert max(map(int, found["batches"])) == LIMITS.max_batch
    assert found["pictures"]["seen"] > PICTURES_KEPT
    assert found["pictures"]["from_cache"] > 0


def test_eight_threads(directory: Path, cases: list[Case]) -> None:
    check_round(run(directory, cases, 8, 12, SHORT_S), 8, 12)


@pytest.mark.soak
def test_sixteen_threads_with_200_requests_each(directory: Path, cases: list[Case]) -> None:
    check_round(run(directory, cases, 16, 200, SOAK_S), 16, 200)
