"""A conversation with an engine, in the checkpoint's own template.

    chat = Chat(engine)
    chat.ask("What is this?", "cat.jpg").texts[0]
    chat.ask("What color is it?").texts[0]

Every turn sends the whole conversation with its pictures, whose visual tokens come from the engine's picture cache.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from engines.runtime.engine import Chunk, Generation, LlavaEngine
from engines.runtime.reading import Opened, Picture, Pictures
from engines.runtime.sampling import GREEDY, Sampling
from flowcut.chat import said, user
from flowcut.errors import InputError, TooLarge
from flowcut.prompt import IMAGE


@dataclass(frozen=True)
class _Turn:
    """What is said and shown up to a question, and the prompt that this makes."""

    messages: tuple[dict[str, Any], ...]
    pictures: tuple[Opened, ...]
    prompt: str


class Chat:
    """One conversation, of one thread at a time; several may share an engine.

    Args:
        sampling: of every answer.
        system: what the model is told before all else, where its template has a place for that.
    """

    def __init__(self, engine: LlavaEngine, sampling: Sampling = GREEDY, system: str | None = None) -> None:
        self._engine, self._sampling = engine, sampling
        self._first = () if system is None else (said("system", _checked(system)),)
        self.reset()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, as flowcut.chat has it."""
        return list(self._messages)

    def reset(self) -> None:
        """Forget what was said and shown."""
        self._messages: tuple[dict[str, Any], ...] = self._first
        self._pictures: tuple[Opened, ...] = ()

    def prompt(self, text: str, images: Pictures = ()) -> tuple[list[Opened], str]:
        """All pictures of the conversation and its prompt, were this the next question."""
        turn = self._turn(text, images)
        return list(turn.pictures), turn.prompt

    def ask(
        self, text: str, images: Pictures = (), *, timeout_s: float | None = None, cancel: threading.Event | None = None
    ) -> Generation:
        """The next answer. Where there is none, the conversation stays as it was.

        Args:
            images: shown before the text: a picture, several, or none.
            timeout_s, cancel: as in LlavaEngine.generate.

        Raises:
            TooLarge: the conversation is longer, or shows more, than the engine was built for.
            InputError: a text or picture that cannot be used.
            FlowCutError: what else LlavaEngine.generate raises.
        """
        turn = self._turn(text, images)
        with self._advice():
            answer = self._engine.generate(
                turn.pictures, turn.prompt, self._sampling, timeout_s=timeout_s, cancel=cancel
            )
        self._keep(turn, answer.texts[0])
        return answer

    def stream(
        self, text: str, images: Pictures = (), *, timeout_s: float | None = None, cancel: threading.Event | None = None
    ) -> Generator[Chunk, None, Generation]:
        """The next answer piece by piece, part of the conversation with its last piece; otherwise as `ask`."""
        turn, answer = self._turn(text, images), ""
        with self._advice():
            chunks = self._engine.stream(turn.pictures, turn.prompt, self._sampling, timeout_s=timeout_s, cancel=cancel)
            with closing(chunks):
                while True:
                    try:
                        chunk = next(chunks)
                    except StopIteration as end:
                        result: Generation = end.value
                        return result
                    answer += chunk.text
                    if chunk.finish is not None:
                        self._keep(turn, answer)
                    yield chunk

    def _turn(self, text: str, images: Pictures) -> _Turn:
        pictures: Sequence[Picture] = images if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]
        opened = tuple(map(self._engine.reader.open, pictures))
        messages = (*self._messages, user(_checked(text), len(opened)))
        return _Turn(messages, (*self._pictures, *opened), self._engine.template.render(messages))

    def _keep(self, turn: _Turn, answer: str) -> None:
        """An answer that spells <image> would be taken for a picture. With a blank in its place, unlike with nothing,
        what is around it does not make another."""
        self._messages = (*turn.messages, said("assistant", answer.replace(IMAGE, " ")))
        self._pictures = turn.pictures

    @contextmanager
    def _advice(self) -> Iterator[None]:
        try:
            yield
        except TooLarge as error:
            if len(self._messages) == len(self._first):
                raise
            raise TooLarge(f"{error} Or forget the earlier turns of this chat: Chat.reset().") from None


def _checked(text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"text must be a question, got {text!r}.")
    if IMAGE in text:
        raise InputError(f"text must not hold {IMAGE}, got {text!r}. Give pictures beside it, as images.")
    return text
