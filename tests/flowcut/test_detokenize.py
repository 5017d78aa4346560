"""Text that comes piece by piece is what the tokenizer makes of all tokens, and never changes."""

from __future__ import annotations

import functools

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from flowcut.aliases import ASSETS
from flowcut.detokenize import TextStream
from flowcut.prompt import Tokenizer

WORDS = ["red", "blue", " a", " Ünï", "日本", "🐈", "<s>", "<image>", " ", "\n"]


@functools.cache
def llama() -> Tokenizer:
    """llava-tiny's: byte fallback, 1024 tokens."""
    return Tokenizer.from_file(ASSETS / "llava-tiny" / "tokenizer.json", 1022, 1024)


@functools.cache
def byte_level() -> Tokenizer:
    """GPT's and Llama 3's kind: every token is bytes, often a part of a character."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["the quick brown fox été été 日本 日本 日本 🐈🐈"] * 3, trainer)
    made.add_tokens(["<plain>"])
    return Tokenizer(made, 2, 400)


TOKENIZERS = {"llama": llama, "byte_level": byte_level}
BYTES = st.integers(0, 255).map(lambda byte: llama()._tokenizer.token_to_id(f"<0x{byte:02X}>"))
IDS = {
    "llama": st.lists(st.one_of(st.integers(-1, 1030), BYTES, BYTES), max_size=60),
    "byte_level": st.lists(st.integers(-1, 335), max_size=60),
}


def streamed(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    stream = TextStream(tokenizer)
    return [stream.add(token) for token in ids], stream.rest()


@pytest.mark.parametrize("which", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_put_together_are_the_whole_text(which: str, data: st.DataObject) -> None:
    tokenizer, ids = TOKENIZERS[which](), data.draw(IDS[which])
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


@pytest.mark.parametrize("which", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
@example("日本🐈")
@example(" two  spaces ünï")
def test_of_real_text_no_piece_is_half_a_character(which: str, text: str) -> None:
    tokenizer = TOKENIZERS[which]()
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    pieces, rest = streamed(tokenizer, ids)
    assert "\ufffd" not in "".join(pieces).replace(tokenizer.decode(ids).count("\ufffd") * "\ufffd" or "\0", "")
    assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_words_come_at_once_and_characters_when_they_are_whole() -> None:
    tokenizer = llama()
    ids = tokenizer._tokenizer.encode("red 日 blue", add_special_tokens=False).ids
    pieces, rest = streamed(tokenizer, ids)
    assert pieces[0] == "red"
    assert rest == ""
    assert [piece for piece in pieces if "日" in piece] == [pieces[-1]]  # the byte tokens end with the next word
    assert pieces.count("") >= 3


def test_a_run_of_bytes_is_told_as_likely_and_not_as_certain() -> None:
    tokenizer, stream = llama(), TextStream(llama())
    for byte, likely in zip("日".encode(), ["", "", "日"], strict=True):
        assert stream.add(tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>")) == ""
        assert stream.maybe == likely
    assert stream.rest() == "日"


@pytest.mark.parametrize("which", TOKENIZERS)
def test_the_work_of_a_step_does_not_grow(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens decoded, counted: a few for each, however long the answer."""
    tokenizer, counts = TOKENIZERS[which](), list[int]()
    decode = tokenizer.decode

    def counted(ids: list[int]) -> str:
        counts.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    first, last = (4, 10) if which == "byte_level" else (3, 700)
    ids = [first + i * 7 % (last - first) for i in range(2000)]  # byte_level: invalid UTF-8 without an end
    streamed(tokenizer, ids)
    runs = 256 if which == "llama" else 0
    assert max(counts) <= 24 + runs
    assert sum(counts) < 20 * len(ids)
