"""Selectors by name, and the patches that those choose which look at no picture."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcut.errors import ConfigError
from flowcut.selector import Selector, selector, selector_name, selector_note

NAMES = ["flowcut", "no-history", "no-semantic", "no-strength", "cls", "grid", "random-0", "random-17"]


def chosen(name: str, patches: int, tokens: int) -> list[int]:
    """The best patches, of equal scores the lower numbers, ascending."""
    constant = selector(name).constant
    assert constant is not None
    scores = constant(patches, tokens)
    assert scores.dtype == np.float32
    assert scores.shape == (patches,)
    return sorted(sorted(range(patches), key=lambda j: (-scores[j], j))[:tokens])


def drawn(tokens: int, side: int) -> list[str]:
    kept = chosen("grid", side * side, tokens)
    return ["".join(".#"[row * side + column in kept] for column in range(side)) for row in range(side)]


def test_names_are_their_own() -> None:
    assert [selector(name).name for name in NAMES] == NAMES
    assert selector("random").name == "random-0"
    assert selector("random-007").name == "random-7"


def test_an_ablation_lacks_one_part() -> None:
    full = selector("flowcut")
    assert (full.history, full.semantic, full.strength, full.one_shot, full.constant) == (0.5, True, True, False, None)
    assert selector("no-history") == Selector("no-history", history=0)
    assert selector("no-semantic") == Selector("no-semantic", semantic=False)
    assert selector("no-strength") == Selector("no-strength", strength=False)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("clss", "Did you mean cls?"),
        ("flow-cut", "Did you mean flowcut?"),
        ("rando", "Did you mean random?"),
        ("random-", "Did you mean random?"),
        ("random--1", "Did you mean random?"),
        ("", ""),
        (3, ""),
        (None, ""),
        (["cls"], "Did you mean cls?"),
    ],
)
def test_unknown_names_are_refused_with_those_that_there_are(name: object, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        selector(name)
    message = "selector must be one of flowcut, no-history, no-semantic, no-strength, cls, grid or random-SEED, got "
    assert str(error.value) == f"{message}{name!r}." + (f" {hint}" if hint else "")


def test_schedules_written_before_there_were_selectors_are_flowcuts() -> None:
    assert (selector_name({"kind": "static"}), selector_note({"kind": "static"})) == ("flowcut", "")
    assert (selector_name({"selector": "cls"}), selector_note({"selector": "cls"})) == ("cls", ", selector cls")


def test_grids_by_hand() -> None:
    assert drawn(1, 5) == [".....", ".....", "..#..", ".....", "....."]
    assert drawn(4, 4) == ["....", ".#.#", "....", ".#.#"]
    assert drawn(5, 5) == [".....", "#.#.#", ".....", ".#.#.", "....."]
    assert drawn(9, 6) == ["......", ".#.#.#"] * 3
    assert drawn(36, 6) == ["######"] * 6


@given(side=st.integers(1, 30), share=st.floats(0, 1))
def test_a_grid_has_as_many_patches_as_asked_for_in_rows_of_equal_size(side: int, share: float) -> None:
    tokens = max(1, round(share * side * side))
    rows = Counter(patch // side for patch in chosen("grid", side * side, tokens))
    assert sum(rows.values()) == tokens
    assert max(rows.values()) - min(rows.values()) <= 1


@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 48, 64, 128, 192, 288])
def test_a_grid_leaves_no_patch_far_from_a_kept_one(tokens: int) -> None:
    """The farthest is about half a cell of side 24 / sqrt(T) away, and the middle of all is the picture's."""
    side, cell = 24, 24 / tokens**0.5
    kept = np.array([divmod(patch, side) for patch in chosen("grid", side * side, tokens)])
    cells = np.array([divmod(patch, side) for patch in range(side * side)])
    distance = np.abs(cells[:, None] - kept[None]).max(-1).min(-1)
    assert distance.max() <= 0.75 * cell + 1
    assert np.abs(kept.mean(0) - (side - 1) / 2).max() <= 1


def test_random_patches_follow_the_seed_alone() -> None:
    first, again, other = (chosen(name, 576, 64) for name in ("random-1", "random-1", "random-2"))
    assert first == again != other
    assert chosen("random", 576, 64) == chosen("random-0", 576, 64)
    assert chosen("random-1", 9, 3) == [2, 5, 6]  # in every version of numpy
    assert set(first) < set(chosen("random-1", 576, 128))


def test_random_patches_are_spread() -> None:
    """Over seeds every patch is kept about equally often: 2000 draws of 9 of 36, deviation 19."""
    counts = Counter(patch for seed in range(2000) for patch in chosen(f"random-{seed}", 36, 9))
    assert len(counts) == 36
    assert max(abs(n - 500) for n in counts.values()) < 100
