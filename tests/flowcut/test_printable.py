"""Text of others cannot steer a terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowcut.printable import printable


@given(st.text())
def test_nothing_is_left_that_a_terminal_would_obey(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text, keep="\n").replace("\n", "").isprintable()


def test_what_is_plain_stays_and_the_rest_is_escaped() -> None:
    assert printable("日本 · ü") == "日本 · ü"
    assert printable("a\x1b[31mb\u202e\n\udcff") == r"a\x1b[31mb\u202e\n\udcff"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
