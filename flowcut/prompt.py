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

from flowcut.errors import CheckpointError, InputError, TooLarge

IMAGE = "<image>"
PLACES = f"Put {IMAGE} where each picture belongs, and nowhere else."
"""The remedy for a prompt with more or fewer places than pictures, whatever the model's template."""
MAX_CHARACTERS = 1 << 18
"""Of a prompt: more than any model's context holds, and a second's work for the tokenizer."""


@dataclass(frozen=True)
class Encoded:
    """One prompt, its visual tokens counted.

    image_rows: row of the prompt's pictures, one after the other, each of `slots` rows; -1 for text.
    spans: per picture its first place in the prompt, and how many follow from there.
    """

    input_ids: NDArray[np.int64]  # [n]
    image_rows: NDArray[np.int64]  # [n]
    spans: NDArray[np.int64]  # [images, 2]
    slots: int


@dataclass(frozen=True)
class Pruning:
    """What becomes of visual tokens inside the language model.

    Attributes:
        llm_tokens: those that each picture keeps at most.
        limit: longest prompt behind it (flowcut.contract.pruned_limit).
    """

    llm_tokens: int
    limit: int


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts, as the language graph takes them (see contract.language_contract)."""

    input_ids: NDArray[np.int64]  # [B, S]
    position_ids: NDArray[np.int64]  # [B, S]: 0..S-1 in every row, over padding too
    image_rows: NDArray[np.int64]  # [B, S]: row of all pictures of the batch, `slots` each; -1 for text and padding
    last_token: NDArray[np.int64]  # [B]
    lengths: NDArray[np.int64]  # [B]
    image_spans: NDArray[np.int64]  # [images, 3]: sequence, first place, places
    pruned_position_ids: NDArray[np.int64]  # [B, S2]: as position_ids, for the prompts behind the pruning


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
        self._special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self.byte_fallback = b"ByteFallback" in (tokenizer.decoder.__getstate__() if tokenizer.decoder else b"")
        """Whether tokens like <0xE6> are bytes of characters that have no token of their own."""
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

    def encode(self, prompt: str, rows: Sequence[int], slots: int) -> Encoded:
        """Token ids of a prompt, each `<image>` widened to the visual tokens of its picture.

        Special tokens that are written out in it, as `</s>`, are these tokens, as they are for transformers.

        Args:
            rows: visual tokens of each picture.
            slots: rows of a picture in image_embeds, of which the first `rows` are used.

        Raises:
            InputError: not text, empty, of more than MAX_CHARACTERS, or with more or fewer `<image>` places than
                pictures.
        """
        ids = np.array(self._tokenizer.encode(_text(prompt)).ids, dtype=np.int64)
        is_image = ids == self._image_id
        if is_image.sum() != len(rows):
            raise InputError(
                f"prompt must have one {IMAGE} for each image ({len(rows)}), got {is_image.sum()}. {PLACES}"
            )
        counts = np.array(rows, np.int64)
        repeats = np.ones(len(ids), np.int64)
        repeats[is_image] = counts
        first = (np.cumsum(repeats) - repeats)[is_image]
        image_rows = np.full(int(repeats.sum()), -1, np.int64)
        for i, (start, count) in enumerate(zip(first, counts, strict=True)):
            image_rows[start : start + count] = i * slots + np.arange(count)
        input_ids = np.where(image_rows < 0, np.repeat(ids, repeats), self.image_token_id)
        return Encoded(input_ids, image_rows, np.stack([first, counts], 1), slots)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids without special tokens; ids that the tokenizer does not have are left out."""
        known = [int(i) for i in ids if self.spelling(i) is not None]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    @property
    def begin(self) -> str:
        """The token that `encode` puts before every prompt; empty for none."""
        return next(iter(self._tokenizer.encode("").tokens), "")

    def spelled(self, token_id: int) -> str:
        """A token as prompts would have it, special ones too; empty where there is none of that number."""
        return self._tokenizer.id_to_token(token_id) or ""

    def spelling(self, token_id: int) -> str | None:
        """A token as tokenizer.json has it; None for what `decode` leaves out."""
        if not 0 <= token_id < 2**32 or token_id == self.image_token_id:
            return None
        token: str | None = self._tokenizer.id_to_token(int(token_id))
        return None if token in self._special else token

    def _check_ids(self, vocab_size: int) -> None:
        largest, token = max(
            ((i, token) for token, i in self._tokenizer.get_vocab().items() if i != self._image_id), default=(0, "")
        )
        if largest >= vocab_size:
            raise CheckpointError(
                f"tokenizer ids must be below {vocab_size} (text_config.vocab_size), got {largest} for {token!r}. "
                "tokenizer.json belongs to another checkpoint."
            )


