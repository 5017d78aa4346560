"""How a benchmark takes time, and what it makes of it. Nothing here knows what is being timed.

Three rules, each with a test of its own (tests/engines/bench/test_timing.py):

    synchronised    the device has finished before a clock is read, at the beginning of a stage and at its end
    turns           subjects take turns within one process, so that whatever slows the machine for a while slows all
                    of them; two go A B, B A, more in an order of their own each round in which none follows itself,
                    with caches still warm, as the others do not; rounds of warm-up come first and are counted nowhere
    Summary, Ratio  order statistics of single runs; a ratio is the median of ratios of runs of the same round
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

WIDEST = 0.10
"""Of a spread. A median whose middle half is wider is said to be uncertain."""
FEW = 6
"""Rounds of which a bootstrapped median's interval can have 95%: 1 - 2 ** (1 - 6) = 97%."""
DRAWS = 2000
"""Of the bootstrap."""


def synchronised(synchronize: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A clock, in seconds, that is read when the device has nothing left to do."""

    def reading() -> float:
        synchronize()
        return now()

    return reading


def turns(subjects: int, warmup: int, repeats: int) -> Iterator[tuple[int, int]]:
    """(round, subject), in the order to run them. Rounds below 0 are warm-up."""
    draw, order = np.random.default_rng(0), list(range(subjects))
    for number in range(-warmup, repeats):
        yield from ((number, subject) for subject in order)
        last = order[-1]
        order = order[::-1] if subjects < 3 else draw.permutation(subjects).tolist()
        if subjects > 2 and order[0] == last:
            order.append(order.pop(0))


@dataclass(frozen=True)
class Summary:
    """Milliseconds of n runs.

    Attributes:
        p90, p99: percentiles, interpolated between runs; of fewer than 100 runs p99 lies between the two slowest.
        spread: (third quartile - first quartile) / median.
    """

    median: float
    p90: float
    p99: float
    min: float
    max: float
    n: int
    spread: float

    @staticmethod
    def of(values: Sequence[float]) -> Summary:
        """Of at least one value."""
        low, median, high, p90, p99 = np.percentile(values, [25, 50, 75, 90, 99]).tolist()
        ends = float(min(values)), float(max(values))
        return Summary(median, p90, p99, *ends, len(values), (high - low) / median if median else 0.0)

    @property
    def wide(self) -> bool:
        """Whether the median may not be trusted to a tenth."""
        return self.spread > WIDEST

    def to_dict(self) -> dict[str, Any]:
        return {name: value if name == "n" else round(value, 4) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Ratio:
    """How many times faster one subject is than another.

    Attributes:
        ratio: median, over rounds, of the other's milliseconds / this one's.
        low, high: its 95% interval, bootstrapped over rounds.
        n: rounds.
        flop_ratio: what it would be if time followed the operations; None where they were not counted.
    """

    ratio: float
    low: float
    high: float
    n: int
    flop_ratio: float | None = None

    @staticmethod
    def of(ours: Sequence[float], theirs: Sequence[float], flop_ratio: float | None = None) -> Ratio:
        """Of milliseconds of the same rounds. Of fewer than FEW rounds no interval has 95%: the range stands for it."""
        pairs = np.divide(theirs, ours)
        if len(pairs) < FEW:
            ends = float(pairs.min()), float(pairs.max())
            return Ratio(float(np.median(pairs)), *ends, len(pairs), flop_ratio)
        draws = np.random.default_rng(0).integers(0, len(pairs), (DRAWS, len(pairs)))
        low, high = np.percentile(np.median(pairs[draws], axis=1), [2.5, 97.5]).tolist()
        return Ratio(float(np.median(pairs)), low, high, len(pairs), flop_ratio)

    @property
    def share_of_flop_ratio(self) -> float | None:
        """1 where time follows the operations."""
        return None if self.flop_ratio is None else self.ratio / self.flop_ratio

    def to_dict(self) -> dict[str, Any]:
        share = self.share_of_flop_ratio
        return {
            **{name: round(getattr(self, name), 4) for name in ("ratio", "low", "high")},
            "n": self.n,
            "flop_ratio": None if self.flop_ratio is None else round(self.flop_ratio, 4),
            "share_of_flop_ratio": None if share is None else round(share, 4),
        }
