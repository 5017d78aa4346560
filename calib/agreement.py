"""How far a schedule with constants agrees with adaptive: kept sets after each pruning point, features at the end.

A sample is a picture, or a tile of LLaVA-NeXT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.patches import jaccard

if TYPE_CHECKING:
    from calib.tower import Run

Kept = tuple[int, ...]
"""Per pruning point the patches that left it, as a mask."""
DIGITS = 6
Figures = dict[str, float | None]


def feature_cosine(a: Run, b: Run) -> float | None:
    """Mean over the patches that both kept of the cosine between their features; None where they share none.

    It tells how much the features of a patch changed because other patches were dropped earlier or later, not whether
    the same patches were kept: that is the Jaccard index.
    """
    shared, rows_a, rows_b = np.intersect1d(a.numbers, b.numbers, assume_unique=True, return_indices=True)
    if not len(shared):
        return None
    x, y = a.features[rows_a].astype(np.float64), b.features[rows_b].astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.mean((x * y).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)))


def final_jaccard(kept: Sequence[Kept], reference: Sequence[Kept]) -> float:
    """Mean over samples of the Jaccard index at the end."""
    return float(np.mean([jaccard(a[-1], b[-1]) for a, b in zip(kept, reference, strict=True)]))


def agreement(
    points: Sequence[int], kept: Sequence[Kept], reference: Sequence[Kept], cosines: Sequence[float | None]
) -> dict[str, Any]:
    """Over samples: the Jaccard index after each pruning point and at the end, and the features' cosine.

    Args:
        points: layers of the pruning points.
        kept, reference: of each sample, with the schedule and with adaptive.
        cosines: `feature_cosine` of each sample.
    """
    by_point = [
        {"layer": layer, **mean_and_min([jaccard(a[i], b[i]) for a, b in zip(kept, reference, strict=True)])}
        for i, layer in enumerate(points)
    ]
    final = {name: by_point[-1][name] for name in ("mean", "min")}
    cosine = mean_and_min([value for value in cosines if value is not None])
    return {"kept_jaccard": by_point, "final_jaccard": final, "feature_cosine": cosine}


def clamp_rate(points: Sequence[int], capacities: Sequence[int], reference: Sequence[Kept]) -> dict[str, Any]:
    """Share of samples for which adaptive keeps more than the capacity, at each pruning point and at any of them."""
    counts = np.array([[mask.bit_count() for mask in kept] for kept in reference])  # [samples, points]
    over = counts > np.array(capacities)
    by_point = [
        {"layer": layer, "share": round(float(column.mean()), DIGITS)}
        for layer, column in zip(points, over.T, strict=True)
    ]
    return {"points": by_point, "any": round(float(over.any(axis=1).mean()), DIGITS)}


def mean_and_min(values: Sequence[float]) -> Figures:
    """Rounded; None for both where there are no values."""
    if not values:
        return {"mean": None, "min": None}
    return {"mean": round(float(np.mean(values)), DIGITS), "min": round(float(min(values)), DIGITS)}
