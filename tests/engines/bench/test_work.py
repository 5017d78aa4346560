"""Prompts of a length asked for, and pictures of which no two are alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.bench.work import make_prompt, make_works, text_tokens
from flowcut.aliases import resolve
from flowcut.chat import ChatTemplate, make_template, read_template
from flowcut.errors import ConfigError, InputError
from flowcut.preprocess import open_image
from flowcut.prompt import Tokenizer

QUESTION = "What color is the circle?"


@pytest.fixture(scope="module", params=["llava-tiny", "llava-1.5-7b"])
def text(request: pytest.FixtureRequest) -> tuple[Tokenizer, ChatTemplate]:
    model = resolve(request.param, random=True)
    tokenizer = Tokenizer.from_file(model.tokenizer, model.config.image_token_id, model.config.text.vocab_size)
    return tokenizer, make_template(read_template(model.files), tokenizer, model.config)


def test_a_prompt_of_no_given_length_is_the_question_alone(text: tuple[Tokenizer, ChatTemplate]) -> None:
    prompt = make_prompt(*text, QUESTION, None)
    assert QUESTION in prompt
    assert prompt.count("<image>") == 1


@pytest.mark.parametrize("more", [0, 1, 2, 3, 7, 40, 123])
def test_a_prompt_has_exactly_the_tokens_asked_for(text: tuple[Tokenizer, ChatTemplate], more: int) -> None:
    tokenizer, template = text
    wanted = text_tokens(tokenizer, make_prompt(tokenizer, template, QUESTION, None)) + more
    prompt = make_prompt(tokenizer, template, QUESTION, wanted)
    assert len(tokenizer.encode(prompt, [5], 5).input_ids) == wanted + 5
    assert QUESTION in prompt


def test_fewer_tokens_than_the_question_has_are_refused(text: tuple[Tokenizer, ChatTemplate]) -> None:
    with pytest.raises(ConfigError, match=r"prompt_tokens must be at least \d+ .*, got 3\. Ask a shorter"):
        make_prompt(*text, QUESTION, 3)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    return paths


def test_no_two_pictures_of_a_batch_are_alike(pictures: list[Path]) -> None:
    with make_works(pictures, "<image>", [7]) as works:
        (work,) = works
        pixels = [np.asarray(open_image(path)).tobytes() for path in work.pictures]
        assert len(set(pixels)) == 7
        assert work.pictures[:2] == tuple(pictures)
        assert {path.suffix for path in work.pictures} == {".png", ".jpg"}
        assert all(open_image(path).size == (80, 60) for path in work.pictures)
        copies = work.pictures[2:]
    assert not any(path.exists() for path in copies)


def test_a_picture_given_twice_is_not_encoded_once(pictures: list[Path]) -> None:
    with make_works([pictures[0], pictures[0], pictures[1]], "<image>", [3]) as works:
        assert len({open_image(path).tobytes() for path in works[0].pictures}) == 3
        assert (works[0].pictures[0], works[0].pictures[2]) == (pictures[0], pictures[1])


def test_each_batch_size_has_its_prompts(pictures: list[Path]) -> None:
    with make_works(pictures, "<image> hm", [1, 4]) as works:
        assert [work.batch for work in works] == [1, 4]
        assert [len(work.pictures) for work in works] == [1, 4]
        assert works[1].prompts == ("<image> hm",) * 4


def test_a_picture_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.png"), make_works([tmp_path / "missing.png"], "<image>", [2]):
        pass
