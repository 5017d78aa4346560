"""What a schedule costs: floating-point operations of the vision tower's layers, from their shapes."""

from __future__ import annotations

from collections.abc import Sequence

from flowcut.config import VisionConfig
from flowcut.schedule import pruning_points


def flops(vision: VisionConfig, counts: Sequence[int] = ()) -> int:
    """Operations per picture in the layers that feed hidden state -2, two per multiply-add.

    The linear layers and the two products of attention are counted. Embedding, norms, activations and scoring are not:
    no schedule changes the first, and together they are about a hundredth.

    Args:
        counts: patches that leave each pruning point; none: nothing is pruned.
    """
    hidden, inner = vision.hidden_size, vision.intermediate_size
    linear = 2 * (4 * hidden * hidden + 2 * hidden * inner)  # q, k, v, out; fc1, fc2: per row
    rows = [n + 1 for n in _entering(vision, counts)]  # CLS
    return sum(n * linear + 4 * n * n * hidden for n in rows)


def flops_share(vision: VisionConfig, counts: Sequence[int]) -> float:
    """`flops` of a schedule over those of the unpruned tower."""
    return flops(vision, counts) / flops(vision)


def least_share(vision: VisionConfig, tokens: int) -> float:
    """The least that `tokens` allow: all surplus goes at the first pruning point."""
    return flops_share(vision, [tokens] * len(pruning_points(vision.num_hidden_layers)))


def _entering(vision: VisionConfig, counts: Sequence[int]) -> list[int]:
    """Patches that enter each of the L - 1 layers that run."""
    points = pruning_points(vision.num_hidden_layers)
    after = dict(zip(points, counts, strict=True)) if counts else {}
    entering, patches = [], vision.patches
    for layer in range(vision.num_hidden_layers - 1):
        entering.append(patches)
        patches = after.get(layer, patches)
    return entering
