"""Constants of a static schedule from the counts that adaptive kept, and what --choose may say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from flowcut.errors import ConfigError

Rule = Literal["median", "p90", "max", "flops"]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """How constants follow from adaptive's counts.

    Attributes:
        rule: see `constants`; "flops" is searched for (calib.search).
        share: with "flops", of the unpruned tower's operations, in (0, 1].
    """

    rule: Rule
    share: float = 1.0

    def __str__(self) -> str:
        return f"flops={self.share:g}" if self.rule == "flops" else self.rule

    @staticmethod
    def parse(text: str) -> Choice:
        """What --choose says.

        Raises:
            ConfigError: no such rule, or a share outside (0, 1].
        """
        if found := re.fullmatch(r"flops=([0-9.eE+-]+)", text):
            share = _number(found[1])
            if not 0 < share <= 1:
                raise ConfigError(
                    f"choose must be flops=X with X, a share of the unpruned tower's cost, in (0, 1], got {text!r}."
                )
            return Choice("flops", share)
        for rule in get_args(Rule):
            if text == rule != "flops":
                return Choice(rule)
        raise ConfigError(f"choose must be median, p90, max or flops=X, got {text!r}.")


def constants(counts: Counts, rule: Rule) -> tuple[int, ...]:
    """One count per pruning point from [pictures, points]; they fall, as every picture's do.

    `median`: numpy's, halves rounded up. `p90`: the least count seen that nine tenths of the pictures do not exceed.
    `max`: the largest seen.
    """
    if rule == "median":
        return tuple(int(n) for n in np.floor(np.median(counts, axis=0) + 0.5))
    if rule == "p90":
        return quantile(counts, 0.9)
    if rule == "max":
        return quantile(counts, 1.0)
    raise ConfigError(f"rule must be median, p90 or max, got {rule!r}.")


def quantile(counts: Counts, q: float) -> tuple[int, ...]:
    """Per pruning point the least count seen that a share `q` of the pictures do not exceed."""
    return tuple(int(n) for n in np.quantile(counts, q, axis=0, method="inverted_cdf"))


def spread(counts: Counts, points: Sequence[int]) -> list[dict[str, float]]:
    """Mean, least and greatest count of each pruning point."""
    return [
        {"layer": layer, "mean": round(float(column.mean()), 6), "min": int(column.min()), "max": int(column.max())}
        for layer, column in zip(points, counts.T, strict=True)
    ]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
