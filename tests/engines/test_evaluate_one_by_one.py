"""Answers where visual tokens are dropped inside the language model, and LLaVA-NeXT's: against other ways to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from next_checkpoint import write_next
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from engines.evaluate import ask, evaluate, make_pages
from engines.evaluate_one_by_one import OneByOne
from engines.evaluate_report import evaluated
from engines.evaluate_target import NEW_TOKENS, EvalSettings
from engines.evaluate_torch import Eager, TorchAnswerer
from engines.pipeline import BuildSettings, build_directory
from flowcut.aliases import Model, resolve
from flowcut.anyres import choose_tiling
from flowcut.errors import ConfigError
from flowcut.prompt import question_prompt
from flowcut.schedule import make_schedule
from flowcut.tiles import image_tiles

QUIET = Progress(disable=True)
TEXTS = ["What color is the star?", "How many objects are there?", "Which is larger?"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny() -> Eager:
    return Eager.load(resolve("llava-tiny"))


@pytest.fixture(scope="module")
def next_directory(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Path:
    source = checkpoint(vision={"layers": 6}, text={"layers": 4})
    return write_next(source, tmp_path_factory.mktemp("next") / "seeded")


@pytest.fixture(scope="module")
def found(next_directory: Path) -> Model:
    return resolve(str(next_directory))


def picture(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(width).integers(0, 255, (7, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height))


PICTURES = [picture(150, 50), picture(50, 150), picture(120, 120), picture(30, 31)]


@pytest.mark.parametrize(("tokens", "llm_tokens"), [(16, None), (16, 16), (20, 400)])
def test_where_nothing_is_dropped_answers_are_those_of_shared_prompts(
    tiny: Eager, tokens: int, llm_tokens: int | None
) -> None:
    schedule, pages = make_schedule("adaptive", tiny.vision.config.vision, tokens), make_pages("test", questions=15)
    alone, together = (
        [answer.got for answer in ask(one, pages, "", QUIET)]
        for one in (OneByOne(tiny, schedule, llm_tokens), TorchAnswerer(tiny, schedule))
    )
    assert alone == together


def test_answers_end_at_the_end_token(tiny: Eager) -> None:
    schedule, (page,) = make_schedule("adaptive", tiny.vision.config.vision, 16), make_pages("test", questions=1)
    spoken: list[int] = []
    endless = replace(tiny, eos_token_ids=())
    answerer = OneByOne(endless, schedule, 8)
    answerer._generate = lambda reading: spoken.extend(OneByOne._generate(answerer, reading)) or spoken  # type: ignore[method-assign,func-returns-value]
    ask(answerer, [page], "", QUIET)
    assert len(spoken) == NEW_TOKENS
    ended = OneByOne(replace(tiny, eos_token_ids=(spoken[1],)), schedule, 8)
    (got,) = ask(ended, [page], "", QUIET)
    assert got.got == tiny.tokenizer.decode(spoken[:1]).strip()


def test_unpruned_llava_next_answers_as_transformers_does(found: Model, next_directory: Path) -> None:
    from transformers import LlavaNextForConditionalGeneration

    eager, config = Eager.load(found), found.config
    theirs = LlavaNextForConditionalGeneration.from_pretrained(next_directory, dtype=torch.float32)
    got = OneByOne(eager, make_schedule("static", config.vision, 64)).answer(PICTURES, [TEXTS] * 4)
    for image, answers in zip(PICTURES, got, strict=True):
        cut = choose_tiling(config, *image.size)
        pixels = torch.from_numpy(image_tiles(image, eager.settings, cut))
        visual, _ = eager.vision.see(pixels, cut, make_schedule("static", config.vision, 64))
        for text, answer in zip(TEXTS, answers, strict=True):
            prompt = eager.tokenizer.encode(question_prompt(text, anyres=True), [len(visual)], len(visual))
            ids = torch.from_numpy(prompt.input_ids)[None]
            told = theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels[None],
                image_sizes=torch.tensor([[image.height, image.width]]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )[0, ids.shape[1] :].tolist()
            told = [token for token in told if token not in eager.eos_token_ids]
            assert answer == eager.tokenizer.decode(told)


def told(target: Path | str, **more: Any) -> Any:
    return evaluate(EvalSettings(str(target), **{"questions": 6, "threads": 1, **more}), QUIET)


@pytest.mark.parametrize("tokens", [20, "all"])
def test_llava_next_answers_the_same_in_torch_exported_and_built(
    next_directory: Path, tmp_path: Path, tokens: int | str
) -> None:
    given = {"tokens": tokens, "schedule": "static"}
    eager, exported = (told(next_directory, backend=backend, **given) for backend in ("torch", "ort"))
    assert [answer.got for answer in exported.answers] == [answer.got for answer in eager.answers]
    settings = BuildSettings(str(next_directory), precision="fp32", backend="ort", out=tmp_path / "e", tokens=tokens)
    build_directory(settings, QUIET)
    built = told(tmp_path / "e", tokens=tokens)
    assert [answer.got for answer in built.answers] == [answer.got for answer in eager.answers]
    kept = (20, 20, 320) if tokens == 20 else (320, None, 320)
    for result in (eager, exported, built):
        assert (result.subject.tokens, result.subject.llm_tokens, result.subject.patches) == kept


def test_llava_tiny_answers_the_same_where_the_exported_decoder_drops_tokens(tmp_path: Path) -> None:
    given = {"tokens": 48, "llm_tokens": 16, "questions": 12}
    eager, exported = (told("llava-tiny", backend=backend, **given) for backend in ("torch", "ort"))
    assert [answer.got for answer in exported.answers] == [answer.got for answer in eager.answers]
    assert (exported.subject.tokens, exported.subject.llm_tokens) == (48, 16)
    assert eager.to_dict()["llm_tokens"] == 16
    console = Console(record=True, width=100)
    evaluated(console, eager)
    assert console.export_text().startswith("llava-tiny: 48 of 144 patches, 16 inside the language model\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 21}, r"tokens must be even and in 2\.\.126 for LLaVA-NeXT .* got 21\."),
        ({"tokens": 0}, r"tokens must be even and in 2\.\.126 for LLaVA-NeXT .* got 0\."),
        ({"llm_tokens": 8}, r"llm_tokens must not be given for LLaVA-NeXT, got 8\."),
        ({"tokens": "all", "llm_tokens": 8}, r"llm_tokens must not be given for LLaVA-NeXT, got 8\."),
    ],
)
def test_budgets_that_llava_next_cannot_have_are_refused(
    next_directory: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        told(next_directory, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 16, "llm_tokens": 16}, r"llm_tokens must be in 1\.\.15 .* got 16\."),
        ({"tokens": 16, "llm_tokens": 0}, r"llm_tokens must be in 1\.\.15 .* got 0\."),
    ],
)
def test_budgets_that_llava_1_5_cannot_have_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        told("llava-tiny", **given)


def test_a_directory_is_asked_with_its_own_budget_only(next_directory: Path, tmp_path: Path) -> None:
    settings = BuildSettings(str(next_directory), precision="fp32", backend="ort", out=tmp_path / "e", tokens=20)
    build_directory(settings, QUIET)
    for given, message in (
        ({"tokens": 40}, r"tokens must be 20, which .* was built with, got 40\."),
        ({"tokens": "all"}, r"tokens must be 20, which .* was built with, got 320\."),
        ({"llm_tokens": 20}, r"llm_tokens must not be given for LLaVA-NeXT, got 20\."),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            told(tmp_path / "e", **given)
