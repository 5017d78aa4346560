"""Visual tokens dropped inside the decoder, and LLaVA-NeXT: the runtime on ONNX Runtime against eager torch.

The reference cuts, sees and reads one prompt at a time and physically drops rows: no gaps, no padding, no validity.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
import torch
from conftest import WriteCheckpoint
from next_checkpoint import PINPOINTS, write_next
from PIL import Image
from tiny_engine import TinyEngine, write_engine

from engines import load_engine
from engines.runtime.engine import LlavaEngine, Sampling
from flowcut.anyres import choose_tiling
from flowcut.contract import Limits
from flowcut.errors import InputError
from flowcut.language import LanguageModel
from flowcut.language_pruning import read, step
from flowcut.preprocess import ImageSettings, pixel_values
from flowcut.prompt import Tokenizer
from flowcut.tiles import image_tiles
from flowcut.vision import VisionModel

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = Limits(max_batch=4, max_images=5, max_prompt=480, max_new_tokens=40)
SIZES = {  # width, height; of one pixel's width almost nothing of the grid is no padding
    "wide": (200, 60),
    "tall": (70, 160),
    "square": (130, 130),
    "tiny": (5, 4),
    "1x3000": (1, 3000),
    "3000x1": (3000, 1),
}
ONE, TWO = "<image> What is on the mat?", "the cat <image> and <image> the mat: which?"
TEXT = "the cat on the mat, and the dog"
Made = Callable[..., TinyEngine]


@pytest.fixture(scope="module")
def made(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(pinpoints, ..) -> an engine directory of the seeded LLaVA-NeXT checkpoint; None: of LLaVA-1.5's."""
    written: dict[str, TinyEngine] = {}

    def make(pinpoints: Any = PINPOINTS, **settings: Any) -> TinyEngine:
        key = repr((pinpoints, sorted(settings.items())))
        if key not in written:
            out = tmp_path_factory.mktemp("next")
            source = checkpoint("tiny", seed=2)
            model = source if pinpoints is None else write_next(source, out / "checkpoint", pinpoints)
            written[key] = write_engine(out / "engine", str(model), limits=LIMITS, **settings)
        return written[key]

    return make


def opened(tiny: TinyEngine, backend: str = "ort") -> LlavaEngine:
    return load_engine(tiny.directory, backend, threads=1)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth, so that patches differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