def batch(encoded: Sequence[Encoded], limit: int, pruning: Pruning | None = None) -> Batch:
    """Prompts side by side, their images numbered through: those of the first prompt, then of the second, ..

    Raises:
        InputError: no prompt, or one of more than `limit` tokens, or than `pruning` allows; with `pruning` also one
            that ends with a picture, whose last token would score itself.
    """
    if not encoded:
        raise InputError("prompts must be at least one, got 0.")
    lengths = np.array([len(prompt.input_ids) for prompt in encoded], dtype=np.int64)
    for index, prompt in enumerate(encoded):
        _check_length(index, prompt, limit)
        if pruning is not None:
            _check_end(index, prompt)
    shape = (len(encoded), int(lengths.max()))
    input_ids, image_rows = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    first_row, spans = 0, [np.empty((0, 3), np.int64)]
    for row, (prompt, length) in enumerate(zip(encoded, lengths, strict=True)):
        input_ids[row, :length] = prompt.input_ids
        image_rows[row, :length] = np.where(prompt.image_rows >= 0, prompt.image_rows + first_row, -1)
        first_row += len(prompt.spans) * prompt.slots
        spans.append(np.insert(prompt.spans, 0, row, axis=1))
    return Batch(
        input_ids,
        _positions(*shape),
        image_rows,
        last_token=lengths - 1,
        lengths=lengths,
        image_spans=np.concatenate(spans),
        pruned_position_ids=_positions(shape[0], _longest_pruned(encoded, limit, pruning)),
    )


def _longest_pruned(encoded: Sequence[Encoded], limit: int, pruning: Pruning | None) -> int:
    """Tokens of the longest prompt once each picture has at most `llm_tokens`."""
    if pruning is None:
        return max(len(prompt.input_ids) for prompt in encoded)
    lengths = []
    for index, prompt in enumerate(encoded):
        dropped = np.maximum(prompt.spans[:, 1] - pruning.llm_tokens, 0).sum()
        lengths.append(len(prompt.input_ids) - int(dropped))
        if lengths[-1] > pruning.limit:
            raise TooLarge(
                f"prompt {index} must have at most {pruning.limit} tokens once each picture in it is cut to "
                f"{pruning.llm_tokens} inside the language model, got {lengths[-1]}. Shorten its text, or rebuild the "
                f"engine with --max-prompt {limit + lengths[-1] - pruning.limit}."
            )
    return max(lengths)


def _positions(batch: int, length: int) -> NDArray[np.int64]:
    """0..length-1 for every sequence."""
    return np.tile(np.arange(length, dtype=np.int64), (batch, 1))


def question_prompt(question: str, images: int = 1, anyres: bool = False) -> str:
    """A question in the conversation template of LLaVA-1.5, or of LLaVA-NeXT on Vicuna, the images before it."""
    from flowcut.chat import default_template, user

    _sized(question)
    return default_template(anyres).render([user(question, images)])


def _parse(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} must be a tokenizer of the tokenizers library, got: {error}.") from None


def _sized(prompt: object) -> str:
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be text, got {type(prompt).__name__}.")
    if len(prompt) > MAX_CHARACTERS:
        raise InputError(f"prompt must have at most {MAX_CHARACTERS} characters, got {len(prompt)}. Shorten it.")
    return prompt


def _text(given: object) -> str:
    prompt = _sized(given)
    if not prompt.strip():
        raise InputError(f"prompt must not be empty, got {prompt[:20]!r}. Write a question.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"prompt must be valid Unicode, got {prompt[error.start]!r} at character {error.start}."
        ) from None
    return prompt


def _check_length(index: int, prompt: Encoded, limit: int) -> None:
    length, visual = len(prompt.input_ids), int((prompt.image_rows >= 0).sum())
    if not 1 <= length <= limit:
        raise TooLarge(
            f"prompt {index} must have 1..{limit} tokens, got {length} ({visual} of them visual). "
            f"Shorten it, or rebuild the engine with --max-prompt {length}."
        )


def _check_end(index: int, prompt: Encoded) -> None:
    """The source of the scores may not be among the tokens that it scores (docs/algorithm.md 5)."""
    if prompt.image_rows[-1] >= 0:
        raise InputError(
            f"prompt {index} must end with text where its last token chooses the visual tokens, got {IMAGE} last. "
            "Put the question behind the pictures."
        )
