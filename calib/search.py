"""The schedule that agrees best with adaptive within a budget of operations: a search, not a proof.

Candidates come from families of one parameter, each fitted to the budget. Those closest to adaptive's counts are tried
on the pictures, and the best of them is improved point by point. The result is the best of what was tried; a better
schedule may exist. Nothing is random: the same counts and scores give the same schedule.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np

from calib.choice import Counts, constants, quantile
from calib.flops import flops_share, least_share
from flowcut.config import VisionConfig
from flowcut.errors import ConfigError
from flowcut.schedule import closed_form

LOG = logging.getLogger("flowcut.calib")
Constants = tuple[int, ...]
Family = Callable[[float], Constants]
"""From [0, 1] to schedules whose operations do not fall."""
TRIED_FIRST = 6
"""Candidates that are run over the pictures."""
REFINEMENTS = 24
"""Changes to the best of them that are run over the pictures."""
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_HALVINGS = 50


def best_within(
    vision: VisionConfig, tokens: int, share: float, adaptive: Counts, score: Callable[[Constants], float]
) -> Constants:
    """The best schedule found whose operations are at most `share` of the unpruned tower's.

    Args:
        adaptive: [pictures, points] counts that adaptive kept.
        score: agreement of a schedule with adaptive; called at most TRIED_FIRST + REFINEMENTS times.

    Raises:
        ConfigError: a share that no schedule meets.
    """
    check_share(vision, tokens, share)
    return _Search(vision, tokens, share, score).run(adaptive)


def check_share(vision: VisionConfig, tokens: int, share: float) -> None:
    """Raise ConfigError, naming the least that there is, for a share of operations that no schedule meets."""
    if (least := least_share(vision, tokens)) > share:
        raise ConfigError(
            f"choose must be flops=X with X at least {math.ceil(least * 1e4) / 1e4:g} for {tokens} of "
            f"{vision.patches} patches, got flops={share:g}: layers before the first pruning point see all patches. "
            "Raise X, or lower --tokens."
        )


class _Search:
    def __init__(self, vision: VisionConfig, tokens: int, share: float, score: Callable[[Constants], float]) -> None:
        self._vision, self._tokens, self._surplus = vision, tokens, vision.patches - tokens
        self._share, self._score = share, score

    def run(self, adaptive: Counts) -> Constants:
        mean = adaptive.mean(axis=0)
        near = sorted(self._candidates(adaptive), key=lambda counts: float(np.abs(np.array(counts) - mean).sum()))
        scored = {counts: self._score(counts) for counts in near[:TRIED_FIRST]}
        best = max(scored, key=lambda counts: scored[counts])  # of equals the one nearer to adaptive
        LOG.info("of %d candidates %s agrees best: %.4f", len(near), list(best), scored[best])
        return self._refine(best, scored)

    def _within(self, counts: Constants) -> bool:
        return flops_share(self._vision, counts) <= self._share

    def _candidates(self, adaptive: Counts) -> list[Constants]:
        """Distinct schedules within the budget, in a fixed order."""
        found = [quantile(adaptive, q) for q in _QUANTILES]
        for family in self._families(adaptive):
            found.append(self._fitted(family))
        return [counts for counts in dict.fromkeys(found) if self._within(counts)]

    def _families(self, adaptive: Counts) -> Iterator[Family]:
        """Three shapes, each raised to powers and scaled, and the closed form with other entropy ratios.

        A scale of 0 drops all surplus at the first point, so some candidate meets every budget that can be met.
        """
        points = adaptive.shape[1]
        ramp = tuple(self._tokens + self._surplus * (points - 1 - i) // points for i in range(points))
        for base in (constants(adaptive, "median"), closed_form(self._vision, self._tokens), ramp):
            shape = (np.array(base) - self._tokens) / self._surplus
            yield lambda t, shape=shape: self._counts(shape ** ((1 - t) / max(t, 1e-9)))  # type: ignore[misc]
            yield lambda t, shape=shape: self._counts(shape * (t / max(1 - t, 1e-9)))  # type: ignore[misc]
        yield lambda t: closed_form(self._vision, self._tokens, t)

    def _counts(self, shape: np.ndarray) -> Constants:
        """Counts of a shape, the share of the surplus that is left after each point."""
        counts = self._tokens + np.floor(self._surplus * shape.clip(0, 1) + 0.5).astype(int)
        return (*(int(n) for n in counts[:-1]), self._tokens)

    def _fitted(self, family: Family) -> Constants:
        """The member with the most operations within the budget; over it if all are."""
        low, high = 0.0, 1.0
        if self._within(family(high)):
            return family(high)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._within(family(middle)) else (low, middle)
        return family(low)

    def _refine(self, best: Constants, scored: dict[Constants, float]) -> Constants:
        """Move one point, let the others pay for it or have what it frees, and keep what agrees better."""
        limit = len(scored) + REFINEMENTS
        for step in (max(1, self._surplus // 8), max(1, self._surplus // 32)):
            for point in range(len(best) - 1):
                for change in (step, -step):
                    moved = self._moved(best, point, change)
                    if moved in scored or not self._within(moved) or len(scored) == limit:
                        continue
                    scored[moved] = self._score(moved)
                    best = moved if scored[moved] > scored[best] else best
        LOG.info("after %d trials %s agrees best: %.4f", len(scored), list(best), scored[best])
        return best

    def _moved(self, counts: Constants, point: int, change: int) -> Constants:
        """`counts` with one point changed and the others scaled to the budget; those beside it stay monotonic."""
        pinned = min(max(counts[point] + change, self._tokens), self._vision.patches)
        shape = (np.array(counts) - self._tokens) / self._surplus

        def scaled(t: float) -> Constants:
            others = self._counts(shape * (t / max(1 - t, 1e-9)))
            before, after = others[:point], others[point + 1 :]
            return (*(max(n, pinned) for n in before), pinned, *(min(n, pinned) for n in after))

        return self._fitted(scaled)
