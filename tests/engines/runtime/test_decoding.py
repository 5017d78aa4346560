"""Answers of a batch end each in its own way; what is streamed is what is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import write_engine

from engines import load_engine
from engines.runtime.control import Control
from engines.runtime.decoding import Answering, Chunk, Reply
from engines.runtime.engine import LlavaEngine, Sampling
from engines.runtime.generation import generation
from engines.runtime.model import Prefill
from flowcut.aliases import ASSETS
from flowcut.errors import EngineError, RequestCancelled
from flowcut.prompt import Encoded, Tokenizer, question_prompt

VOCAB, END = 1024, 2
TOKENIZER = Tokenizer.from_file(ASSETS / "llava-tiny" / "tokenizer.json", 1022, VOCAB)


class Script:
    """A model that says what it is told: for each prompt its tokens, one a step."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers, self.fed = answers, list[list[int]]()
        self.broken: dict[tuple[int, int], float] = {}

    def prepare(self, requests: Any) -> None:
        pass

    def prefill(self, requests: Any, clock: Any) -> Any:
        count = len(self.answers)
        return Prefill(
            self._logits(0), kept=[[]] * count, latency_ms={}, device_ms={}, state=None, **self._lengths(count)
        )

    def step(self, prefill: Any, tokens: Any, step: int) -> np.ndarray:
        self.fed.append(tokens.tolist())
        return self._logits(step + 1)

    def _lengths(self, count: int) -> dict[str, Any]:
        return {"lengths": np.zeros(count, int), "pruned_lengths": np.zeros(count, int)}

    def _logits(self, step: int) -> np.ndarray:
        logits = np.zeros((len(self.answers), VOCAB), np.float32)
        for row, answer in enumerate(self.answers):
            logits[row, answer[min(step, len(answer) - 1)]] = 9
            if (row, step) in self.broken:
                logits[row, 5] = self.broken[row, step]
        return logits


def answered(
    model: Script, samplings: list[Sampling], control: Callable[[int], Control] = lambda _: Control()
) -> tuple[Answering, list[Chunk]]:
    encoded = Encoded(np.array([1]), np.array([-1]), np.empty((0, 2), np.int64), 1)
    request: Any = lambda i, sampling: type(  # noqa: E731
        "Request", (), {"encoded": encoded, "pictures": (), "sampling": sampling, "control": control(i)}
    )
    replies = [Reply(i, request(i, sampling), TOKENIZER, (END,)) for i, sampling in enumerate(samplings)]
    answering = Answering(model, nullcontext(), replies)  # type: ignore[arg-type]
    return answering, [chunk for chunks in answering for chunk in chunks]


def ids(text: str) -> list[int]:
    return list(TOKENIZER._tokenizer.encode(text, add_special_tokens=False).ids)


def test_members_end_each_in_its_own_way() -> None:
    texts = ["red", "blue or green", "one two three four", "no"]
    model = Script(*([*ids(text), END] for text in texts))
    limits = [9, 20, 2, 9]
    answering, chunks = answered(model, [Sampling(n, stop=("gre",)) for n in limits])
    answer = generation(answering)
    assert answer.finish == ["end", "stop", "length", "end"]
    assert answer.ended == [True, True, False, True]
    assert answer.texts == ["red", "blue or ", "one two", "no"]
    assert [len(tokens) for tokens in answer.token_ids] == [len(ids("red")), len(ids("blue or green")), 2, 1]
    for i, text in enumerate(answer.texts):
        mine = [chunk for chunk in chunks if chunk.index == i]
        assert "".join(chunk.text for chunk in mine) == text
        assert [chunk.finish for chunk in mine] == [None] * (len(mine) - 1) + [answer.finish[i]]
        assert [chunk.token_id for chunk in mine if chunk.token_id is not None] == answer.token_ids[i]
    assert all(len(fed) == 4 for fed in model.fed)  # the whole batch, to its last member's end
    assert len(model.fed) == max(map(len, answer.token_ids)) - (answer.finish[1] == "stop")


def test_the_token_that_ends_an_answer_has_a_chunk_without_it() -> None:
    _, chunks = answered(Script([END]), [Sampling(4)])
    assert chunks == [Chunk(0, "", None, "end")]


