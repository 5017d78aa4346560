"""Runs of schedules over pictures, each done once: what the journal has is not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from calib.agreement import feature_cosine
from calib.dataset import Picture, read_pixels
from calib.journal import Entry, Journal
from flowcut.errors import CheckpointError
from flowcut.preprocess import ImageSettings
from flowcut.schedule import Schedule

if TYPE_CHECKING:
    from calib.tower import Run, Tower


@dataclass(frozen=True)
class Compared:
    """A schedule on one picture beside adaptive: masks per pruning point, and the features' cosine."""

    kept: tuple[int, ...]
    cosine: float | None


class Runs:
    """Runs over pictures, one at a time."""

    def __init__(self, tower: Tower, settings: ImageSettings, journal: Journal, progress: Progress) -> None:
        self._tower, self._settings, self._journal, self._progress = tower, settings, journal, progress

    def kept(self, pictures: Sequence[Picture], schedule: Schedule, label: str) -> list[tuple[int, ...]]:
        """Of each picture the masks of kept patches per pruning point."""
        found = []
        for picture in self._each(pictures, label):
            key = f"{picture.sha256} {_name(schedule)}"
            entry = self._journal.get(key)
            if entry is None:
                run = self._run(picture, read_pixels(picture, self._settings), schedule)
                entry = self._journal.add(key, {"kept": _to_hex(run.kept)})
            found.append(_masks(entry))
        return found

    def compared(
        self, pictures: Sequence[Picture], schedules: Sequence[Schedule], adaptive: Schedule, label: str
    ) -> list[list[Compared]]:
        """For each schedule, of each picture, what it kept and how its features compare with adaptive's."""
        rows = [
            self._compare(picture, schedules, adaptive) for picture in self._progress.track(pictures, description=label)
        ]
        return [list(column) for column in zip(*rows, strict=True)]

    def _each(self, pictures: Sequence[Picture], label: str) -> Iterator[Picture]:
        """The pictures, with a bar that goes when they are done."""
        task = self._progress.add_task(label, total=len(pictures))
        try:
            for picture in pictures:
                yield picture
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def _compare(self, picture: Picture, schedules: Sequence[Schedule], adaptive: Schedule) -> list[Compared]:
        keys = [f"{picture.sha256} {_name(schedule)} beside adaptive" for schedule in schedules]
        if not all(self._journal.get(key) for key in keys):
            pixels = read_pixels(picture, self._settings)
            reference = self._run(picture, pixels, adaptive)
            for key, schedule in zip(keys, schedules, strict=True):
                run = self._run(picture, pixels, schedule)
                self._journal.add(key, {"kept": _to_hex(run.kept), "cosine": feature_cosine(reference, run)})
        entries = [self._journal.get(key) or {} for key in keys]
        return [Compared(_masks(entry), entry["cosine"]) for entry in entries]

    def _run(self, picture: Picture, pixels: NDArray[np.float32], schedule: Schedule) -> Run:
        """Raises CheckpointError that names the picture too."""
        try:
            return self._tower.run(pixels, schedule)
        except CheckpointError as error:
            raise CheckpointError(f"{picture.path}: {error}") from None


def _name(schedule: Schedule) -> str:
    return f"{schedule.kind} {','.join(map(str, schedule.counts))}".rstrip()


def _to_hex(kept: Sequence[int]) -> list[str]:
    return [f"{mask:x}" for mask in kept]


def _masks(entry: Entry) -> tuple[int, ...]:
    return tuple(int(mask, 16) for mask in entry["kept"])
