"""Questions answered in eager PyTorch, each prompt alone: where visual tokens are dropped inside the language model.

Which of them stay depends on the question, so prompts about one picture share nothing behind the second layer; and
LLaVA-NeXT's pictures differ in how many they have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from calib.dataset import tower_pixels
from engines.evaluate_target import NEW_TOKENS
from engines.evaluate_torch import Eager
from flowcut.anyres import choose_tiling
from flowcut.language_pruning import Reading, read, step
from flowcut.preprocess import open_image
from flowcut.prompt import batch, question_prompt
from flowcut.schedule import Schedule


class OneByOne:
    """An Answerer (see engines.evaluate_target) with any schedule and selector.

    llm_tokens: visual tokens of a picture behind the second decoder layer; None: all.
    """

    at_once = 1

    def __init__(self, eager: Eager, schedule: Schedule, llm_tokens: int | None = None) -> None:
        self._eager, self._schedule, self._llm_tokens = eager, schedule, llm_tokens

    @torch.inference_mode()
    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """See Answerer."""
        seen = [self._see(open_image(picture)) for picture in pictures]
        return [[self._say(visual, text) for text in texts] for visual, texts in zip(seen, questions, strict=True)]

    def _see(self, image: Image.Image) -> Tensor:
        """Visual tokens [n, D] of a picture."""
        eager = self._eager
        config = eager.vision.config
        pixels = torch.from_numpy(tower_pixels(image, eager.settings, config))
        if config.anyres:
            return eager.vision.see(pixels, choose_tiling(config, *image.size), self._schedule)[0]
        embeds: Tensor = eager.vision(pixels, self._schedule)[0][0]
        return embeds

    def _say(self, visual: Tensor, text: str) -> str:
        eager, count = self._eager, len(visual)
        prompt = question_prompt(text, anyres=eager.vision.config.anyres)
        encoded = eager.tokenizer.encode(prompt, [count], count)
        one = batch([encoded], eager.language.config.max_position_embeddings - NEW_TOKENS)
        ids, rows = torch.from_numpy(one.input_ids), torch.from_numpy(one.image_rows)
        embeds = eager.language.embed(ids, rows, visual[None])
        (span,) = encoded.spans.tolist()
        kept = count if self._llm_tokens is None else self._llm_tokens
        return eager.tokenizer.decode(self._generate(read(eager.language, embeds, [span], kept, NEW_TOKENS)))

    def _generate(self, reading: Reading) -> list[int]:
        """Greedily, what comes before the end token."""
        language, answer, hidden = self._eager.language, list[int](), reading.hidden
        while len(answer) < NEW_TOKENS:
            token = int(language.logits(hidden[:, -1:])[0, 0].argmax())
            if token in self._eager.eos_token_ids:
                break
            answer.append(token)
            hidden = step(language, token, reading)
        return answer
