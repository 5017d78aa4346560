"""One picture through the vision tower in eager PyTorch: what each pruning point kept, and the features at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calib.patches import to_mask
from flowcut.checkpoint import Weights
from flowcut.errors import CheckpointError
from flowcut.schedule import Schedule
from flowcut.vision import VisionModel, VisionOutput


@dataclass(frozen=True)
class Run:
    """What a schedule did to an image.

    Attributes:
        kept: per pruning point the patches that left it, as a mask (see calib.patches).
        numbers: [T] patch numbers of the rows of `features`.
        features: [T, hidden] float32, hidden state -2 before the projector.
    """

    kept: tuple[int, ...]
    numbers: NDArray[np.int64]
    features: NDArray[np.float32]


class Tower:
    """A checkpoint's vision tower in float32. `config` is the checkpoint's."""

    def __init__(self, weights: Weights) -> None:
        self.config = weights.config
        self._layers = weights.config.vision.num_hidden_layers
        self._model = VisionModel.from_weights(weights)
        for i, layer in enumerate(self._model.get_submodule("vision_tower.vision_model.encoder.layers").children()):
            layer.register_forward_hook(partial(_check_finite, i))

    def run(self, pixels: NDArray[np.float32], schedule: Schedule) -> Run:
        """Prune one image, [1, 3, S, S]: a picture, or a tile of LLaVA-NeXT's.

        Raises:
            CheckpointError: finite weights that make an encoder layer's output infinite or NaN.
        """
        with torch.inference_mode():
            output = self._model.features(torch.from_numpy(pixels), schedule)
        numbers, features = output.kept[0].numpy(), output.features[0].numpy()
        return Run(_kept_per_point(output, schedule, self._layers), numbers, features)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many threads within the block; None leaves the choice to torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_finite(number: int, _layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """A hook of each encoder layer, so that it is named before the pruner meets what it cannot count with."""
    if not torch.isfinite(output).all():
        raise CheckpointError(
            f"output of encoder layer {number} must be finite, got NaN or infinity in float32. Mend the checkpoint."
        )


def _kept_per_point(output: VisionOutput, schedule: Schedule, layers: int) -> tuple[int, ...]:
    """The trace, which leaves out points that had nothing left to drop."""
    traced = {layer: to_mask(numbers[0].tolist()) for layer, numbers in output.trace}
    kept, now = [], to_mask(range(schedule.patches))
    for layer in schedule.points(layers):
        now = traced.get(layer, now)
        kept.append(now)
    return tuple(kept)
