"""Sets of patches as bit masks: bit i stands for patch i. Small in a file, and quick to compare."""

from __future__ import annotations

from collections.abc import Iterable


def to_mask(numbers: Iterable[int]) -> int:
    """The mask of some patch numbers."""
    return sum(1 << int(number) for number in set(numbers))


def jaccard(a: int, b: int) -> float:
    """Shared over all patches of two masks; 1 for two empty ones."""
    return (a & b).bit_count() / (a | b).bit_count() if a | b else 1.0
