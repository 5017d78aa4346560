"""What `flowcut prune` reads and writes beside pictures: pixels, arrays and pages."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowcut.atomic import write_file
from flowcut.errors import InputError


def read_pixels(path: Path, image_size: int) -> NDArray[np.float32]:
    """Preprocessed pixel_values [B, 3, S, S] from a .npy file.

    Raises:
        InputError: unreadable, not a numeric array of that shape, or not finite.
    """
    try:
        pixels = np.lib.format.open_memmap(path, mode="r")  # looks at the header only, however large the file
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"pixels must be a .npy file, got {str(path)!r}: {reason}.") from None
    if pixels.ndim != 4 or pixels.shape[1:] != (3, image_size, image_size) or not len(pixels):
        raise InputError(
            f"pixels must have the shape [B, 3, {image_size}, {image_size}], got {list(pixels.shape)} in {str(path)!r}."
        )
    if pixels.dtype.kind not in "fiu":
        raise InputError(f"pixels must be real numbers, got {pixels.dtype} in {str(path)!r}.")
    with np.errstate(over="ignore"):  # what does not fit into float32 is found below
        values = np.array(pixels, np.float32, order="C")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise InputError(f"pixels must be finite in float32, got {bad} values that are not in {str(path)!r}.")
    return values


def output_paths(out: Path | None, overlay: Path | None, pictures: int) -> tuple[list[Path], list[Path]]:
    """Where the arrays and where the pages go: none or one, and none or one per picture, numbered if several.

    Raises:
        InputError: a folder that does not exist, or two outputs of one name: known before anything is computed.
    """
    pages = [overlay] if overlay is not None else []
    if overlay is not None and pictures > 1:
        pages = [overlay.with_stem(f"{overlay.stem}-{i}") for i in range(pictures)]
    arrays = [out] if out is not None else []
    for field, paths in (("out", arrays), ("overlay", pages)):
        for path in paths:
            if not path.parent.is_dir() or path.is_dir():
                raise InputError(f"{field} must be a file in an existing directory, got {str(path)!r}.")
    if set(arrays) & set(pages):
        raise InputError(f"out and overlay must be different files, got {str(out)!r} for both.")
    return arrays, pages


def write_outputs(
    arrays: Mapping[str, Any],
    pages: Sequence[Image.Image],
    paths: tuple[Sequence[Path], Sequence[Path]],
) -> list[str]:
    """Write the arrays and the pages to `output_paths`; returns the paths. Nothing is written before all is encoded."""
    contents: dict[Path, bytes] = {}
    for path in paths[0]:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        contents[path] = buffer.getvalue()
    for path, page in zip(paths[1], pages, strict=True):
        buffer = io.BytesIO()
        page.save(buffer, format="PNG")
        contents[path] = buffer.getvalue()
    for path, content in contents.items():
        write_file(path, content)
    return [str(path) for path in contents]
