"""What becomes of pictures and prompts before the device sees them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from flowcut.config import LlavaConfig
from flowcut.errors import ConfigError, FlowCutError, InputError, TooLarge
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
    assert not any(isinstance(held, Image.Image) for held in vars(opened).values())
    assert opened.size == (40, 30)


class Held(Opened):
    """Of which a second thread is held up behind the n-th look that it takes at an attribute."""

    looks, second = 0, threading.Thread()
    reached, go = threading.Event(), threading.Event()

    @staticmethod
    def hold(looks: int) -> None:
        """The thread that calls this, from now on."""
        Held.reached, Held.go = threading.Event(), threading.Event()
        Held.looks, Held.second = looks, threading.current_thread()

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if threading.current_thread() is Held.second:
            Held.looks -= 1
            if Held.looks == 0:
                Held.reached.set()
                assert Held.go.wait(60)
        return value


@pytest.mark.parametrize("anyres", [False, True])
def test_two_threads_that_prepare_one_picture_get_its_pixels(reader: Reader, anyres: bool) -> None:
    config: LlavaConfig = reader.geometry.config
    if anyres:
        side = config.vision.image_size
        config = replace(config, grid_pinpoints=((side, 2 * side), (2 * side, side)))
    expected, looks, late = Opened(picture(), config, reader.settings).pixels, 0, False
    while not late:
        looks += 1
        opened = Held(picture(), config, reader.settings)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(opened.hold, looks).result()
            second = pool.submit(lambda opened=opened: opened.pixels)
            second.add_done_callback(lambda _: Held.reached.set())
            assert Held.reached.wait(60)
            late = second.done()
            np.testing.assert_array_equal(opened.pixels, expected)
            Held.go.set()
            np.testing.assert_array_equal(second.result(60), expected)
    assert looks > 2


@pytest.mark.parametrize(("factor", "large"), [(0, True), (-1, False)])
def test_a_picture_is_large_where_its_pixels_take_less(reader: Reader, factor: int, large: bool) -> None:
    """Pillow takes 4 bytes for a pixel in RGB, the tower 4 for each of its three colours."""
    side = reader.settings.image_size
    image = Image.new("RGB", (side, 3 * side + 1 + factor))
    opened = reader.open(image)
    assert opened.large == large == (4 * image.width * image.height > opened.pixels.nbytes)


def test_a_picture_that_another_engine_opened_is_refused(reader: Reader) -> None:
    config, settings = reader.geometry.config, reader.settings
    for other in (
        Opened(picture(), config, replace(settings, mean=(0.5, 0.5, 0.5))),
        Opened(picture(), replace(config, text=replace(config.text, rope_theta=1.0)), settings),
    ):
        with pytest.raises(InputError, match="image must be opened by an engine of this geometry"):
            read(reader, [other], [ONE])
    same = Opened(picture(), replace(config), replace(settings))
    assert reader.open(same) is same


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


WRONG: list[tuple[Any, Any, type[FlowCutError], str]] = [
    (None, Sampling(1), InputError, "prompts must be a text or a list of texts, got NoneType"),
    (5, Sampling(1), InputError, "prompts must be a text or a list of texts, got int"),
    ({"a": 1}, Sampling(1), InputError, "prompts must be a text or a list of texts, got dict"),
    ([None, "b"], Sampling(1), InputError, "prompt must be text, got NoneType"),
    (["a", "b"], None, ConfigError, "sampling must be a Sampling, or a list of one for each prompt, got None"),
    (["a", "b"], {"temperature": 1}, ConfigError, r"sampling must be a Sampling, .* got {'temperature': 1}"),
    (["a", "b"], [Sampling(1), {}], ConfigError, "sampling must be a Sampling, or a list of one"),
    ("a", 7, ConfigError, "sampling must be a Sampling, .* got 7"),
]


@pytest.mark.parametrize(("prompts", "sampling", "kind", "message"), WRONG)
def test_what_is_no_prompt_or_no_sampling_is_refused_in_one_line(
    reader: Reader, prompts: Any, sampling: Any, kind: type[FlowCutError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        read(reader, [[], []] if isinstance(prompts, list) else [], prompts, sampling)
    assert "\n" not in str(caught.value)


def test_what_the_engine_is_too_small_for_is_told_from_other_errors(reader: Reader) -> None:
    many = LIMITS.max_images + 1
    for images, prompts in ([[picture()] * many], [question_prompt("?", many)]), ([[]], ["word " * 70]):
        with pytest.raises(TooLarge):
            read(reader, images, prompts)
    with pytest.raises(InputError) as caught:
        read(reader, [picture()], ["no place"])
    assert not isinstance(caught.value, TooLarge)
