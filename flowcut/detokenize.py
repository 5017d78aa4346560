"""Text of an answer while its tokens come: what is certain by now, and what may yet change.

    text = TextStream(tokenizer)
    for token_id in answer:
        print(text.add(token_id), end="")
    print(text.rest())

What is printed is `tokenizer.decode(answer)`, to the character, whatever the ids: no half of a UTF-8 character and
nothing that a later token would change. A step decodes a few tokens only, however long the answer.

Holds for decoders that work from left to right, as Llama's and ByteLevel do. Of the first, tokens such as <0xE6> are
one byte each, and a run of them is text if all of it is valid, else one replacement character per byte. So nothing of a
run is certain before it ends.
"""

from __future__ import annotations

import codecs
import re

from flowcut.prompt import Tokenizer

_WINDOW = 12
"""As soon as so many tokens are decoded again with the next, they are cut to half: to more than the 4 bytes of a
character, so that the text behind them is the same with and without what came before."""
_REPLACEMENT = "\ufffd"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last ones, at whose text we look
        self._text = ""  # of these, without the run of bytes behind them
        self._told = 0  # characters of it that were returned
        self._plain = 0  # tokens behind the last run in them
        self._run: list[int] = []
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._likely = ""  # text of the run

    @property
    def maybe(self) -> str:
        """What the bytes behind the certain text mean if no more come, but for an incomplete character."""
        return self._likely

    def add(self, token_id: int) -> str:
        """What is certain now and was not before."""
        spelling = self._tokenizer.spelling(token_id)
        if spelling is None:
            return ""
        if (byte := self._byte(spelling)) is not None:
            self._run.append(token_id)
            self._likely += self._bytes.decode(byte)
            return ""
        self._decode([*self._ids, *self._run, token_id])
        self._plain = 1 if self._run else self._plain + 1
        self._run, self._likely = [], ""
        self._bytes.reset()
        told, self._told = self._told, len(self._text.removesuffix(_REPLACEMENT))
        new = self._text[told : self._told]
        if len(self._ids) >= _WINDOW:
            self._forget()
        return new

    def rest(self) -> str:
        """What was uncertain, at the end of the answer."""
        self._decode([*self._ids, *self._run])
        return self._text[self._told :]

    def _decode(self, ids: list[int]) -> None:
        self._ids, self._text = ids, self._tokenizer.decode(ids)

    def _forget(self) -> None:
        """Let go of early tokens, never of a part of a run. The text may then begin otherwise, but ends as before."""
        uncertain = len(self._text) - self._told
        self._decode(self._ids[-min(self._plain, _WINDOW // 2) :])
        self._told = len(self._text) - uncertain

    def _byte(self, spelling: str) -> bytes | None:
        found = _BYTE.fullmatch(spelling) if self._tokenizer.byte_fallback else None
        return bytes.fromhex(found[1]) if found else None
