"""Stage 1 as a lesson: scenes in, the tower's loss and accuracies out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn

from flowcut.config import VisionConfig
from flowcut.preprocess import ImageSettings
from flowcut.tiny import tower
from flowcut.tiny.drawing import draw

VALIDATION = 256  # scenes


@dataclass(frozen=True)
class MakeTowerLesson:
    """Picklable: see `training.fit`."""

    config: VisionConfig
    settings: ImageSettings
    scenes: Path
    count: int
    fast: bool

    def __call__(self) -> TowerLesson:
        return TowerLesson(self)


class TowerLesson:
    """See training.Lesson."""

    def __init__(self, setup: MakeTowerLesson) -> None:
        quiet = Progress(disable=True)
        self.module: nn.Module = tower.Teacher(setup.config)
        self._net = torch.compile(self.module) if setup.fast else self.module
        self._train = draw(setup.scenes, "train", setup.count, quiet)
        self._val = draw(setup.scenes, "val", VALIDATION, quiet)
        self._mean, self._std = (torch.tensor(x) for x in (setup.settings.mean, setup.settings.std))

    def loss(self, rng: np.random.Generator, batch: int, part: slice) -> Tensor:
        pictures, labels = self._train
        rows = rng.integers(0, len(labels), batch)[part]
        read, told = self._read(pictures, rows)
        wanted = tower.targets(labels, rows)
        return tower.patch_loss(read, wanted) + 2 * sum(tower.cls_loss(t, wanted) for t in told) / len(told)

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        pictures, labels = self._val
        size = 16
        outputs = []
        for start in range(0, VALIDATION, size):
            rows = np.arange(start, start + size)
            read, told = self._read(pictures, rows)
            outputs.append(tower.accuracies(read, told[-2], tower.targets(labels, rows)))
        return {name: sum(o[name] for o in outputs) / len(outputs) for name in outputs[0]}

    def _read(
        self, pictures: NDArray[np.uint8], rows: NDArray[np.int64]
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        patches = tower.to_patches(pictures[rows], self._mean, self._std)
        with torch.autocast("cpu", torch.bfloat16):
            output: tuple[dict[str, Tensor], list[dict[str, Tensor]]] = self._net(patches)
        return output
