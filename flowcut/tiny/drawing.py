"""Scenes drawn ahead of training: pictures in one memory-mapped file, what they show in another.

Drawing a picture takes longer than the tower takes to learn from it, and each is learnt from several times.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.progress import Progress

from flowcut.atomic import write_file
from flowcut.tiny.scenes import COLOURS, GLYPHS, MOST, OUTLINES, SHAPES, SIZE, Scene, Split, make_scene, render

PATCH = 14
GRID = SIZE // PATCH
PATCHES = GRID * GRID
SHOWN = 12  # pixels of a thing (of 196) that make a patch show it
UNCLEAR = -2  # the patch shows fewer
GROUND = -1


@dataclass(frozen=True)
class Labels:
    """What S pictures show, as far as the renderer knows it. Rows of `table` beyond a scene's things are -1.

    Attributes:
        owner: [S, PATCHES] int8, the thing a patch shows, or GROUND, or UNCLEAR.
        centre: [S, MOST] int16, the patch that holds a thing's middle.
        table: [S, MOST, 3] int8: shape, colour, glyph (0 for none).
        place: [S, MOST, 3] float32: x, y, size in pixels.
    """

    owner: NDArray[np.int8]
    centre: NDArray[np.int16]
    table: NDArray[np.int8]
    place: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.owner)


def labels(scene: Scene) -> Labels:
    """Labels of a single scene, without the leading axis."""
    table, place = np.full((MOST, 3), -1, np.int8), np.zeros((MOST, 3), np.float32)
    centre = np.full(MOST, -1, np.int16)
    for i, t in enumerate(scene.things):
        table[i] = SHAPES.index(t.shape), list(COLOURS).index(t.colour), 1 + GLYPHS.index(t.glyph) if t.glyph else 0
        place[i] = t.x, t.y, t.size
        centre[i] = int(t.y // PATCH) * GRID + int(t.x // PATCH)
    return Labels(_owner(scene), centre, table, place)


def draw(directory: Path, split: Split, count: int, progress: Progress) -> tuple[NDArray[np.uint8], Labels]:
    """Pictures [count, SIZE, SIZE, 3] and labels of the first scenes of a split, from `directory` or drawn into it."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures, told = directory / f"{split}-{count}.npy", directory / f"{split}-{count}.npz"
    if not told.exists():
        _draw(pictures, told, split, count, progress)
    with np.load(told) as data:
        return np.load(pictures, mmap_mode="r"), Labels(**data)


def _draw(pictures: Path, told: Path, split: Split, count: int, progress: Progress) -> None:
    task = progress.add_task(f"draw {count} {split} scenes", total=count)
    partial = pictures.with_suffix(".partial")
    page = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, SIZE, SIZE, 3))
    parts: list[Labels] = []
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        jobs = [(split, range(start, min(start + 100, count))) for start in range(0, count, 100)]
        for (_, numbers), (images, shown) in zip(jobs, pool.map(_some, *zip(*jobs, strict=True)), strict=True):
            page[numbers.start : numbers.stop] = images
            parts.append(shown)
            progress.advance(task, len(numbers))
    page.flush()
    partial.replace(pictures)
    content = io.BytesIO()
    np.savez(content, **_joined(parts))
    write_file(told, content.getvalue())


def _some(split: Split, numbers: range) -> tuple[NDArray[np.uint8], Labels]:
    scenes = [make_scene(split, number) for number in numbers]
    shown = [labels(scene) for scene in scenes]
    images = np.stack([np.asarray(render(scene)) for scene in scenes])
    return images, Labels(*(np.stack([getattr(s, name) for s in shown]) for name in Labels.__dataclass_fields__))


def _joined(parts: list[Labels]) -> dict[str, Any]:
    return {name: np.concatenate([getattr(p, name) for p in parts]) for name in Labels.__dataclass_fields__}


def _owner(scene: Scene) -> NDArray[np.int8]:
    """[PATCHES]: which thing each patch shows, from the shapes' outlines."""
    page = Image.new("L", (SIZE, SIZE), 0)
    pen = ImageDraw.Draw(page)
    for i, t in enumerate(scene.things):
        outline = [(t.x + x * t.size / 2, t.y + y * t.size / 2) for x, y in OUTLINES[t.shape]]
        pen.polygon(outline, fill=i + 1)
    cells = np.asarray(page).reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(PATCHES, -1)
    pixels = np.stack([(cells == i + 1).sum(-1) for i in range(len(scene.things))], -1)  # [PATCHES, things]
    best = pixels.argmax(-1)
    most = pixels.max(-1)
    return np.where(most >= SHOWN, best, np.where(most > 0, UNCLEAR, GROUND)).astype(np.int8)