class Eager:
    """The torch modules, one prompt at a time."""

    def __init__(self, tiny: TinyEngine) -> None:
        self.tiny, self.config, weights = tiny, tiny.model.config, tiny.model.weights
        self.vision, self.language = VisionModel.from_weights(weights), LanguageModel.from_weights(weights)
        vocabulary = self.config.text.vocab_size
        self.tokenizer = Tokenizer.from_file(tiny.model.tokenizer, self.config.image_token_id, vocabulary)
        files, side = tiny.model.files, self.config.vision.image_size
        self.settings = ImageSettings.from_directory(files, side, self.config.grid_pinpoints)

    def see(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Visual tokens [n, D] and the patch number of each, -1 for a newline."""
        if not self.config.anyres:
            embeds, kept = self.vision(torch.from_numpy(pixel_values([image], self.settings)), self.tiny.schedule)
            return embeds[0], kept[0]
        tiling = choose_tiling(self.config, *image.size)
        embeds, places = self.vision.see(
            torch.from_numpy(image_tiles(image, self.settings, tiling)), tiling, self.tiny.schedule
        )
        return embeds, torch.where(places % 2 == 0, places // 2, -1)

    @torch.inference_mode()
    def answer(self, images: list[Image.Image], prompt: str, steps: int = 32) -> dict[str, Any]:
        """Greedy tokens, the patches left of each picture, and the prompt's two lengths."""
        parts, spans, numbers, start = [], [], [], 0
        pictures = iter(images)
        for token in self.tokenizer.encode(prompt, [1] * len(images), 1).input_ids.tolist():
            if token == self.config.image_token_id:
                embeds, number = self.see(next(pictures))
                spans.append((start, len(embeds)))
                numbers.append(number)
            else:
                embeds = self.language.model.embed_tokens(torch.tensor([token]))
            parts.append(embeds)
            start += len(embeds)
        limit = self.tiny.budget.llm_tokens or start
        reading = read(self.language, torch.cat(parts)[None], spans, limit, room=steps)
        lengths, hidden, tokens, logits = reading.lengths, reading.hidden, [], []
        for _ in range(steps):
            logits.append(self.language.logits(hidden)[0, -1].numpy())
            tokens.append(int(logits[-1].argmax()))
            hidden = step(self.language, tokens[-1], reading)
        left = [number[kept] for number, kept in zip(numbers, reading.kept, strict=True)]
        kept = [number[number >= 0].tolist() for number in left]
        return {"tokens": tokens, "kept": kept, "lengths": lengths, "logits": logits[0]}


def check(engine: LlavaEngine, eager: Eager, images: list[list[Image.Image]], prompts: list[str]) -> None:
    """Every answer of a batch is that of its prompt alone in eager torch."""
    steps = 32
    prefill, answer = engine.prefill(images, prompts), engine.generate(images, prompts, Sampling(steps))
    ends = engine.manifest.geometry.eos_token_ids
    for b, (own, prompt) in enumerate(zip(images, prompts, strict=True)):
        expected = eager.answer(own, prompt, steps)
        tokens = expected["tokens"]
        until = next((i for i, token in enumerate(tokens) if token in ends), steps)
        assert [k.tolist() for k in answer.kept[b]] == [k.tolist() for k in prefill.kept[b]] == expected["kept"]
        assert (answer.prompt_tokens[b], answer.pruned_prompt_tokens[b]) == expected["lengths"]
        error = np.abs(prefill.logits[b] - expected["logits"]).max() / np.abs(expected["logits"]).max()
        assert error < 1e-5
        assert answer.token_ids[b] == tokens[:until]


@pytest.fixture(scope="module")
def next_engine(made: Made) -> LlavaEngine:
    return opened(made(tokens=24))


@pytest.fixture(scope="module")
def eager(made: Made) -> Eager:
    return Eager(made(tokens=24))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_picture_of_any_size_is_answered_as_eagerly(
    size: tuple[int, int], next_engine: LlavaEngine, eager: Eager
) -> None:
    check(next_engine, eager, [[picture(0, size)]], [ONE])


def test_the_pictures_above_have_every_number_of_tiles_and_fewer_tokens_than_wanted(
    next_engine: LlavaEngine, eager: Eager
) -> None:
    assert {choose_tiling(eager.config, *size).tiles for size in SIZES.values()} == {3, 4, 5}
    answer = next_engine.generate(picture(0, SIZES["1x3000"]), ONE, Sampling(1))
    assert answer.prompt_tokens == answer.pruned_prompt_tokens
    assert len(answer.kept[0][0]) < 24
    answer = next_engine.generate(picture(0, SIZES["square"]), ONE, Sampling(1))
    assert len(answer.kept[0][0]) == 24
    assert answer.prompt_tokens[0] > answer.pruned_prompt_tokens[0]


def test_a_batch_of_different_numbers_of_tiles_and_of_none_is_answered_as_each_alone(
    next_engine: LlavaEngine, eager: Eager
) -> None:
    sizes = [["square"], ["wide"], [], ["tall", "1x3000"]]
    images = [[picture(7 * b + i, SIZES[name]) for i, name in enumerate(own)] for b, own in enumerate(sizes)]
    prompts = [ONE, "Look: " + ONE + " And is it red?", TEXT, TWO]
    check(next_engine, eager, images, prompts)
    together = next_engine.generate(images, prompts, Sampling(32))
    for b, (own, prompt) in enumerate(zip(images, prompts, strict=True)):
        assert next_engine.generate([own], [prompt], Sampling(32)).token_ids == [together.token_ids[b]]


def test_each_of_two_pictures_has_a_budget_of_its_own(next_engine: LlavaEngine, eager: Eager) -> None:
    pair = [picture(1, SIZES["square"]), picture(2, SIZES["wide"])]
    check(next_engine, eager, [pair], [TWO])
    assert [len(kept) for kept in next_engine.generate(pair, TWO, Sampling(1)).kept[0]] == [24, 24]


def test_a_prompt_without_pictures_is_answered_as_eagerly(next_engine: LlavaEngine, eager: Eager) -> None:
    check(next_engine, eager, [[], []], [TEXT, TEXT + " on the dog"])


@pytest.mark.parametrize("pinpoints", [(), ((112, 56),), ((56, 56), (112, 112))], ids=["base", "3", "2 or 5"])
def test_custom_pinpoints_are_answered_as_eagerly(made: Made, pinpoints: Any) -> None:
    tiny = made(pinpoints, tokens=24)
    images = [[picture(0, (60, 130))], [picture(1, (20, 15))]]
    check(opened(tiny), Eager(tiny), images, [ONE, "Well, " + ONE])


@pytest.mark.parametrize("schedule", ["static", "masked"])
def test_every_schedule_is_answered_as_eagerly(made: Made, schedule: str) -> None:
    tiny = made(tokens=40, schedule=schedule)
    check(opened(tiny), Eager(tiny), [[picture(3, SIZES["wide"])], [picture(4, SIZES["tall"])]], [ONE, ONE])


@pytest.mark.parametrize("tokens", [2, 126])
def test_extreme_budgets_are_answered_as_eagerly(made: Made, tokens: int) -> None:
    tiny = made(tokens=tokens)
    check(opened(tiny), Eager(tiny), [[picture(5, SIZES["square"])]], [ONE])


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_answer_as_eagerly(made: Made, stages: int) -> None:
    tiny = made(tokens=24, stages=stages)
    check(opened(tiny), Eager(tiny), [[picture(0, SIZES["square"])], [], [picture(2, SIZES["tall"])]], [ONE, TEXT, ONE])


@pytest.mark.parametrize("stages", [1, 2])
def test_on_a_gpu_the_answers_are_the_same(made: Made, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = made(tokens=24, backend="rtx", stages=stages)
    fake_gpu.install(monkeypatch)
    engine = opened(tiny, "rtx")
    for sizes in (["square", "wide"], ["1x3000"]):  # the second in memory that the first has used
        images = [[picture(i, SIZES[name])] for i, name in enumerate(sizes)]
        check(engine, Eager(tiny), images, [ONE, "Look: " + ONE][: len(images)])


def test_what_the_prefill_reads_of_pictures_does_not_leave_the_device(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = made(tokens=24, backend="rtx")
    fake_gpu.install(monkeypatch)
    engine, image = opened(tiny, "rtx"), picture(0, SIZES["wide"])
    engine.prefill(image, ONE)
    seen = engine.model.pictures.get(engine.reader.open(image).key)
    assert seen is not None
    assert seen.rows.keys() == {"image_embeds", "image_lengths"}
    assert not any(isinstance(value, np.ndarray) for value in seen.rows.values())


@pytest.mark.parametrize(("tokens", "llm_tokens"), [(48, 16), (2, 1), ("all", 10)])
def test_llava_1_5_drops_tokens_inside_the_decoder_as_eagerly(made: Made, tokens: int | str, llm_tokens: int) -> None:
    tiny = made(None, tokens=tokens, llm_tokens=llm_tokens)
    images = [[picture(0, (80, 60))], [], [picture(1, (60, 60)), picture(2, (9, 99))]]
    check(opened(tiny), Eager(tiny), images, [ONE, TEXT, TWO])


def test_llava_tiny_drops_tokens_inside_the_decoder_as_eagerly(tmp_path: Path) -> None:
    tiny = write_engine(tmp_path / "e", tokens=48, llm_tokens=16, limits=LIMITS, random=True)
    images = [[picture(0, (180, 160))], [picture(1, (160, 60))]]
    check(opened(tiny), Eager(tiny), images, [ONE, "Look: " + ONE])
    assert [len(own[0]) for own in opened(tiny).generate(images, [ONE, ONE], Sampling(1)).kept] == [16, 16]


def test_with_nothing_pruned_logits_equal_transformers_from_the_picture_on(made: Made) -> None:
    transformers = pytest.importorskip("transformers")
    processing = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    tiny = made(tokens="all")
    assert (tiny.budget.tokens, tiny.budget.llm_tokens) == (64, None)
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(tiny.model.files).eval()
    processor, engine = processing.LlavaNextImageProcessorPil.from_pretrained(tiny.model.files), opened(tiny)
    image_token, tokenizer = tiny.model.config.image_token_id, Eager(tiny).tokenizer
    for name in ("wide", "tall", "square", "tiny"):
        image = picture(3, SIZES[name])
        got = engine.prefill(image, ONE)
        ids = tokenizer.encode(ONE, [1], 1).input_ids
        visual = int(got.lengths[0]) - len(ids) + 1
        input_ids = np.repeat(ids, np.where(ids == image_token, visual, 1))
        with torch.inference_mode():
            expected = theirs(input_ids=torch.from_numpy(input_ids)[None], **processor(image, return_tensors="pt"))
        assert np.abs(got.logits - expected.logits[:, -1].numpy()).max() < 1e-3
        assert got.pruned_lengths.tolist() == got.lengths.tolist()
        assert got.kept[0][0][:64].tolist() == list(range(64))


def test_a_picture_last_is_refused_where_it_would_score_itself(made: Made, next_engine: LlavaEngine) -> None:
    image, message = picture(0, SIZES["tiny"]), r"prompt 0 must end with text .* got <image> last\."
    for engine in (next_engine, opened(made(None, tokens=24, llm_tokens=7))):
        with pytest.raises(InputError, match=message):
            engine.prefill(image, "the mat: <image>")
    plain = opened(made(None, tokens=24)).prefill(image, "the mat: <image>")
    assert np.isfinite(plain.logits).all()


def test_too_many_pictures_or_tokens_are_refused(made: Made, next_engine: LlavaEngine) -> None:
    images = [picture(0, SIZES["tiny"])] * 6  # which are 5 tiles each, of which the limit says nothing
    with pytest.raises(InputError, match=r"images must be at most 5 at once .*got 6"):
        next_engine.prefill([images[:3], images[:3]], ["<image>" * 3] * 2)
    next_engine.prefill([images[:2], images[:2], images[:1]], ["<image>" * 2 + "?"] * 2 + ["<image>?"])
    text = "the cat on the mat. " * 60
    with pytest.raises(InputError, match=r"prompt 0 must have at most 443 tokens once each .*--max-prompt \d+"):
        next_engine.prefill([], cut(next_engine, text, 460))
    next_engine.prefill([], cut(next_engine, text, 443))


def cut(engine: LlavaEngine, text: str, tokens: int) -> str:
    """The longest beginning of a text that is at most so many tokens."""
    encode = engine.reader.tokenizer.encode
    return next(text[:n] for n in range(len(text), 0, -1) if len(encode(text[:n], [], 1).input_ids) <= tokens)
