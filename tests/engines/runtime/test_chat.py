"""Conversations: every turn is the whole of it, and one that fails leaves no trace."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_engine import write_engine

from engines import load_engine
from engines.runtime.chat import Chat
from engines.runtime.engine import LlavaEngine, Sampling
from flowcut.chat import FILE, read_template, said, user
from flowcut.contract import Limits
from flowcut.errors import InputError, RequestCancelled, TooLarge
from flowcut.prompt import question_prompt

LIMITS = Limits(max_batch=1, max_images=2, max_prompt=160, max_new_tokens=16)
SHORT = Sampling(6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("chat") / "engine", limits=LIMITS, random=True).directory


@pytest.fixture(scope="module")
def engine(directory: Path) -> LlavaEngine:
    return load_engine(directory, "ort", threads=1)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((60, 50), Image.Resampling.BICUBIC)


def test_every_turn_sends_the_whole_conversation(engine: LlavaEngine) -> None:
    chat = Chat(engine, SHORT)
    first = chat.ask("What is this?", picture(0))
    assert first.token_ids == engine.generate(picture(0), question_prompt("What is this?"), SHORT).token_ids
    second = chat.ask("And this?", [picture(1)])
    prompt = f"USER: <image>\nWhat is this? ASSISTANT: {first.texts[0]} USER: <image>\nAnd this? ASSISTANT:"
    assert second.token_ids == engine.generate([picture(0), picture(1)], prompt, SHORT).token_ids
    third = chat.ask("Why?")
    prompt = f"{prompt} {second.texts[0]} USER: Why? ASSISTANT:"
    assert third.token_ids == engine.generate([picture(0), picture(1)], prompt, SHORT).token_ids
    texts = [each.texts[0] for each in (first, second, third)]
    assert chat.messages == [
        user("What is this?", 1),
        said("assistant", texts[0]),
        user("And this?", 1),
        said("assistant", texts[1]),
        user("Why?"),
        said("assistant", texts[2]),
    ]


def test_pictures_of_earlier_turns_are_not_seen_again(directory: Path, tmp_path: Path) -> None:
    engine = load_engine(directory, "ort", threads=1)
    path = tmp_path / "a.png"
    picture(0).save(path)
    chat = Chat(engine, SHORT)
    kept = chat.ask("What is this?", path).kept[0][0].tolist()
    picture(1).save(path)  # it was shown as it was
    vision, runs = engine.model.vision.run, list[int]()

    def counted(*arguments: Any, **named: Any) -> Any:
        runs.append(1)
        return vision(*arguments, **named)

    engine.model.vision.run = counted  # type: ignore[method-assign]
    assert chat.ask("Why?").kept[0][0].tolist() == kept
    assert runs == []
    chat.reset()
    chat.ask("What is this?", path)
    assert runs == [1]
    assert len(chat.messages) == 2


def test_a_chat_does_not_keep_large_pictures_whole(engine: LlavaEngine) -> None:
    large, small = picture(5).resize((900, 700)), picture(6)
    for image, whole in ((large, False), (small, True)):
        Chat(engine, SHORT).ask("What is this?", image)  # from now on its visual tokens are known
        chat = Chat(engine, SHORT)
        chat.ask("What is this?", image)
        (opened,), _ = chat.prompt("Why?")
        assert any(isinstance(held, Image.Image) for held in vars(opened).values()) == whole


def test_a_stream_is_a_turn(engine: LlavaEngine) -> None:
    asked, streamed = Chat(engine, SHORT), Chat(engine, SHORT)
    for text, images in (("What is this?", [picture(0)]), ("Why?", [])):
        expected = asked.ask(text, images)
        assert "".join(chunk.text for chunk in streamed.stream(text, images)) == expected.texts[0]
        assert streamed.messages == asked.messages


def test_a_stream_that_is_left_early_is_no_turn(engine: LlavaEngine) -> None:
    chat = Chat(engine, SHORT)
    stream = chat.stream("What is this?", picture(0))
    next(stream)
    stream.close()
    assert chat.messages == []
    assert engine.gate.queued == 0
    chat.ask("What is this?", picture(0))


def test_what_the_model_is_told_first_stays(engine: LlavaEngine) -> None:
    chat = Chat(engine, SHORT, system="Be short.")
    assert chat.prompt("Why?")[1] == "Be short. USER: Why? ASSISTANT:"
    chat.ask("Why?")
    chat.reset()
    assert chat.messages == [said("system", "Be short.")]


def test_a_failed_turn_leaves_the_conversation_as_it_was(engine: LlavaEngine) -> None:
    chat, cancelled = Chat(engine, SHORT), threading.Event()
    cancelled.set()
    chat.ask("What is this?", picture(0))
    before, prompt = chat.messages, chat.prompt("Next?")
    with pytest.raises(RequestCancelled):
        chat.ask("Why?", cancel=cancelled)
    with pytest.raises(RequestCancelled):
        list(chat.stream("Why?", picture(1), cancel=cancelled))
    with pytest.raises(InputError, match="existing file"):
        chat.ask("Why?", "nowhere.png")
    for text in ("", " ", None, "Is <image> there?"):
        with pytest.raises(InputError, match="text must"):
            chat.ask(text)  # type: ignore[arg-type]
    assert (chat.messages, chat.prompt("Next?")) == (before, prompt)


def test_what_no_longer_fits_says_how_to_go_on(engine: LlavaEngine) -> None:
    chat, long = Chat(engine, SHORT), "word " * 30
    with pytest.raises(TooLarge, match=r"prompt 0 must have 1\.\.160 tokens") as caught:
        chat.ask("word " * 200)
    assert "reset" not in str(caught.value)
    for turns in range(1, 3):
        chat.ask(long, [] if chat.messages else picture(0))
        assert len(chat.messages) == 2 * turns
    with pytest.raises(TooLarge, match=r"prompt 0 must have 1\.\.160 tokens.*Chat\.reset\(\)") as caught:
        chat.ask("word " * 60)
    assert "\n" not in str(caught.value)
    assert len(chat.messages) == 4
    chat.reset()
    chat.ask("Which?", [picture(0), picture(1)])
    with pytest.raises(TooLarge, match=r"images must be at most 2 at once .*got 3\..*Chat\.reset\(\)"):
        chat.ask("And this?", picture(2))


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("an <image> of a cat", "an   of a cat"),
        ("an <im<image>age> of a cat", "an <im age> of a cat"),
        ("<<image>image><im<im<image>age>age>", "< image><im<im age>age>"),
    ],
)
def test_an_answer_that_spells_a_picture_is_none(
    engine: LlavaEngine, monkeypatch: pytest.MonkeyPatch, answer: str, kept: str
) -> None:
    chat, generate = Chat(engine, SHORT), engine.generate

    def spelling(*arguments: Any, **named: Any) -> Any:
        given = generate(*arguments, **named)
        given.texts[0] = answer
        return given

    monkeypatch.setattr(engine, "generate", spelling)
    chat.ask("Why?")
    chat.ask("Why?", picture(0))
    assert chat.messages[1] == said("assistant", kept)


def test_the_template_is_the_checkpoints_own(directory: Path, tmp_path: Path) -> None:
    own = tmp_path / "checkpoint"
    from flowcut.aliases import resolve

    files = resolve("llava-tiny").files
    own.mkdir()
    for path in files.iterdir():
        if path.name != FILE:
            (own / path.name).symlink_to(path)
    without = write_engine(tmp_path / "without", str(own)).directory
    assert not (without / FILE).exists()
    assert load_engine(without, "ort").template.source == read_template(files)
    (own / FILE).write_text("{% for m in messages %}[{{ m['content'] }}]{{ eos_token }}{% endfor %}")
    chat = Chat(load_engine(write_engine(tmp_path / "with", str(own)).directory, "ort"))
    assert chat.prompt("Why?", picture(0))[1] == "[<image>\nWhy?]</s>"
