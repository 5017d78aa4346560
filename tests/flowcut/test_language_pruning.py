"""Visual tokens dropped inside the torch decoder: against a float64 decoder without a cache, and against no pruning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from decoder_reference import NaiveDecoder
from references import relative_error
from torch import Tensor

from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.errors import InputError
from flowcut.language import KVCache, LanguageModel
from flowcut.language_pruning import Reading, read, step

CONFIGS = {
    "plain": TextConfig(64, 128, 4, 4, 4, 512, 4096, 1e-5),
    "gqa": TextConfig(64, 128, 5, 8, 2, 512, 4096, 1e-5, rope_theta=5e5),
    "tied, three layers": TextConfig(64, 128, 3, 4, 1, 512, 4096, 1e-5, tie_word_embeddings=True),
}
WEIGHTS = {name: random_weights(LlavaConfig(VisionConfig(), text, 448), 3, "float32") for name, text in CONFIGS.items()}
LENGTH, NEW_TOKENS = 60, 32
SPANS = {"one": [(5, 40)], "two": [(2, 17), (25, 29)], "neighbours": [(0, 11), (11, 30)]}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    return {name: LanguageModel.from_weights(weights) for name, weights in WEIGHTS.items()}


def embeddings(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.from_numpy(0.5 * np.random.default_rng(seed).standard_normal((1, length, 64), np.float32))


def numbers(reading: Reading) -> list[list[int]]:
    return [kept.tolist() for kept in reading.kept]


def greedy(model: LanguageModel, reading: Reading, count: int) -> tuple[list[int], Tensor]:
    """Token ids and the logits [count, V] that they were chosen by."""
    logits = [model.logits(reading.hidden)[0, -1]]
    while len(logits) < count:
        logits.append(model.logits(step(model, logits[-1].argmax(), reading))[0, 0])
    return [int(each.argmax()) for each in logits], torch.stack(logits)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_equals_the_float64_decoder(
    name: str, spans: list[tuple[int, int]], tokens: int, models: dict[str, LanguageModel]
) -> None:
    reading = read(models[name], embeddings(), spans, tokens)
    expected = NaiveDecoder(WEIGHTS[name], CONFIGS[name]).read(embeddings()[0].double().numpy(), spans, 59, tokens)
    assert numbers(reading) == expected.kept
    assert relative_error(reading.hidden[0], expected.hidden) <= 1e-4


@pytest.mark.parametrize(
    ("name", "spans", "tokens"), [("plain", "one", 7), ("gqa", "two", 7), ("tied, three layers", "neighbours", 1)]
)
def test_32_greedy_tokens_equal_those_of_a_decoder_that_reads_all_again(
    name: str, spans: str, tokens: int, models: dict[str, LanguageModel]
) -> None:
    reading = read(models[name], embeddings(), SPANS[spans], tokens, NEW_TOKENS)
    ids, logits = greedy(models[name], reading, NEW_TOKENS)
    naive = NaiveDecoder(WEIGHTS[name], CONFIGS[name])
    expected, expected_logits = naive.greedy(embeddings()[0].double().numpy(), SPANS[spans], tokens, NEW_TOKENS)
    assert ids == expected
    assert len(set(ids)) > 1
    assert relative_error(logits, expected_logits) <= 1e-4


def test_every_picture_has_its_own_budget(models: dict[str, LanguageModel]) -> None:
    spans = [(1, 9), (10, 4), (20, 30)]
    together = read(models["plain"], embeddings(), spans, 6)
    assert [len(kept) for kept in together.kept] == [6, 4, 6]
    assert numbers(together)[1] == [0, 1, 2, 3]
    alone = [read(models["plain"], embeddings(), [span], 6) for span in spans]
    assert numbers(together) == [numbers(each)[0] for each in alone]
    assert together.lengths == (LENGTH, LENGTH - 3 - 24)


def test_layers_keep_as_many_keys_and_values_as_they_have_tokens(models: dict[str, LanguageModel]) -> None:
    reading = read(models["plain"], embeddings(), SPANS["two"], 7, room=2)
    late = LENGTH - 10 - 22
    assert reading.hidden.shape == (1, late, 64)
    for token, more in ((5, 1), (torch.tensor([[6]]), 2)):
        hidden = step(models["plain"], token, reading)
        assert hidden.shape == (1, 1, 64)
        assert reading.lengths == (LENGTH + more, late + more)
        for cached in (reading.cache.keys, reading.cache.values):
            used = [int((rows.abs().amax((0, 1, 3)) > 0).sum()) for rows in cached]
            assert used == [LENGTH + more] * 2 + [late + more] * 2
            assert [rows.shape[2] for rows in cached] == [LENGTH + 2] * 2 + [late + 2] * 2


def unpruned(model: LanguageModel, embeds: Tensor, ids: Sequence[int]) -> Tensor:
    """Logits [1 + len(ids), V] of the prompt's last token and of those that follow, by the decoder as it always was."""
    cache = KVCache.allocate(model.config, 1, LENGTH + len(ids))
    text, images = torch.zeros((1, LENGTH), dtype=torch.int64), torch.arange(LENGTH)[None]
    logits = [model.logits(model(text, images, images, embeds, cache))[:, -1]]
    for i, token in enumerate(ids):
        one = torch.tensor([[token]])
        hidden = model(one, torch.tensor([[LENGTH + i]]), torch.full_like(one, -1), None, cache)
        logits.append(model.logits(hidden)[:, -1])
    return torch.cat(logits)


