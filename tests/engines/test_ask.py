"""What a question must be, and how its answer is timed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from engines import ask as module
from engines.ask import ANSWER_TOKENS, STAGES, Question, ask
from engines.options import Options
from engines.runtime.engine import Generation, LlavaEngine
from engines.runtime.sampling import Sampling
from flowcut.chat import ChatTemplate, default_template
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.errors import ConfigError, InputError
from flowcut.prompt import question_prompt

CONFIG = LlavaConfig(VisionConfig(), TextConfig(vocab_size=32064))


class Engine:
    """Answers in 10, 20, 30, .. ms per stage, the first time with another text."""

    def __init__(self, limit: int = 64, absent: tuple[str, ...] = ()) -> None:
        self.absent = absent
        self.manifest = SimpleNamespace(limits=SimpleNamespace(max_new_tokens=limit), geometry=CONFIG)
        self.template, self.options = default_template(anyres=False), Options()
        self.calls: list[tuple[list[Path], str, Sampling]] = []

    def generate(self, images: Any, prompt: str, sampling: Sampling) -> Generation:
        self.calls.append((images, prompt, sampling))
        n = len(self.calls)
        latency = {stage: 10.0 * n for stage in (*STAGES, "total") if stage not in self.absent}
        return Generation(
            [f"answer {n}"], [[1] * sampling.max_new_tokens], ["length"], [[np.arange(3)]], [40 + n], [40], latency
        )


def asked(engine: Engine, question: Question) -> module.Answer:
    return ask(cast(LlavaEngine, engine), question)


def test_the_first_answer_is_shown_and_not_timed() -> None:
    engine = Engine()
    answer = asked(engine, Question((Path("a.png"),), "p", 7, repeats=4))
    assert engine.calls == [([Path("a.png")], "p", Sampling(7))] * 5
    assert answer.generation.texts == ["answer 1"]
    assert answer.prompt_tokens == 41
    assert answer.latency_ms.keys() == set(STAGES)
    assert all(values == {"median": 35.0, "p90": 47.0, "n": 4} for values in answer.latency_ms.values())


class Streaming(Engine):
    """Answers in two pieces, and tells when its stream has ended."""

    ended = False

    def stream(self, images: Any, prompt: str, sampling: Sampling) -> Any:
        try:
            yield SimpleNamespace(text="an")
            yield SimpleNamespace(text="swer")
        finally:
            self.ended = True
        return self.generate(images, prompt, sampling)


def test_the_first_answer_is_shown_as_it_comes() -> None:
    engine, shown = Streaming(), list[str]()
    assert ask(cast(LlavaEngine, engine), Question((), "p"), shown.append).generation.texts == ["answer 1"]
    assert shown == ["an", "swer"]


@pytest.mark.parametrize("kind", [BrokenPipeError, KeyboardInterrupt, StopIteration])
def test_a_stream_that_cannot_be_shown_is_closed(kind: type[BaseException]) -> None:
    engine = Streaming()

    def show(text: str) -> None:
        raise kind

    with pytest.raises(kind) as caught:
        ask(cast(LlavaEngine, engine), Question((), "p"), show)
    assert engine.ended
    assert caught.traceback[-1].name == "show"


def test_a_stage_that_no_run_had_has_no_latency() -> None:
    latency = asked(Engine(absent=("decode_per_token",)), Question((), "p", repeats=2)).latency_ms
    assert latency["decode_per_token"] == {"median": None, "p90": None, "n": 0}
    assert latency["prefill"] == {"median": 25.0, "p90": 29.0, "n": 2}


def test_a_slow_engine_is_timed_at_least_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    answer = asked(Engine(), Question((), "p", repeats=100))
    assert {values["n"] for values in answer.latency_ms.values()} == {1}


def test_answers_are_no_longer_than_the_engine_allows() -> None:
    assert Question((), "p").new_tokens(128) == ANSWER_TOKENS
    assert Question((), "p").new_tokens(8) == 8
    assert Question((), "p", 128).new_tokens(128) == 128
    with pytest.raises(InputError, match=r"answer_tokens must be at most 8 \(the engine's max_new_tokens\), got 9"):
        Question((), "p", 9).new_tokens(8)


def test_a_question_is_put_into_the_template_of_the_model() -> None:
    images, other = (Path("a.png"), Path("b.png")), ChatTemplate("Q: {{ messages[0]['content'] }} A:")
    assert Question(images, "Why?", template=True).prompt(default_template(False)) == question_prompt("Why?", 2)
    assert Question(images, "Why?", template=True).prompt(other) == "Q: <image>\n<image>\nWhy? A:"
    assert Question(images, "<image><image>").prompt(other) == "<image><image>"


@pytest.mark.parametrize(("field", "value"), [("repeats", 0), ("answer_tokens", 0), ("answer_tokens", -1)])
def test_counts_must_be_positive(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be at least 1, got {value}"):
        Question((), "p", **{field: value})


def test_pictures_and_places_are_counted_beforehand(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(path)
    Question((path, path), question_prompt("Why?", 2)).check()
    with pytest.raises(InputError, match=r"one <image> for each image \(2\), got 1"):
        Question((path, path), question_prompt("Why?", 1)).check()
    Question((path, path), "Why?", template=True).check()
    with pytest.raises(InputError, match=r"one <image> for each image \(1\), got 2"):
        Question((path,), "<image> Why?", template=True).check()
    with pytest.raises(InputError, match="must be an existing file"):
        Question((tmp_path / "b.png",), question_prompt("Why?")).check()
