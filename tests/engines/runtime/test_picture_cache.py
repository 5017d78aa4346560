"""What a cache of pictures keeps, and that vision runs once for each picture that it keeps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import WriteCheckpoint
from hypothesis import given
from hypothesis import strategies as st
from next_checkpoint import write_next
from PIL import Image
from tiny_engine import write_engine

from engines import load_engine
from engines.runtime.engine import LlavaEngine, Sampling
from engines.runtime.picture_cache import PictureCache, Seen
from flowcut.contract import Limits
from flowcut.prompt import question_prompt

LIMITS = Limits(max_batch=3, max_images=4, max_prompt=480, max_new_tokens=8)
ONE, OTHER, TWO = (question_prompt("What is this?"), question_prompt("Why?"), question_prompt("Which?", 2))


def seen(elements: int) -> Seen:
    """Of so many float32 elements."""
    tensor: Any = SimpleNamespace(shape=(1, elements), dtype=np.dtype(np.float32))
    return Seen({"image_embeds": tensor}, np.zeros(1, np.int64))


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef"), st.integers(1, 8)), max_size=40))
def test_the_longest_unused_go_first_and_bytes_are_bounded(uses: list[tuple[bool, str, int]]) -> None:
    cache, expected, limit = PictureCache(40), dict[str, int](), 40
    for puts, key, size in uses:
        if puts:
            cache.put(key, seen(size))
            if key not in expected:
                expected[key] = 4 * size
            while sum(expected.values()) > limit:
                expected.pop(next(iter(expected)))
        elif (cache.get(key) is not None) == (key in expected) and key in expected:
            expected[key] = expected.pop(key)
        assert [name for name in "abcdef" if name in cache] == sorted(expected)
        assert cache.bytes == sum(expected.values()) <= limit
        assert len(cache) == len(expected)


def test_what_is_larger_than_the_cache_drives_nothing_out() -> None:
    cache = PictureCache(16)
    cache.put("a", seen(4))
    cache.put("b", seen(5))
    assert "a" in cache
    assert "b" not in cache


def test_threads_may_use_it_together() -> None:
    cache = PictureCache(400)

    def use(start: int) -> None:
        for i in range(300):
            cache.put(str((start * 7 + i) % 40), seen(1 + i % 9))
            cache.get(str(i % 40))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert cache.bytes == sum(4 * each.rows["image_embeds"].shape[1] for each in cache._pictures.values()) <= 400


class Counted:
    """A session that counts what it is shown."""

    def __init__(self, session: Any) -> None:
        self._session, self.runs = session, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, feeds: Any, *others: Any, **named: Any) -> Any:
        self.runs.append(len(feeds["pixel_values"]))
        return self._session.run(feeds, *others, **named)


@pytest.fixture(scope="module", params=["LLaVA-1.5", "LLaVA-NeXT"])
def directory(request: pytest.FixtureRequest, checkpoint: WriteCheckpoint, tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("engine")
    if request.param == "LLaVA-1.5":
        return write_engine(place / "engine", limits=LIMITS, random=True).directory
    model = write_next(checkpoint("tiny", seed=2), place / "checkpoint")
    return write_engine(place / "engine", str(model), limits=LIMITS, tokens=24).directory


@pytest.fixture
def engine(directory: Path) -> tuple[LlavaEngine, list[int]]:
    return loaded(directory)


def loaded(directory: Path, **options: Any) -> tuple[LlavaEngine, list[int]]:
    """An engine, and the number of pictures or tiles that each run of its vision was shown."""
    made = load_engine(directory, "ort", threads=1, **options)
    counted = Counted(made.model.vision)
    made.model.vision = counted
    return made, counted.runs


def picture(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def test_a_second_question_about_a_picture_does_not_run_vision(
    engine: tuple[LlavaEngine, list[int]], directory: Path
) -> None:
    made, runs = engine
    first = made.generate(picture(0), ONE, Sampling(6))
    assert len(runs) == 1
    again = made.generate(np.asarray(picture(0)), ONE, Sampling(6))
    other = made.generate(picture(0), OTHER, Sampling(6))
    assert len(runs) == 1
    assert again.token_ids == first.token_ids
    assert [kept.tolist() for kept in again.kept[0]] == [kept.tolist() for kept in first.kept[0]]
    fresh, _ = loaded(directory, picture_cache_mb=0)
    assert other.token_ids == fresh.generate(picture(0), OTHER, Sampling(6)).token_ids


def test_equal_pictures_of_a_batch_are_seen_once(engine: tuple[LlavaEngine, list[int]]) -> None:
    made, runs = engine
    alone = made.prefill(picture(1), ONE)
    shown = runs.pop()
    other = made.prefill(picture(2), ONE)
    shown_other = runs.pop()
    made.model.pictures = PictureCache(10**6)
    together = made.prefill([picture(1), [picture(1), picture(2)], picture(2)], [ONE, TWO, ONE])
    assert runs == [shown + shown_other]
    np.testing.assert_allclose(together.logits[0], alone.logits[0], atol=1e-4)
    np.testing.assert_allclose(together.logits[2], other.logits[0], atol=1e-4)


def test_other_pixels_sizes_and_turns_are_other_pictures(engine: tuple[LlavaEngine, list[int]]) -> None:
    made, runs = engine
    base = picture(3, (64, 40))
    dot = base.copy()
    dot.putpixel((0, 0), (1, 2, 3))
    reshaped = Image.frombytes("RGB", (40, 64), base.tobytes())  # the very same bytes
    for i, each in enumerate([base, base.transpose(Image.Transpose.ROTATE_90), dot, base.resize((32, 20)), reshaped]):
        made.prefill(each, ONE)
        assert len(runs) == i + 1


def test_a_full_cache_lets_the_longest_unused_go(engine: tuple[LlavaEngine, list[int]]) -> None:
    made, runs = engine
    made.prefill(picture(0), ONE)
    made.model.pictures = PictureCache(2 * made.model.pictures.bytes)
    for seed, ran in ((1, True), (2, True), (1, False), (3, True), (2, True), (3, False), (1, True)):
        before = len(runs)
        made.prefill(picture(seed), ONE)
        assert (len(runs) > before) == ran, seed
        assert len(made.model.pictures) <= 2


def test_a_cache_of_nothing_is_none(directory: Path) -> None:
    made, runs = loaded(directory, picture_cache_mb=0)
    for _ in range(2):
        made.prefill([picture(0), picture(0)], [ONE, ONE])
    assert len(runs) == 2
    assert len(made.model.pictures) == 0