@pytest.mark.parametrize("spans", [[], [(5, 0)], [(5, 40)], [(0, 3), (9, 39)]], ids=str)
def test_no_more_tokens_than_the_budget_means_that_nothing_is_dropped(
    spans: list[tuple[int, int]], models: dict[str, LanguageModel]
) -> None:
    model = models["gqa"]
    reading = read(model, embeddings(), spans, 40, 3)
    assert numbers(reading) == [list(range(count)) for _, count in spans]
    assert reading.lengths == (LENGTH, LENGTH)
    ids, logits = greedy(model, reading, 4)
    assert relative_error(logits, unpruned(model, embeddings(), ids[:3])) <= 1e-5


def test_one_more_than_the_budget_loses_one(models: dict[str, LanguageModel]) -> None:
    reading = read(models["plain"], embeddings(), [(5, 41)], 40)
    assert len(set(numbers(reading)[0])) == 40
    assert reading.lengths == (LENGTH, LENGTH - 1)


def test_the_last_token_decides(models: dict[str, LanguageModel]) -> None:
    """Otherwise nothing above would notice another source."""
    other = embeddings()
    other[:, -1] = embeddings(seed=1)[:, -1]
    kept = [read(models["plain"], each, SPANS["one"], 7).kept[0].tolist() for each in (embeddings(), other)]
    assert kept[0] != kept[1]


def test_of_equal_scores_the_lower_number_wins() -> None:
    model = LanguageModel.from_weights(WEIGHTS["plain"])
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()  # every strength, and so every score, is 0
    assert numbers(read(model, embeddings(), SPANS["two"], 5)) == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_runs(dtype: torch.dtype) -> None:
    model = LanguageModel.from_weights(WEIGHTS["gqa"], dtype)
    reading = read(model, embeddings().to(dtype), SPANS["one"], 7, 1)
    assert {rows.dtype for rows in (*reading.cache.keys, *reading.cache.values)} == {dtype}
    assert step(model, 5, reading).dtype == reading.hidden.dtype == dtype
    assert len(numbers(reading)[0]) == 7


def test_more_steps_than_there_is_room_for_are_refused(models: dict[str, LanguageModel]) -> None:
    reading = read(models["plain"], embeddings(), SPANS["one"], 7, 1)
    step(models["plain"], 5, reading)
    with pytest.raises(InputError, match=r"position_ids must be below the cache's 61 rows, got 61\."):
        step(models["plain"], 5, reading)
    assert reading.lengths == (61, 28)
