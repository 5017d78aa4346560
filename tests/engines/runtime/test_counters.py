"""What an engine counts and logs, by itself and in an engine."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest
from tiny_engine import write_engine
from watched_engine import PATIENCE_S, Watched, picture, question, watched

from engines import load_engine
from engines.runtime.counters import OUTCOMES, Counters, outcome_of
from engines.runtime.engine import LlavaEngine, Sampling
from flowcut.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    InputError,
    QueueFull,
    RequestCancelled,
    RequestTimeout,
)

Q = question("What color is the circle?")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("counters") / "engine").directory


@pytest.fixture
def made(directory: Path) -> tuple[LlavaEngine, Watched]:
    return watched(directory, endless=True)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "answered"),
        (InputError("x"), "refused"),
        (ConfigError("x"), "refused"),
        (RequestTimeout("x"), "timed_out"),
        (RequestCancelled("x"), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (QueueFull("x"), "queue_full"),
        (EngineError("x"), "failed"),
        (CheckpointError("x"), "failed"),
        (ZeroDivisionError("x"), "failed"),
        (KeyboardInterrupt(), "failed"),
    ],
)
def test_every_end_has_a_name(error: BaseException | None, outcome: str) -> None:
    assert outcome_of(error) == outcome
    counters = Counters()
    counters.ended(error, 2, 7, {})
    expected = dict.fromkeys(OUTCOMES, 0) | {outcome: 1}
    assert counters.snapshot()["requests"] == expected
    assert (counters.snapshot()["prompts"], counters.snapshot()["tokens"]) == (2, 7)


def test_threads_lose_no_count() -> None:
    counters, start = Counters(), threading.Barrier(8)

    def count() -> None:
        start.wait(PATIENCE_S)
        for _ in range(500):
            counters.ended(None, 1, 2, {})
            counters.step()
            counters.batch(3)
            with counters.waiting():
                counters.pictures(2, 1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = counters.snapshot()
    assert found["requests"]["answered"] == found["prompts"] == found["decode_steps"] == found["batches"]["3"] == 4000
    assert found["tokens"] == found["pictures"]["seen"] == 8000
    assert found["waiting"]["now"] == 0
    assert 1 <= found["waiting"]["most"] <= 8


def test_a_snapshot_is_json_and_stays_as_it_was() -> None:
    counters = Counters()
    before = counters.snapshot()
    counters.ended(None, 1, 1, {})
    counters.batch(2)
    assert json.loads(json.dumps(before)) == before
    assert before["requests"]["answered"] == 0
    assert before["batches"] == {}


def test_an_engine_counts_what_it_did(made: tuple[LlavaEngine, Watched]) -> None:
    engine, _ = made
    engine.generate(picture(0), Q, Sampling(5))
    engine.generate([picture(0), picture(1)], [Q, Q], Sampling(3))
    engine.prefill([picture(0), []], [Q, "Hello."])
    found = engine.counters()
    assert found["requests"] == dict.fromkeys(OUTCOMES, 0) | {"answered": 3}
    assert found["prompts"] == 1 + 2 + 2
    assert found["tokens"] == 5 + 2 * 3
    assert found["decode_steps"] == 4 + 2
    assert found["batches"] == {"1": 1, "2": 2}
    assert found["pictures"] == {"seen": 2, "from_cache": 2}
    assert found["waiting"] == {"now": 0, "most": 0}
    assert found["retried"] == 0


def test_an_engine_counts_what_it_did_not(made: tuple[LlavaEngine, Watched]) -> None:
    engine, decoder = made
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(RequestCancelled):
        engine.generate(picture(0), Q, Sampling(5), cancel=cancel)
    with pytest.raises(InputError):
        engine.generate(picture(0), "no place for it", Sampling(5))
    with pytest.raises(ConfigError):
        engine.prefill(picture(0), Q, timeout_s=-1)
    stream = engine.stream(picture(0), Q, Sampling(5))
    next(stream)
    stream.close()  # type: ignore[attr-defined]

    def fail(feeds: object) -> None:
        raise EngineError("broken")

    decoder.before = fail
    with pytest.raises(EngineError, match="broken"):
        engine.generate(picture(0), Q, Sampling(5))
    requests = engine.counters()["requests"]
    assert requests == dict.fromkeys(OUTCOMES, 0) | {"cancelled": 2, "refused": 2, "failed": 1}
    assert engine.counters()["tokens"] == 1  # the stream's


def test_a_request_is_one_line_of_debugging_with_its_stages(
    made: tuple[LlavaEngine, Watched], caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = made
    caplog.set_level(logging.DEBUG, "flowcut.engines")
    engine.generate(picture(0), Q, Sampling(3))
    with pytest.raises(InputError):
        engine.generate(picture(0), "no place", Sampling(3))
    good, bad = [r.getMessage() for r in caplog.records if r.name == "flowcut.engines.requests"]
    assert good.startswith("answered: 1 prompts, 3 tokens; preprocess ")
    assert all(f"{stage} " in good for stage in ("queue", "vision", "prefill", "decode"))
    assert bad == "refused: 0 prompts, 0 tokens; not begun"
    assert "circle" not in caplog.text  # what people ask is not for logs


def test_loading_is_one_line_of_information(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flowcut.engines")
    load_engine(directory, "ort", threads=1, concurrency=3)
    [line] = [r.getMessage() for r in caplog.records if r.name == "flowcut.engines.runtime"]
    assert str(directory) in line
    assert "backend ort" in line
    assert "max_batch=3" in line
    assert "concurrency=3" in line
