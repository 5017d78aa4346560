"""Pictures and prompts for a benchmark: no two pictures of a batch alike, prompts of a length that may be asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from engines.bench.subjects import Work
from flowcut.chat import ChatTemplate, user
from flowcut.errors import ConfigError
from flowcut.preprocess import open_image
from flowcut.prompt import Tokenizer

FILLERS = (" and", " a", " the", ",", ".")
"""Put behind a question, first the longest runs of one of them, until the prompt has the length asked for."""
MARK = 8
"""Pixels a side of what tells a copy of a picture from the others."""


def text_tokens(tokenizer: Tokenizer, prompt: str) -> int:
    """Tokens of a prompt with one picture, but for the picture's."""
    return len(tokenizer.encode(prompt, [1], 1).input_ids) - 1


def make_prompt(tokenizer: Tokenizer, template: ChatTemplate, question: str, tokens: int | None) -> str:
    """The question in the model's template, lengthened to exactly `tokens` tokens beside the picture's.

    Raises:
        ConfigError: fewer than the question takes, or a length that no filler reaches.
        InputError: a question that is empty or no text.
    """

    def prompt(rest: str) -> str:
        return template.render([user(question + rest, 1)])

    if tokens is None:
        return prompt("")
    least = text_tokens(tokenizer, prompt(""))
    if tokens < least:
        raise ConfigError(
            f"prompt_tokens must be at least {least} (the question in the model's template), got {tokens}. Ask a "
            "shorter --question, or for more."
        )
    rest = ""
    for filler in FILLERS:
        rest += filler * _most(lambda count: text_tokens(tokenizer, prompt(rest + filler * count)), tokens)  # noqa: B023
        if (reached := text_tokens(tokenizer, prompt(rest))) == tokens:
            return prompt(rest)
    raise ConfigError(f"prompt_tokens must be a length that words reach, got {tokens}; the next below is {reached}.")


def _most(length: Callable[[int], int], limit: int) -> int:
    """The greatest count whose length is at most `limit`; that of 0 is."""
    low, high = 0, limit + 1  # every filler takes a token or more; where it were none, this is where to stop
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if length(middle) <= limit else (low, middle)
    return low


@contextmanager
def make_works(pictures: Sequence[Path], prompt: str, batches: Sequence[int]) -> Iterator[list[Work]]:
    """One Work for each batch size. A picture that comes again, also where there are fewer pictures than prompts,
    is a copy with a mark, so that each is encoded; the copies are files of the same kind and go with the context.

    Raises:
        InputError: a picture that cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="flowcut-bench-") as folder:
        most = max(batches)
        files, seen = list[Path](), set[bytes]()
        for i in range(most):
            picture = pictures[i % len(pictures)]
            content = open_image(picture).tobytes()
            files.append(_copy(picture, i, Path(folder)) if content in seen else picture)
            seen.add(content)
        yield [Work(tuple(files[:batch]), (prompt,) * batch) for batch in batches]


def _copy(picture: Path, number: int, folder: Path) -> Path:
    image = open_image(picture)
    mark = Image.new("RGB", (MARK, MARK), (37 * number % 256, 91 * number % 256, 151 * number % 256))
    image.paste(mark, (0, 0))
    suffix = picture.suffix.lower() if picture.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") else ".png"
    path = folder / f"{number}{suffix}"
    image.save(path)
    return path
