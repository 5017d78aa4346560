"""Questions about pictures, answered in eager PyTorch: the only place where the adaptive schedule answers any.

Nothing is computed twice: a picture is encoded once, and its questions share what the decoder makes of the tokens that
all prompts begin with, the visual ones among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from engines.evaluate_target import NEW_TOKENS
from flowcut.aliases import Model
from flowcut.config import TextConfig
from flowcut.language import KVCache, LanguageModel
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.prompt import Batch, Tokenizer, batch, question_prompt
from flowcut.schedule import Schedule
from flowcut.vision import VisionModel

CACHE_BYTES = 256 << 20
"""Most that the KV cache may take: what limits the pictures at once of a large model."""
PICTURES = 16
QUESTIONS = 6  # about a picture, in the test sets


@dataclass(frozen=True)
class Eager:
    """A checkpoint in eager PyTorch, float32: loaded once, asked under many schedules."""

    vision: VisionModel
    language: LanguageModel
    tokenizer: Tokenizer
    settings: ImageSettings
    eos_token_ids: tuple[int, ...]

    @staticmethod
    def load(model: Model) -> Eager:
        config = model.config
        return Eager(
            VisionModel.from_weights(model.weights),
            LanguageModel.from_weights(model.weights),
            Tokenizer.from_file(model.tokenizer, config.image_token_id, config.text.vocab_size),
            ImageSettings.from_directory(model.files, config.vision.image_size, config.grid_pinpoints),
            tuple(config.eos_token_ids),
        )


class TorchAnswerer:
    """An Answerer (see engines.evaluate_target) of LLaVA-1.5 with any schedule and selector."""

    def __init__(self, eager: Eager, schedule: Schedule) -> None:
        self._eager, self._schedule = eager, schedule
        self.at_once = pictures_at_once(eager.language.config, schedule.tokens)

    @torch.inference_mode()
    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """See Answerer."""
        eager, counts = self._eager, [len(texts) for texts in questions]
        pixels = pixel_values([open_image(picture) for picture in pictures], eager.settings)
        embeds, _ = eager.vision(torch.from_numpy(pixels), self._schedule)  # [P, T, D]
        prompts = [question_prompt(text) for texts in questions for text in texts]
        encoded = [eager.tokenizer.encode(prompt, [self._schedule.tokens], self._schedule.tokens) for prompt in prompts]
        limit = eager.language.config.max_position_embeddings - NEW_TOKENS
        ids = self._generate(embeds, batch(encoded, limit), torch.tensor(counts))
        texts = iter([eager.tokenizer.decode(self._cut(row)) for row in ids])
        return [[next(texts) for _ in range(count)] for count in counts]

    def _generate(self, embeds: Tensor, prompts: Batch, counts: Tensor) -> list[list[int]]:
        """Token ids of B answers, greedily, until all have ended; `counts` [P] prompts belong to each picture."""
        language, (count, length) = self._eager.language, prompts.input_ids.shape
        head = shared(prompts)
        cache = self._read_head(embeds, prompts, head, counts, length + NEW_TOKENS)
        ids, positions = (torch.from_numpy(a[:, head:]) for a in (prompts.input_ids, prompts.position_ids))
        hidden = language(ids, positions, torch.full_like(ids, -1), None, cache)
        tokens = language.logits(hidden, torch.from_numpy(prompts.last_token) - head).argmax(-1)
        answers, ended = [tokens], self._is_end(tokens)
        text, last = torch.full((count, 1), -1), torch.zeros(count, dtype=torch.long)
        for position in range(NEW_TOKENS - 1):
            if ended.all():
                break
            hidden = language(tokens[:, None], torch.from_numpy(prompts.lengths)[:, None] + position, text, None, cache)
            tokens = language.logits(hidden, last).argmax(-1)
            answers.append(tokens)
            ended |= self._is_end(tokens)
        rows: list[list[int]] = torch.stack(answers, 1).tolist()
        return rows

    def _read_head(self, embeds: Tensor, prompts: Batch, head: int, counts: Tensor, rows: int) -> KVCache:
        """The cache of all prompts with their first `head` tokens in it, each picture's read once."""
        language, (pictures, tokens, _) = self._eager.language, embeds.shape
        first = counts.cumsum(0) - counts  # a prompt of each picture
        ids, positions = (torch.from_numpy(a[:, :head])[first] for a in (prompts.input_ids, prompts.position_ids))
        own = torch.from_numpy(prompts.image_rows[0, :head])  # the batch's first picture, so numbered from 0
        image_rows = torch.where(own >= 0, own + tokens * torch.arange(pictures)[:, None], own)
        cache = KVCache.allocate(language.config, pictures, rows)
        language(ids, positions, image_rows, embeds, cache)
        keys, values = ([x.repeat_interleave(counts, 0) for x in side] for side in (cache.keys, cache.values))
        return KVCache(keys, values)

    def _is_end(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens, torch.tensor(self._eager.eos_token_ids))

    def _cut(self, ids: list[int]) -> list[int]:
        """What comes before the end token."""
        return ids[: next((i for i, token in enumerate(ids) if token in self._eager.eos_token_ids), len(ids))]


def shared(prompts: Batch) -> int:
    """Tokens that all prompts begin with, less than the shortest has. The visual ones count as equal."""
    ids = prompts.input_ids[:, : prompts.lengths.min() - 1]
    return int((ids == ids[0]).all(0).cumprod().sum())


def pictures_at_once(config: TextConfig, tokens: int) -> int:
    """Pictures whose questions' cache fits into CACHE_BYTES, at least one."""
    row = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_size
    return max(1, min(PICTURES, CACHE_BYTES // (row * (tokens + 64) * QUESTIONS)))
