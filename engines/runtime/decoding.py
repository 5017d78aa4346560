"""Answers as they grow, token by token: each prompt of a batch ends in its own time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.runtime.clock import Clock
from engines.runtime.model import Model, Prefill
from engines.runtime.reading import Request
from engines.runtime.sampling import Sampler
from engines.runtime.stopping import StopStrings
from flowcut.detokenize import TextStream
from flowcut.errors import FlowCutError
from flowcut.prompt import Tokenizer

Finish = Literal["end", "length", "stop"]
"""Why an answer is complete: the model ended it, it has max_new_tokens, or a stop string came up."""


@dataclass(frozen=True)
class Chunk:
    """What one step added to one answer.

    Attributes:
        index: of the prompt.
        text: that is certain by now; "" where the token makes no whole character, or a stop string may begin with it.
            The chunks' texts put together are the answer's.
        token_id: the token; None where the answer ended with none, as at its end token.
        finish: with the last chunk, why it is the last; None before.
    """

    index: int
    text: str
    token_id: int | None
    finish: Finish | None


class Reply:
    """The answer to one request of a batch."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> None:
        self.request, self._index = request, index
        self._sampler = Sampler(request.sampling, request.encoded.input_ids)
        self._stream, self._stop = TextStream(tokenizer), StopStrings(request.sampling.stop)
        self._eos = frozenset(eos_token_ids)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self.error: FlowCutError | None = None
        self.last = 0
        """The token that the next step reads: of an answer that has ended whatever it was."""

    @property
    def done(self) -> bool:
        """Whether nothing more is to come, for good or not."""
        return self.finish is not None or self.error is not None

    def add(self, logits: NDArray[np.float32]) -> Chunk | None:
        """Choose the next token from its logits, [vocab]. None of an answer that is done, or ends here in an error."""
        if self.done or not self.check():
            return None
        try:
            token = self.last = self._sampler.next(logits)
        except FlowCutError as error:
            self.error = error
            return None
        text = self._ended() if token in self._eos else self._taken(token)
        self.text += text
        return Chunk(self._index, text, None if token in self._eos else token, self.finish)

    def _taken(self, token: int) -> str:
        """What may be told with one more token."""
        self.token_ids.append(token)
        text = self._stop.add(self._stream.add(token), self._stream.maybe)
        if self._stop.found:
            self.finish = "stop"
        elif len(self.token_ids) == self.request.sampling.max_new_tokens:
            self.finish = "length"
            text += self._rest()
        return text

    def _ended(self) -> str:
        self.finish = "end"
        return self._rest()

    def _rest(self) -> str:
        """What was held back, of an answer that ends without a stop string."""
        return self._stop.add(self._stream.rest()) + self._stop.rest()

    def check(self) -> bool:
        """Whether the request may go on; if not, `error` says why."""
        try:
            self.request.control.check()
        except FlowCutError as error:
            self.error = error
        return self.error is None


class Answering:
    """A batch of requests on its way, whoever they are from.

    Args:
        place: entered before the prefill and left behind the last step: one at the gate, say, that may have to be
            waited for.
    """

    def __init__(
        self,
        model: Model,
        place: AbstractContextManager[None],
        replies: Sequence[Reply],
        clock: Clock | None = None,
    ) -> None:
        self.replies = list(replies)
        self.prefill: Prefill | None = None
        self._model, self._place, self._clock = model, place, clock or Clock()
        self._steps, self._first_ms = 0, 0.0

    def __iter__(self) -> Generator[list[Chunk], None, None]:
        """What each step adds. Closing the iterator gives the place back.

        Raises:
            InputError: pictures that cannot be prepared.
            EngineError: the engine library failed.
            QueueFull, RequestTimeout, RequestCancelled: before there was a place.
        """
        requests, clock = [reply.request for reply in self.replies], self._clock
        self._model.prepare(requests)
        clock.stop("preprocess")
        with self._place:
            clock.stop("queue")
            self.prefill = self._model.prefill(requests, clock)
            logits = self.prefill.logits
            try:
                while True:
                    chunks = [reply.add(row) for reply, row in zip(self.replies, logits, strict=True)]
                    if self._steps:
                        clock.stop("decode")
                    else:
                        self._first_ms = clock.since_start()
                    yield [chunk for chunk in chunks if chunk is not None]
                    clock.skip()
                    if all(reply.done for reply in self.replies):
                        return
                    tokens = np.array([reply.last for reply in self.replies], np.int64)
                    logits = self._model.step(self.prefill, tokens, self._steps)
                    self._steps += 1
            finally:  # whoever takes this place needs the cache, and this may be held for long: by an error, say
                self.prefill = replace(self.prefill, state=None)

    def latency_ms(self) -> dict[str, float]:
        """See Generation."""
        stages = dict(self._clock.stages)
        decode = stages.pop("decode", 0.0)
        per_token = {"decode_per_token": decode / self._steps} if self._steps else {}
        first = {"time_to_first_token": self._first_ms}
        return {**stages, **first, "decode": decode, **per_token, "total": self._clock.since_start()}