def test_a_stop_string_of_half_a_token_ends_the_answer_with_that_token() -> None:
    answering, chunks = answered(Script([*ids("blue green"), END]), [Sampling(9, stop=("gr",))])
    assert generation(answering).texts == ["blue "]
    assert answering.replies[0].token_ids == ids("blue green")[: len(chunks)]


def test_a_stop_string_of_bytes_needs_no_further_token() -> None:
    tokens = [*ids("red 日"), *ids("blue")]
    answering, _ = answered(Script(tokens), [Sampling(30, stop=("日",))])
    assert answering.replies[0].finish == "stop"
    assert answering.replies[0].token_ids == ids("red 日")
    assert answering.replies[0].text == "red "


def test_what_was_held_back_comes_with_the_last_piece() -> None:
    for sampling, finish in ((Sampling(9, stop=("redder",)), "end"), (Sampling(1, stop=("redder",)), "length")):
        _, chunks = answered(Script([*ids("red"), END]), [sampling])
        assert chunks[0].text == ("" if finish == "end" else "red")
        assert (chunks[-1].text, chunks[-1].finish) == ("red", finish)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), st.integers(1, 45))
def test_pieces_put_together_are_the_answer(tokens: list[int], limit: int) -> None:
    answering, chunks = answered(Script([*tokens, END]), [Sampling(limit)])
    answer = generation(answering)
    expected = tokens[: tokens.index(END)] if END in tokens else tokens
    assert answer.token_ids == [expected[:limit]]
    assert answer.texts == ["".join(chunk.text for chunk in chunks)] == [TOKENIZER.decode(expected[:limit])]


def test_an_error_ends_its_own_answer_only() -> None:
    model, cancel = Script(ids("red red red red"), ids("blue " * 4), ids("one " * 4)), threading.Event()
    model.broken[0, 2] = float("nan")
    step = model.step

    def cancelling(*arguments: Any) -> Any:
        cancel.set()
        return step(*arguments)

    model.step = cancelling  # type: ignore[method-assign]
    controls = [Control(), Control(cancel=cancel), Control()]
    answering, chunks = answered(model, [Sampling(4)] * 3, lambda i: controls[i])
    broken, cancelled, good = answering.replies
    assert isinstance(broken.error, EngineError)
    assert "logits must be numbers" in str(broken.error)
    assert isinstance(cancelled.error, RequestCancelled)
    assert (len(broken.token_ids), len(cancelled.token_ids)) == (2, 1)
    assert good.finish == "length"
    assert good.text == TOKENIZER.decode(ids("one " * 4)[:4])
    assert not any(chunk.finish for chunk in chunks if chunk.index != 2)
    with pytest.raises(EngineError, match="logits must be numbers"):
        generation(answering)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LlavaEngine:
    directory: Path = tmp_path_factory.mktemp("decoding") / "engine"
    return load_engine(write_engine(directory, random=True).directory, "ort", threads=1)


def test_draws_are_the_same_alone_and_in_a_batch(engine: LlavaEngine) -> None:
    prompts = [question_prompt(text, 0) for text in ("Who?", "What is on the table?", "Why?")]
    samplings = [Sampling(12, temperature=0.9, top_k=40, top_p=0.95, seed=seed) for seed in (5, 6, 5)]
    together = engine.generate([[]] * 3, prompts, samplings).token_ids
    assert together == [
        engine.generate([], prompt, sampling).token_ids[0] for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    assert together != engine.generate([[]] * 3, prompts, Sampling(12)).token_ids


def test_a_stream_returns_what_generate_does(engine: LlavaEngine) -> None:
    prompts, sampling = [question_prompt(text, 0) for text in ("Who?", "Why?")], Sampling(8, temperature=1.0, seed=3)
    stream, texts = engine.stream([[], []], prompts, sampling), ["", ""]
    while True:
        try:
            chunk = next(stream)
        except StopIteration as end:
            returned = end.value
            break
        texts[chunk.index] += chunk.text
    expected = engine.generate([[], []], prompts, sampling)
    assert returned.token_ids == expected.token_ids
    assert returned.texts == expected.texts == texts
