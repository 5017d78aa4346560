"""An answer ends at the first stop string, and nothing of it was shown by then."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.runtime.stopping import StopStrings

TEXT = st.text(alphabet="ab.\n", max_size=20)
STRINGS = st.lists(st.text(alphabet="ab.\n", min_size=1, max_size=4), max_size=3)


def shown(pieces: list[str], strings: list[str]) -> tuple[list[str], bool]:
    stop, out = StopStrings(strings), list[str]()
    for piece in pieces:
        out.append(stop.add(piece))
        if stop.found:
            return out, True
    return [*out, stop.rest()], False


@settings(max_examples=500)
@given(st.lists(TEXT, max_size=6), STRINGS)
def test_what_is_shown_is_what_comes_before_the_first_one(pieces: list[str], strings: list[str]) -> None:
    out, found = shown(pieces, strings)
    ends = [
        n for n in range(len(pieces) + 1) if any(string in "".join(pieces[:n]) for string in strings)
    ]  # pieces after which one is complete
    assert found == bool(ends)
    whole = "".join(pieces[: ends[0]] if ends else pieces)
    first = min((whole.find(string) for string in strings if string in whole), default=len(whole))
    assert "".join(out) == whole[:first]


@settings(max_examples=200)
@given(st.lists(TEXT, max_size=6), STRINGS)
def test_only_a_possible_beginning_is_held_back(pieces: list[str], strings: list[str]) -> None:
    stop, sent, seen = StopStrings(strings), "", ""
    for piece in pieces:
        sent, seen = sent + stop.add(piece), seen + piece
        if stop.found:
            return
        held = seen.removeprefix(sent)
        assert held == "" or any(string.startswith(held) and string != held for string in strings)


@pytest.mark.parametrize(
    ("pieces", "strings", "out"),
    [
        (["a st", "op b"], ["stop"], ["a ", ""]),
        (["a st", "ay"], ["stop"], ["a ", "stay", ""]),
        (["one two"], ["two", "one"], [""]),
        (["aab"], ["ab"], ["a"]),
        (["as", "to", "pper"], ["stop"], ["a", "", ""]),
    ],
)
def test_by_hand(pieces: list[str], strings: list[str], out: list[str]) -> None:
    assert shown(pieces, strings)[0] == out


def test_what_may_come_counts_and_is_not_shown() -> None:
    stop = StopStrings(["日"])
    assert stop.add("a", maybe="月") == "a"
    assert stop.add("b", maybe="月日") == "b月"
    assert stop.found
