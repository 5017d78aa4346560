"""`flowcut run`: how the answer is chosen, streamed, and several questions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import write_engine

from engines import load_engine
from engines.runtime.chat import Chat
from engines.runtime.engine import Sampling
from flowcut.cli import SCENE, main
from flowcut.contract import Limits
from flowcut.prompt import question_prompt

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    limits = Limits(1, 1, 120, 16)
    return write_engine(tmp_path_factory.mktemp("run") / "engine", limits=limits, random=True).directory


@pytest.fixture
def run(directory: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """run(*options) -> exit code, lines of stdout, stderr."""

    def call(*options: Any) -> tuple[int, list[str], str]:
        words = ["run", str(directory), "--repeats", "1", "--threads", "1", "--answer-tokens", "9", *map(str, options)]
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out.splitlines(), err

    return call


@pytest.fixture(scope="module")
def engine(directory: Path) -> Any:
    return load_engine(directory, "ort", threads=1)


PROMPT = question_prompt("What color is the circle?")


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ((), {}),
        (("--repetition-penalty", 1.4), {"repetition_penalty": 1.4}),
        (
            ("--temperature", 0.9, "--top-k", 30, "--top-p", 0.9, "--seed", 4),
            {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 4},
        ),
    ],
)
def test_the_answer_is_chosen_as_told(run: Run, engine: Any, options: Any, sampling: Any) -> None:
    code, lines, _ = run(*options)
    told = json.loads(lines[-1])
    expected = engine.generate(SCENE, PROMPT, Sampling(9, **sampling))
    assert code == 0
    assert told["token_ids"] == expected.token_ids[0]
    assert (told["finish"], told["ended"]) == ("length", False)


def test_any_of_several_strings_stops(run: Run, engine: Any) -> None:
    text = engine.generate(SCENE, PROMPT, Sampling(9)).texts[0]
    piece = re.search("[a-z]{2}", text[2:])
    assert piece is not None
    _, lines, _ = run("--stop", "never said", "--stop", piece[0])
    told = json.loads(lines[-1])
    assert (told["answer"], told["finish"], told["ended"]) == (text[: text.index(piece[0])], "stop", True)


def test_a_streamed_answer_comes_before_all_else(run: Run) -> None:
    _, plain, _ = run()
    _, streamed, _ = run("--stream")
    answer = json.loads(streamed[-1])["answer"]
    assert answer == json.loads(plain[-1])["answer"]
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in answer)
    assert "\n".join(streamed).startswith(shown + "\n\nprompt")


def test_several_questions_are_turns_of_one_chat(run: Run, engine: Any) -> None:
    questions = ["What is this?", "Why?", "Who?"]
    _, lines, _ = run(*(word for text in questions for word in ("--question", text)))
    told, chat = json.loads(lines[-1]), Chat(engine, Sampling(9))
    answers = [chat.ask(text, [] if chat.messages else [SCENE]).texts[0] for text in questions]
    assert [*told["earlier"], told["answer"]] == answers
    _, streamed, _ = run(*(word for text in questions for word in ("--question", text)), "--stream")
    shown = ["".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text) for text in answers]
    assert "\n".join(streamed).startswith("\n".join(shown))
    (prompt,) = (line for line in lines if line.startswith("prompt"))
    assert prompt.count("USER:") == 3
    assert "USER: Why? ASSISTANT:" in prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", -1), "temperature must be a number at least 0"),
        (("--top-p", 2), "top_p must be a number above 0 and at most 1"),
        (("--top-k", 0), "top_k must be at least 1"),
        (("--repetition-penalty", 0), "repetition_penalty must be a number from"),
        (("--seed", -1), "seed must be at least 0"),
        (("--stop", ""), "stop must be strings of at least one character"),
        (("--question", "word " * 70, "--question", "word " * 70), r"prompt 0 must have 1\.\.120 tokens"),
    ],
)
def test_what_cannot_be_is_one_line(run: Run, options: Any, message: str) -> None:
    code, out, err = run(*options)
    assert (code, out) == (1, [])
    assert re.search(message, err)
    assert err.count("\n") == 1
