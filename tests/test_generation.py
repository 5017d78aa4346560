"""Answers equal transformers' `generate` wherever its settings leave nothing to chance."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WriteCheckpoint
from PIL import Image
from tiny_engine import write_engine

from engines import load_engine
from engines.runtime.chat import Chat
from engines.runtime.engine import LlavaEngine, Sampling
from flowcut.aliases import ASSETS
from flowcut.contract import Limits
from flowcut.preprocess import ImageSettings, pixel_values
from flowcut.prompt import Tokenizer, question_prompt

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = Limits(max_batch=2, max_images=3, max_prompt=330, max_new_tokens=48)
QUESTIONS = [question_prompt("What is on the table?"), question_prompt("Which one is it, and why?", 2)]


@dataclass(frozen=True)
class Pair:
    """The same checkpoint, unpruned, as an engine that never ends an answer by itself and with transformers."""

    engine: LlavaEngine
    model: Any
    tokenizer: Any
    ids: Tokenizer
    settings: ImageSettings

    @torch.inference_mode()
    def theirs(self, pictures: Sequence[Image.Image], prompt: str, tokens: int = 40, **settings: Any) -> list[int]:
        patches = self.engine.manifest.tokens
        ids = torch.from_numpy(self.ids.encode(prompt, [patches] * len(pictures), patches).input_ids)[None]
        pixels = torch.from_numpy(pixel_values(list(pictures), self.settings))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, **settings)
        answer: list[int] = out[0, ids.shape[1] :].tolist()
        return answer


@pytest.fixture(scope="module")
def pair(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp("generation")
    shutil.copytree(checkpoint("tiny", seed=3), place / "seeded")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        source = ASSETS / ("stand-in" if name == "tokenizer.json" else "llava-tiny") / name
        shutil.copy(source, place / "seeded")
    tiny = write_engine(place / "engine", str(place / "seeded"), tokens="all", limits=LIMITS)
    engine, config = load_engine(tiny.directory, "ort", threads=1), tiny.model.config
    engine.manifest = replace(engine.manifest, geometry=replace(config, eos_token_ids=(511,)))
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        place / "seeded", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    return Pair(
        engine,
        model,
        transformers.AutoTokenizer.from_pretrained(place / "seeded"),
        Tokenizer.from_file(tiny.model.tokenizer, config.image_token_id, config.text.vocab_size),
        ImageSettings.from_directory(tiny.model.files, config.vision.image_size),
    )


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((70, 60), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.3, 0.9, 3.0])
def test_a_repetition_penalty_equals_transformers(pair: Pair, penalty: float) -> None:
    sampling = Sampling(40, repetition_penalty=penalty)
    answers = []
    for prompt, pictures in zip(QUESTIONS, ([picture(0)], [picture(1), picture(2)]), strict=True):
        answer = pair.engine.generate(pictures, prompt, sampling)
        assert answer.token_ids == [pair.theirs(pictures, prompt, repetition_penalty=penalty)]
        answers += answer.token_ids
    if penalty > 1.2:
        assert answers[0] != pair.engine.generate(picture(0), QUESTIONS[0], Sampling(40)).token_ids[0]
    batch = pair.engine.generate([[picture(0)], [picture(1), picture(2)]], QUESTIONS, sampling)
    assert batch.token_ids == answers


def test_a_likeliest_of_one_is_greedy(pair: Pair) -> None:
    greedy = pair.theirs([picture(0)], QUESTIONS[0])
    for temperature in (1e-6, 1.0, 50.0):
        drawn = pair.engine.generate(picture(0), QUESTIONS[0], Sampling(40, temperature=temperature, top_k=1))
        assert drawn.token_ids == [greedy]


@pytest.mark.parametrize("penalty", [1.05, 1.3])
def test_stop_strings_equal_transformers(pair: Pair, penalty: float) -> None:
    """Pieces of an answer's text, whole tokens or not, as stop strings. Those that bytes make no characters of are left
    out: there decoding shows something else than was said."""
    free = pair.engine.generate(picture(0), QUESTIONS[0], Sampling(40, repetition_penalty=penalty))
    (text,), shorter = free.texts, list[int]()
    pieces = (text[start : start + 1 + start % 5] for start in range(1, len(text)))
    readable = list(dict.fromkeys(piece for piece in pieces if "\ufffd" not in piece))
    for stop in readable[:: max(1, len(readable) // 12)]:
        settings = {"repetition_penalty": penalty, "stop_strings": [stop, "never said"], "tokenizer": pair.tokenizer}
        expected = pair.theirs([picture(0)], QUESTIONS[0], **settings)
        sampling = Sampling(40, repetition_penalty=penalty, stop=(stop, "never said"))
        ours = pair.engine.generate(picture(0), QUESTIONS[0], sampling)
        assert ours.token_ids == [expected], repr(stop)
        assert ours.finish == ["stop"]
        assert ours.texts == [text[: text.index(stop)]]
        shorter.append(len(expected))
    assert len(shorter) >= 8
    assert len(set(shorter)) >= 5


def test_a_stop_string_that_never_comes_changes_nothing(pair: Pair) -> None:
    free = pair.engine.generate(picture(0), QUESTIONS[0], Sampling(40))
    stopped = pair.engine.generate(picture(0), QUESTIONS[0], Sampling(40, stop="never said"))  # type: ignore[arg-type]
    assert (stopped.token_ids, stopped.texts, stopped.finish) == (free.token_ids, free.texts, free.finish)


def test_a_chat_equals_transformers(pair: Pair) -> None:
    """Several pictures, some of an earlier turn, and the model's own words in between."""
    chat, sampling = Chat(pair.engine, Sampling(8)), {"tokens": 8}
    first = chat.ask("What is this?", picture(0))
    second = chat.ask("And these?", [picture(1), picture(2)])
    pictures = [picture(0), picture(1), picture(2)]
    prompt = f"USER: <image>\nWhat is this? ASSISTANT: {first.texts[0]} USER: <image>\n<image>\nAnd these? ASSISTANT:"
    assert second.token_ids == [pair.theirs(pictures, prompt, **sampling)]
