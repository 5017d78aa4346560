"""What chooses the patches that stay: FlowCut, FlowCut less one of its parts, and what both are compared with.

A progressive selector scores layer by layer and drops patches at the pruning points. A one-shot selector leaves all
patches in every layer and keeps the best ones after the last that feeds hidden state -2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowcut.errors import ConfigError

HISTORY = 0.5
"""Weight of the running score: cum = (cum + score) / 2."""
FLOWCUT = "flowcut"
"""The default, and what files say that were written before there were others."""
Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Selector:
    """One way to score patches; docs/algorithm.md has the formulas.

    Attributes:
        name: in its one spelling (`random` alone is `random-0`).
        history: weight of the running score; at 0 a layer's own score counts alone.
        semantic: whether similarity to CLS's value joins the attention of CLS.
        strength: whether the sum is multiplied by the patch's mean |value|.
        one_shot: see the module's docstring.
        constant: (patches, tokens) -> scores [patches] that no picture changes; None where layers are scored.
    """

    name: str
    history: float = HISTORY
    semantic: bool = True
    strength: bool = True
    one_shot: bool = False
    constant: Callable[[int, int], Scores] | None = None


def selector(name: object) -> Selector:
    """The selector of that name.

    Raises:
        ConfigError: no such name; it lists those that there are.
    """
    if isinstance(name, str):
        if found := _NAMED.get(name):
            return found
        if seeded := re.fullmatch(r"random(?:-([0-9]{1,18}))?", name):
            seed = int(seeded[1] or 0)
            return Selector(f"random-{seed}", 0.0, one_shot=True, constant=partial(_random_scores, seed))
    close = get_close_matches(str(name), [*_NAMED, "random"], n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ConfigError(f"selector must be one of {', '.join(_NAMED)} or random-SEED, got {name!r}.{hint}")


def selector_name(schedule: Mapping[str, Any]) -> str:
    """The selector that a schedule as JSON names."""
    return str(schedule.get("selector", FLOWCUT))


def selector_note(schedule: Mapping[str, Any]) -> str:
    """What a line for people has to add about it: nothing for FlowCut."""
    name = selector_name(schedule)
    return "" if name == FLOWCUT else f", selector {name}"


def _grid_scores(patches: int, tokens: int) -> Scores:
    """1 for `tokens` patches spread evenly over the square of `patches`, 0 for the others.

    round(sqrt(tokens)) rows share the tokens so that no two differ by more than one; rows, and columns in each row, are
    the cells at the middles of equal parts. No row needs more columns than there are, and no cell is taken twice.
    """
    side, rows = math.isqrt(patches), round(math.sqrt(tokens))
    scores = np.zeros((side, side), np.float32)
    until = [(2 * row * tokens + rows) // (2 * rows) for row in range(rows + 1)]  # row * tokens / rows, rounded
    for row in range(rows):
        columns = until[row + 1] - until[row]
        scores[_middle(row, rows, side), [_middle(column, columns, side) for column in range(columns)]] = 1
    return scores.reshape(-1)


def _middle(part: int, parts: int, size: int) -> int:
    """The cell, of `size` in a line, in the middle of one of `parts` equal parts."""
    return (2 * part + 1) * size // (2 * parts)


def _random_scores(seed: int, patches: int, tokens: int) -> Scores:
    """A seeded order of the patches as scores 0..N-1: no two are equal, and more tokens only add patches.

    Made from PCG64's raw output, which numpy promises never to change.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(patches), kind="stable").astype(np.float32)


_NAMED = {
    known.name: known
    for known in (
        Selector(FLOWCUT),
        Selector("no-history", history=0.0),
        Selector("no-semantic", semantic=False),
        Selector("no-strength", strength=False),
        Selector("cls", history=0.0, semantic=False, strength=False, one_shot=True),
        Selector("grid", history=0.0, one_shot=True, constant=_grid_scores),
    )
}
