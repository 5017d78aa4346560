"""Runs of schedules over pictures, each done once: what the journal has is not computed again.

A sample is an image that the tower sees: a picture, or each tile of one where pictures are cut into tiles (LLaVA-NeXT).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from calib.agreement import feature_cosine
from calib.dataset import Picture, read_picture, tower_pixels
from calib.journal import Entry, Journal
from flowcut.errors import CheckpointError
from flowcut.preprocess import ImageSettings
from flowcut.schedule import Schedule

if TYPE_CHECKING:
    from calib.tower import Run, Tower

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Compared:
    """A schedule on one sample beside adaptive: masks per pruning point, and the features' cosine."""

    kept: tuple[int, ...]
    cosine: float | None


class Runs:
    """Runs over pictures, one at a time."""

    def __init__(self, tower: Tower, settings: ImageSettings, journal: Journal, progress: Progress) -> None:
        self._tower, self._settings, self._journal, self._progress = tower, settings, journal, progress

    def kept(self, pictures: Sequence[Picture], schedule: Schedule, label: str) -> list[tuple[int, ...]]:
        """Of each sample, picture after picture, the masks of kept patches per pruning point."""
        found = []
        for picture in self._each(pictures, label):
            key = f"{picture.sha256} {_name(schedule)}"
            entry = self._journal.get(key)
            if entry is None:
                runs = [self._run(picture, image, schedule) for image in self._images(picture)]
                entry = self._journal.add(key, {"kept": [_to_hex(run.kept) for run in runs]})
            found += _masks(entry)
        return found

    def compared(
        self, pictures: Sequence[Picture], schedules: Sequence[Schedule], adaptive: Schedule, label: str
    ) -> list[list[Compared]]:
        """For each schedule, of each sample, what it kept and how its features compare with adaptive's."""
        rows = [
            self._compare(picture, schedules, adaptive) for picture in self._progress.track(pictures, description=label)
        ]
        return [list(chain.from_iterable(column)) for column in zip(*rows, strict=True)]

    def _each(self, pictures: Sequence[Picture], label: str) -> Iterator[Picture]:
        """The pictures, with a bar that goes when they are done."""
        task = self._progress.add_task(label, total=len(pictures))
        try:
            for picture in pictures:
                yield picture
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def _images(self, picture: Picture) -> list[Pixels]:
        """[1, 3, S, S] of each sample."""
        pixels = tower_pixels(read_picture(picture), self._settings, self._tower.config)
        return np.split(pixels, len(pixels))

    def _compare(self, picture: Picture, schedules: Sequence[Schedule], adaptive: Schedule) -> list[list[Compared]]:
        """Of each schedule, each sample's."""
        keys = [f"{picture.sha256} {_name(schedule)} beside adaptive" for schedule in schedules]
        if not all(self._journal.get(key) for key in keys):
            images = self._images(picture)
            references = [self._run(picture, image, adaptive) for image in images]
            for key, schedule in zip(keys, schedules, strict=True):
                runs = [self._run(picture, image, schedule) for image in images]
                cosines = [feature_cosine(a, b) for a, b in zip(references, runs, strict=True)]
                self._journal.add(key, {"kept": [_to_hex(run.kept) for run in runs], "cosine": cosines})
        entries = [self._journal.get(key) or {} for key in keys]
        return [[Compared(*pair) for pair in zip(_masks(entry), entry["cosine"], strict=True)] for entry in entries]

    def _run(self, picture: Picture, pixels: Pixels, schedule: Schedule) -> Run:
        """Raises CheckpointError that names the picture too."""
        try:
            return self._tower.run(pixels, schedule)
        except CheckpointError as error:
            raise CheckpointError(f"{picture.path}: {error}") from None


def _name(schedule: Schedule) -> str:
    return f"{schedule.kind} {','.join(map(str, schedule.counts))}".rstrip()


def _to_hex(kept: Sequence[int]) -> list[str]:
    return [f"{mask:x}" for mask in kept]


def _masks(entry: Entry) -> list[tuple[int, ...]]:
    """Of each sample."""
    return [tuple(int(mask, 16) for mask in kept) for kept in entry["kept"]]
