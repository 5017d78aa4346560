"""The end of an engine, and of requests that are not read to their end."""

from __future__ import annotations

import gc
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import write_engine
from watched_engine import PATIENCE_S, Watched, picture, question, watched

from engines import load_engine
from engines.runtime.engine import Chunk, LlavaEngine, Sampling
from flowcut.errors import EngineError, InputError, RequestCancelled, RequestTimeout

Q = question("What color is the circle?")
FIVE = Sampling(5)
CLOSED = r"engine must be open, got a request after its close\(\)\. Load the directory again\."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("close") / "engine").directory


@pytest.fixture
def made(directory: Path) -> tuple[LlavaEngine, Watched]:
    return watched(directory, endless=True, concurrency=1)


@pytest.fixture
def ends(made: tuple[LlavaEngine, Watched], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which sessions were closed."""
    engine, decoder = made
    closed: list[str] = []
    monkeypatch.setattr(decoder, "close", lambda: closed.append("language"), raising=False)
    monkeypatch.setattr(engine.model.vision, "close", lambda: closed.append("vision"))
    return closed


def began(engine: LlavaEngine) -> Iterator[Chunk]:
    stream = engine.stream(picture(0), Q, FIVE)
    assert next(stream).index == 0
    return stream


def test_a_closed_engine_refuses_everything_in_one_line(made: tuple[LlavaEngine, Watched], ends: list[str]) -> None:
    engine, _ = made
    with engine as same:
        assert same is engine
        engine.generate(picture(0), Q, FIVE)
    assert sorted(ends) == ["language", "vision"]
    with engine.batching() as queue:
        for call in (engine.generate, queue.submit, lambda *asked: next(engine.stream(*asked))):
            with pytest.raises(EngineError, match=CLOSED):
                call(picture(0), Q, FIVE)
    with pytest.raises(EngineError, match=CLOSED):
        engine.prefill(picture(0), Q)
    with pytest.raises(EngineError, match=CLOSED):
        _ = engine.model
    engine.close()
    assert len(ends) == 2
    assert engine.counters()["requests"]["answered"] == 1


def test_who_is_at_work_when_the_engine_is_closed_finishes(made: tuple[LlavaEngine, Watched], ends: list[str]) -> None:
    engine, _ = made
    expected = engine.generate(picture(0), Q, FIVE).token_ids[0]
    stream = began(engine)
    errors: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(EngineError, match=CLOSED) as caught:
            engine.generate(picture(0), Q, FIVE)
        errors.append(caught.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    engine.close()
    waiting.join(PATIENCE_S)
    assert len(errors) == 1
    assert ends == []
    assert [chunk.token_id for chunk in stream] == expected[1:]
    assert sorted(ends) == ["language", "vision"]


def test_a_closed_engine_holds_no_graph(directory: Path) -> None:
    engine = load_engine(directory, "ort", threads=1)
    engine.generate(picture(0), Q, FIVE)
    held = [weakref.ref(each) for each in (engine.model, engine.model.vision, engine.model.language)]
    engine.close()
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


@pytest.mark.parametrize("end", ["close", "del"])
def test_a_stream_that_is_not_read_to_its_end_gives_place_and_cache_back(
    made: tuple[LlavaEngine, Watched], end: str
) -> None:
    engine, decoder = made
    stream: Any = began(engine)
    with pytest.raises(RequestTimeout):
        engine.generate(picture(0), Q, FIVE, timeout_s=1e-3)
    assert decoder.living() == 1
    if end == "close":
        stream.close()
    del stream
    assert decoder.living() == 0
    assert len(engine.generate(picture(0), Q, FIVE).token_ids[0]) == 5
    assert engine.counters()["requests"]["cancelled"] == 1


def test_a_stream_ends_at_its_next_step_when_it_is_cancelled(made: tuple[LlavaEngine, Watched]) -> None:
    engine, decoder = made
    cancel = threading.Event()
    stream = engine.stream(picture(0), Q, FIVE, cancel=cancel)
    next(stream)
    cancel.set()
    with pytest.raises(RequestCancelled):
        list(stream)
    assert decoder.living() == 0
    assert len(engine.generate(picture(0), Q, FIVE).token_ids[0]) == 5


def test_what_prefill_returns_holds_no_cache(made: tuple[LlavaEngine, Watched]) -> None:
    engine, decoder = made
    prefill = engine.prefill(picture(0), Q)
    assert prefill.state is None
    assert len(decoder.states) == 1
    assert decoder.living() == 0


def mishap() -> None:
    """An error of the caller's own, whose frames hold something and a generator at work."""
    own = (i for i in range(3))
    next(own)
    raise LookupError("the caller's")


def during_generate(engine: LlavaEngine, stream: Any) -> None:
    with pytest.raises(InputError):
        engine.generate("nowhere.png", Q)


def during_stream(engine: LlavaEngine, stream: Any) -> None:
    with pytest.raises(EngineError):
        list(stream)


def during_close(engine: LlavaEngine, stream: Any) -> None:
    stream.close()


@pytest.mark.parametrize("then", [during_generate, during_stream, during_close])
def test_what_a_caller_was_handling_stays_whole(
    made: tuple[LlavaEngine, Watched], then: Callable[[LlavaEngine, Any], None]
) -> None:
    engine, decoder = made
    stream = began(engine)

    def fail(feeds: Any) -> None:
        raise EngineError("broken")

    decoder.before = fail
    frames: list[Any] = []
    try:
        try:
            mishap()
        except LookupError as first:
            frames += [frame for frame, _ in traceback.walk_tb(first.__traceback__)]
            raise ValueError("on the way") from first
    except ValueError:
        then(engine, stream)
    assert list(frames[-1].f_locals["own"]) == [1, 2]


def test_errors_that_somebody_keeps_do_not_keep_the_cache(
    made: tuple[LlavaEngine, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, decoder = made
    read, pictures = engine.reader.read_all, list[Any]()

    def reading(*asked: Any) -> Any:
        requests = read(*asked)
        pictures.extend(weakref.ref(picture) for request in requests for picture in request.pictures)
        return requests

    monkeypatch.setattr(engine.reader, "read_all", reading)

    def fail(feeds: Any) -> None:
        raise EngineError("broken")

    decoder.before = fail
    with pytest.raises(EngineError) as one:
        engine.generate(picture(0), Q, FIVE)
    with pytest.raises(EngineError) as other:
        list(engine.stream(picture(0), Q, FIVE))
    assert decoder.living() == 0
    assert [ref() for ref in pictures] == [None, None]
    assert one.traceback[-1].name == other.traceback[-1].name == "fail"  # where it was raised is still told
