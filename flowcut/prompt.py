"""Prompts to token ids and to the places of visual tokens, with the tokenizers library only.

tokenizer.json alone decides the ids, as it does for transformers' AutoTokenizer on a LLaVA checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from flowcut.errors import CheckpointError, InputError

IMAGE = "<image>"


@dataclass(frozen=True)
class Encoded:
    """One prompt, its visual tokens counted. image_rows: row among the prompt's visual tokens, -1 for text."""

    input_ids: NDArray[np.int64]  # [n]
    image_rows: NDArray[np.int64]  # [n]


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts, as the language graph takes them (see contract.language_contract)."""

    input_ids: NDArray[np.int64]  # [B, S]
    position_ids: NDArray[np.int64]  # [B, S]: 0..S-1 in every row, over padding too
    image_rows: NDArray[np.int64]  # [B, S]: row among the visual tokens of the whole batch, -1 for text and padding
    last_token: NDArray[np.int64]  # [B]
    lengths: NDArray[np.int64]  # [B]


class Tokenizer:
    """A checkpoint's tokenizer. `image_token_id` is the config's number of the `<image>` token."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, image_token_id: int, vocab_size: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if tokenizer.token_to_id(IMAGE) is None:
            tokenizer.add_special_tokens([tokenizers.AddedToken(IMAGE, special=True, normalized=False)])
        self._tokenizer = tokenizer
        self._image_id = tokenizer.token_to_id(IMAGE)
        self.image_token_id = image_token_id
        self._check_ids(vocab_size)

    @staticmethod
    def from_file(path: Path, image_token_id: int, vocab_size: int) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            CheckpointError: missing, malformed, or with ids that the model's vocabulary does not have.
        """
        try:
            return Tokenizer(_parse(path.read_text(encoding="utf-8"), path), image_token_id, vocab_size)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} does not exist. Save the tokenizer of the checkpoint there in the tokenizers library's format."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} must be a readable text file, got: {error}.") from None

    def encode(self, prompt: str, images: int, tokens_per_image: int) -> Encoded:
        """Token ids of a prompt, each `<image>` widened to `tokens_per_image` visual tokens.

        Raises:
            InputError: not text, empty, or with more or fewer `<image>` places than `images`.
        """
        ids = np.array(self._tokenizer.encode(_text(prompt)).ids, dtype=np.int64)
        is_image = ids == self._image_id
        if is_image.sum() != images:
            raise InputError(
                f"prompt must have one {IMAGE} for each image ({images}), got {is_image.sum()}. "
                f"Write it like {question_prompt('What is this?', images)!r}."
            )
        repeats = np.where(is_image, tokens_per_image, 1)
        ids, is_image = np.repeat(ids, repeats), np.repeat(is_image, repeats)
        return Encoded(
            input_ids=np.where(is_image, self.image_token_id, ids),
            image_rows=np.where(is_image, np.cumsum(is_image) - 1, -1),
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids without special tokens; ids that the tokenizer does not have are left out."""
        known = [int(i) for i in ids if 0 <= i < 2**32 and i != self.image_token_id]
        known = [i for i in known if self._tokenizer.id_to_token(i) is not None]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def _check_ids(self, vocab_size: int) -> None:
        largest, token = max(
            ((i, token) for token, i in self._tokenizer.get_vocab().items() if i != self._image_id), default=(0, "")
        )
        if largest >= vocab_size:
            raise CheckpointError(
                f"tokenizer ids must be below {vocab_size} (text_config.vocab_size), got {largest} for {token!r}. "
                "tokenizer.json belongs to another checkpoint."
            )


def batch(encoded: Sequence[Encoded], limit: int) -> Batch:
    """Prompts side by side, their images numbered through: those of the first prompt, then of the second, ..

    Raises:
        InputError: no prompt, or one of more than `limit` tokens.
    """
    if not encoded:
        raise InputError("prompts must be at least one, got 0.")
    lengths = np.array([len(prompt.input_ids) for prompt in encoded], dtype=np.int64)
    for index, prompt in enumerate(encoded):
        _check_length(index, prompt, limit)
    shape = (len(encoded), int(lengths.max()))
    input_ids, image_rows = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    first_row = 0
    for row, (prompt, length) in enumerate(zip(encoded, lengths, strict=True)):
        is_image = prompt.image_rows >= 0
        input_ids[row, :length] = prompt.input_ids
        image_rows[row, :length] = np.where(is_image, prompt.image_rows + first_row, -1)
        first_row += int(is_image.sum())
    position_ids = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    return Batch(input_ids, position_ids, image_rows, last_token=lengths - 1, lengths=lengths)


def question_prompt(question: str, images: int = 1) -> str:
    """A question in LLaVA-1.5's conversation template, the images before it."""
    return "USER: " + f"{IMAGE}\n" * images + f"{question} ASSISTANT:"


def _parse(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} must be a tokenizer of the tokenizers library, got: {error}.") from None


def _text(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be text, got {type(prompt).__name__}.")
    if not prompt.strip():
        raise InputError(
            f"prompt must not be empty, got {prompt!r}. Write it like {question_prompt('What is this?')!r}."
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"prompt must be valid Unicode, got {prompt!r}.") from None
    return prompt


def _check_length(index: int, prompt: Encoded, limit: int) -> None:
    length, visual = len(prompt.input_ids), int((prompt.image_rows >= 0).sum())
    if not 1 <= length <= limit:
        raise InputError(
            f"prompt {index} must have 1..{limit} tokens, got {length} ({visual} of them visual). "
            f"Shorten it, or rebuild the engine with --max-prompt {length}."
        )
