"""Runs of schedules over pictures, each done once: what the journal has is not computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from calib.agreement import feature_cosine
from calib.dataset import Picture
from calib.journal import Entry, Journal
from flowcut.errors import InputError
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.schedule import Schedule

if TYPE_CHECKING:
    from calib.tower import Tower


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
                run = self._tower.run(self._pixels(picture), schedule)
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
            pixels = self._pixels(picture)
            reference = self._tower.run(pixels, adaptive)
            for key, schedule in zip(keys, schedules, strict=True):
                run = self._tower.run(pixels, schedule)
                self._journal.add(key, {"kept": _to_hex(run.kept), "cosine": feature_cosine(reference, run)})
        entries = [self._journal.get(key) or {} for key in keys]
        return [Compared(_masks(entry), entry["cosine"]) for entry in entries]

    def _pixels(self, picture: Picture) -> NDArray[np.float32]:
        """[1, 3, S, S] of a picture that is still the one that was found."""
        try:
            content = picture.path.read_bytes()
        except OSError as error:
            raise InputError(f"{picture.path} must stay readable, got: {error.strerror}.") from None
        if hashlib.sha256(content).hexdigest() != picture.sha256:
            raise InputError(f"{picture.path} must stay as it was found, got other content. Run the command again.")
        return pixel_values([open_image(content)], self._settings)


def _name(schedule: Schedule) -> str:
    return f"{schedule.kind} {','.join(map(str, schedule.counts))}".rstrip()


def _to_hex(kept: Sequence[int]) -> list[str]:
    return [f"{mask:x}" for mask in kept]


def _masks(entry: Entry) -> tuple[int, ...]:
    return tuple(int(mask, 16) for mask in entry["kept"])
