"""The pictures that calibration runs over: found, checked whole, and halved by their content.

Every picture is decoded once before anything is computed: which ones take part, and in which half, must not depend on
how far a run came before it met a broken one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from flowcut.anyres import choose_tiling
from flowcut.config import LlavaConfig
from flowcut.errors import ConfigError, InputError
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.tiles import image_tiles

LOG = logging.getLogger("flowcut.calib")
_SHOWN = 3


@dataclass(frozen=True)
class Picture:
    """A usable picture.

    Attributes:
        path: the directory as given, and the name in it.
        name: relative to the directory, with "/": what files record.
        sha256: of the file's bytes.
    """

    path: Path
    name: str
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """The usable pictures of a directory by name, and (name, reason) of each file that was passed over."""

    directory: Path
    pictures: tuple[Picture, ...]
    skipped: tuple[tuple[str, str], ...]


def find_pictures(
    directory: Path,
    limit: int | None = None,
    progress: Progress | None = None,
    check: Callable[[Image.Image], object] | None = None,
) -> Dataset:
    """Pictures in `directory` and its folders, by name; hidden files and folders are not looked at.

    Damaged pictures and copies of earlier ones are skipped, with the reason, and logged as warnings.

    Args:
        limit: stop after so many usable ones.
        check: called with each decoded picture; raises InputError for one that cannot be used.

    Raises:
        ConfigError: a limit below 1; not a readable directory; no picture in it, or none that is whole.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}.")
    files = _picture_files(directory)
    task = None if progress is None else progress.add_task("check pictures", total=limit or len(files))
    usable: dict[str, Picture] = {}  # by sha256
    skipped: list[tuple[str, str]] = []
    for name, path in files:
        if len(usable) == limit:
            break
        try:
            picture = _examine(path, name, usable, check)
            usable[picture.sha256] = picture
        except InputError as error:
            LOG.warning("%s is skipped: %s", path, error)
            skipped.append((name, str(error)))
        if progress is not None and task is not None:
            progress.advance(task)
    if progress is not None and task is not None:
        progress.remove_task(task)
    if not usable:
        raise _none_usable(directory, skipped)
    return Dataset(directory, tuple(usable.values()), tuple(skipped))


def split(pictures: Sequence[Picture]) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """(calibration, held out): the pictures ordered by content hash, every second one held out.

    Names do not matter. Of an odd number the calibration half has one more.

    Raises:
        ConfigError: fewer than two pictures.
    """
    if len(pictures) < 2:
        raise ConfigError(
            f"images must hold at least 2 usable pictures, one to calibrate on and one held out, got {len(pictures)}. "
            "Add pictures, or raise --limit."
        )
    ordered = sorted(pictures, key=lambda picture: picture.sha256)
    return tuple(ordered[::2]), tuple(ordered[1::2])


def tower_pixels(image: Image.Image, settings: ImageSettings, config: LlavaConfig) -> NDArray[np.float32]:
    """What the tower sees of a picture: [1, 3, S, S], and of LLaVA-NeXT [tiles, 3, S, S].

    Raises:
        InputError: a picture so long and narrow that resizing it would take too much memory.
    """
    if config.anyres:
        return image_tiles(image, settings, choose_tiling(config, *image.size))
    return pixel_values([image], settings)


def read_picture(picture: Picture) -> Image.Image:
    """A picture that is still the one that was found.

    Raises:
        InputError: it is not.
    """
    try:
        content = picture.path.read_bytes()
    except OSError as error:
        raise InputError(f"{picture.path} must stay readable, got: {error.strerror}.") from None
    if hashlib.sha256(content).hexdigest() != picture.sha256:
        raise InputError(f"{picture.path} must stay as it was found, got other content. Run the command again.")
    return open_image(content)


def _picture_files(directory: Path) -> list[tuple[str, Path]]:
    """(name, path) of every file that is named as a picture, by name."""
    if not directory.is_dir():
        got = "a file" if directory.is_file() else "nothing"
        raise ConfigError(f"images must be a directory of pictures, got {str(directory)!r}, which is {got} there.")
    suffixes = _suffixes()
    found = [path for path in _visible_files(directory) if path.suffix.lower() in suffixes]
    if not found:
        raise ConfigError(
            f"images must hold a picture (.jpg, .png, .webp or another kind that Pillow reads), got none in "
            f"{str(directory)!r}."
        )
    return sorted((_printable(path.relative_to(directory)), path) for path in found)


def _visible_files(directory: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder) / name for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # a pipe would wait for a writer


def _unreadable(error: OSError) -> None:
    raise ConfigError(f"images must be readable, got {error.filename!r}: {error.strerror}.") from None


def _suffixes() -> set[str]:
    """Suffixes, in lower case, of the kinds of picture that this Pillow opens."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _printable(relative: Path) -> str:
    """A name that any JSON reader and terminal takes, even where the file's is not UTF-8."""
    return os.fsencode(relative.as_posix()).decode(errors="backslashreplace")


def _examine(
    path: Path, name: str, usable: dict[str, Picture], check: Callable[[Image.Image], object] | None
) -> Picture:
    """The picture, decoded to its last row. Messages name no directory: they are recorded.

    Raises:
        InputError: unreadable, a copy of another, damaged, or refused by `check`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"unreadable: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest in usable:
        raise InputError(f"same content as {usable[digest].name}")
    try:
        image = open_image(content)
    except InputError as error:
        unknown = "that Pillow reads" in str(error)  # it would call the picture by no name
        raise InputError("damaged, or not a picture that Pillow reads" if unknown else str(error)) from None
    if check is not None:
        check(image)
    return Picture(path, name, digest)


def _none_usable(directory: Path, skipped: Sequence[tuple[str, str]]) -> ConfigError:
    shown = "; ".join(f"{name} ({reason.rstrip('.')})" for name, reason in skipped[:_SHOWN])
    more = f" (+{len(skipped) - _SHOWN} more)" if len(skipped) > _SHOWN else ""
    return ConfigError(f"images must hold at least one usable picture, got none in {str(directory)!r}: {shown}{more}.")
