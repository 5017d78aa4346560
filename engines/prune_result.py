"""What `flowcut prune` found: patches kept in the encoder and, where a question was asked, in the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowcut.anyres import Tiling
from flowcut.schedule import Schedule

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Pruned:
    """What happened to the B images that the tower saw: pictures, or of LLaVA-NeXT the tiles of all pictures.

    Attributes:
        kept: [B, K] patch numbers, ascending.
        counts: [B, L+1] patches entering layer 0, then leaving each layer.
        features: [B, K, hidden] float32, hidden state -2 before the projector.
        trace: per pruning point its layer and, per image, the patches that left it.
        tilings: how LLaVA-NeXT's pictures were cut; empty for LLaVA-1.5.
        merged: per picture of LLaVA-NeXT the patches kept outside the padding, numbered as flowcut.anyres.kept_patches
            does, ascending.
        left: per picture the patches that the language model leaves of these; None where no question was asked.
    """

    kept: Integers
    counts: Integers
    features: Floats
    trace: list[tuple[int, list[Integers]]]
    tilings: Sequence[Tiling] = ()
    merged: Sequence[Integers] = ()
    left: Sequence[Integers] | None = None

    @property
    def encoder(self) -> list[Integers]:
        """Per picture the patches that the encoder kept."""
        return list(self.merged if self.tilings else self.kept)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What --out holds. A picture's patches end in -1 where another has more of them."""
        found: dict[str, NDArray[Any]] = {"kept": _padded(self.encoder if self.left is None else self.left)}
        if self.left is not None:
            found["kept_encoder"] = _padded(self.encoder)
        found |= {"counts": self.counts, "features": self.features}
        if not self.tilings:
            return found
        return found | {"grids": np.array(self._grids(), np.int64), "tile_kept": self.kept}

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        found: dict[str, Any] = {"kept": _lists(self.encoder if self.left is None else self.left)}
        if self.left is not None:
            found["kept_encoder"] = _lists(self.encoder)
        found["counts"] = self.counts.tolist()
        if not self.tilings:
            return found
        return found | {"grids": self._grids(), "tile_kept": self.kept.tolist()}

    def _grids(self) -> list[list[int]]:
        return [[tiling.rows, tiling.columns] for tiling in self.tilings]


@dataclass(frozen=True)
class Outcome:
    """What `prune` did, with which schedule, and which files it wrote. `note` is the model's.

    Attributes:
        llm_tokens: visual tokens that the language model leaves of each picture at most; None: all.
        question: by which it chose them; None: it was not run.
    """

    pruned: Pruned
    schedule: Schedule
    note: str
    written: list[str]
    llm_tokens: int | None = None
    question: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the last line of `flowcut prune` holds."""
        asked = self.question is not None
        return {
            **self.pruned.to_dict(),
            **({"llm_tokens": self.llm_tokens} if self.pruned.tilings or asked else {}),
            **({"question": self.question} if asked else {}),
            "schedule": self.schedule.to_dict(),
            "note": self.note,
            "written": self.written,
        }


def _padded(pictures: Sequence[Integers]) -> Integers:
    """[pictures, N], rows ending in -1 where others are longer."""
    rows = np.full((len(pictures), max(map(len, pictures))), -1, np.int64)
    for row, numbers in zip(rows, pictures, strict=True):
        row[: len(numbers)] = numbers
    return rows


def _lists(pictures: Sequence[Integers]) -> list[list[int]]:
    return [numbers.tolist() for numbers in pictures]
