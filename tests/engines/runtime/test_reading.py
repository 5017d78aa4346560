"""What becomes of pictures and prompts before the device sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_engine import LIMITS, write_engine

from engines.runtime.control import Control
from engines.runtime.reading import Opened, Reader
from engines.runtime.sampling import Sampling
from flowcut.artifacts import read_manifest
from flowcut.errors import InputError, TooLarge
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.prompt import Tokenizer, question_prompt

ONE = question_prompt("What is this?")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    tiny = write_engine(tmp_path_factory.mktemp("reading") / "engine")
    config = tiny.model.config
    tokenizer = Tokenizer.from_file(tiny.model.tokenizer, config.image_token_id, config.text.vocab_size)
    settings = ImageSettings.from_directory(tiny.model.files, config.vision.image_size)
    return Reader(read_manifest(tiny.directory), tokenizer, settings)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def read(reader: Reader, images: Any, prompts: Any, sampling: Any = Sampling(4)) -> Any:  # noqa: B008
    return reader.read_all(images, prompts, sampling, Control())


def test_a_picture_has_one_key_however_it_comes(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    forms = [path, str(path), path.read_bytes(), picture(), np.asarray(picture()), picture().convert("RGBA")]
    assert len({reader.open(form).key for form in forms}) == 1
    assert reader.open(picture(1)).key != reader.open(picture()).key


def test_an_open_picture_stays_what_it_was(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    opened = reader.open(path)
    picture(1).save(path)
    assert reader.open(opened) is opened
    (request,) = read(reader, [opened], [ONE])
    assert request.pictures == (opened,)
    np.testing.assert_array_equal(opened.pixels, pixel_values([open_image(picture())], reader.settings))


def test_preparing_lets_go_of_the_picture(reader: Reader) -> None:
    opened = reader.open(picture())
    opened.prepare()
    pixels = opened.pixels
    opened.prepare()
    assert opened.pixels is pixels
    assert opened._image.size == (1, 1)
    assert opened.size == (40, 30)


def test_every_prompt_has_its_pictures_and_its_sampling(reader: Reader) -> None:
    samplings = [Sampling(1), Sampling(2, stop=("a",))]
    requests = read(reader, [picture(), [picture(1), picture(2)]], [ONE, question_prompt("Which?", 2)], samplings)
    assert [len(request.pictures) for request in requests] == [1, 2]
    assert [request.sampling for request in requests] == samplings
    assert [len(request.encoded.spans) for request in requests] == [1, 2]
    assert all(isinstance(each, Opened) for request in requests for each in request.pictures)
    assert [request.sampling for request in read(reader, [[], []], ["a", "b"], Sampling(3))] == [Sampling(3)] * 2


def test_a_sampling_for_each_prompt_or_one_for_all(reader: Reader) -> None:
    with pytest.raises(InputError, match="sampling must be one, or one for each of 2 prompts, got 3"):
        read(reader, [[], []], ["a", "b"], [Sampling(1)] * 3)
    with pytest.raises(InputError, match=r"max_new_tokens must be in 1\.\.32 .*got 33"):
        read(reader, [[], []], ["a", "b"], [Sampling(1), Sampling(33)])


def test_what_the_engine_is_too_small_for_is_told_from_other_errors(reader: Reader) -> None:
    many = LIMITS.max_images + 1
    for images, prompts in ([[picture()] * many], [question_prompt("?", many)]), ([[]], ["word " * 70]):
        with pytest.raises(TooLarge):
            read(reader, images, prompts)
    with pytest.raises(InputError) as caught:
        read(reader, [picture()], ["no place"])
    assert not isinstance(caught.value, TooLarge)
