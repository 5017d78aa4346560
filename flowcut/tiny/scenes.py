"""The world of llava-tiny: pictures of up to six coloured shapes, some with a letter or digit, on noisy ground.

Everything follows from (split, number): the same scene on every machine, and no scene in two splits. Needs numpy and
pillow. A scene is a 3 x 3 arrangement of places, at most one thing in each, so that every question has one answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from flowcut.errors import InputError

Split = Literal["train", "val", "test"]
Use = Literal["things", "picture", "questions"]
SIZE = 168  # pixels a side
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
COLOURS = {
    "red": (205, 40, 40),
    "orange": (240, 135, 25),
    "yellow": (240, 220, 50),
    "green": (45, 155, 60),
    "blue": (40, 85, 205),
    "purple": (135, 55, 165),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
GLYPHS = "234578AEHKTX"
MOST = 6  # things in a scene; 3 at least
SMALLEST, LARGEST = 16.0, 48.0  # pixels across
WRITABLE = 32.0  # the smallest thing that carries a glyph
_FINE = 3  # things are drawn this much finer, then reduced
_PLACE = SIZE / 3


@dataclass(frozen=True)
class Thing:
    """One object: `place` is an index into PLACES; `x`, `y`, `size` (its box's side) are pixels; `glyph` may be ''."""

    shape: str
    colour: str
    place: int
    x: float
    y: float
    size: float
    glyph: str = ""


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `number` within `split` decides it."""

    split: Split
    number: int
    things: tuple[Thing, ...]


def make_scene(split: Split, number: int) -> Scene:
    """The scene `number` of a split.

    Raises:
        InputError: no such split, or a negative number.
    """
    if split not in get_args(Split):
        raise InputError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}.")
    if number < 0:
        raise InputError(f"scene number must be 0 or more, got {number}.")
    return Scene(split, number, _things(_random(split, number, "things")))


def scene_random(scene: Scene, use: Use) -> Generator:
    """The scene's own random numbers for one use."""
    return _random(scene.split, scene.number, use)


def render(scene: Scene) -> Image.Image:
    """The picture, SIZE x SIZE RGB."""
    rng = scene_random(scene, "picture")
    page = Image.fromarray(_ground(rng)).resize((SIZE * _FINE,) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(page)
    for thing in scene.things:
        _draw(draw, thing, _tint(rng, thing.colour))
    pixels = np.asarray(page.reduce(_FINE), np.float32) + rng.normal(0, 6, (SIZE, SIZE, 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _random(split: Split, number: int, use: Use) -> Generator:
    return np.random.Generator(np.random.PCG64([get_args(Split).index(split), number, get_args(Use).index(use)]))


def _things(rng: Generator) -> tuple[Thing, ...]:
    """3 to 6 things in different places, no two alike in both shape and colour, one at least with a glyph.

    Half of the scenes draw from few colours and shapes, so that counts above one are common.
    """
    count = int(rng.integers(3, MOST + 1))
    places = rng.permutation(len(PLACES))[:count]
    colours = _palette(rng, list(COLOURS))
    shapes = _palette(rng, list(SHAPES))
    pairs = [(shape, colour) for shape in shapes for colour in colours]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:count]]
    sizes = rng.uniform(SMALLEST, LARGEST, count)
    if sizes.max() < WRITABLE:
        sizes[sizes.argmax()] = rng.uniform(WRITABLE, LARGEST)
    glyphs = ["" if size < WRITABLE else str(rng.choice(list(GLYPHS))) for size in sizes]
    order = sorted(range(count), key=lambda i: places[i])
    return tuple(_thing(rng, chosen[i], int(places[i]), float(sizes[i]), glyphs[i]) for i in order)


def _palette(rng: Generator, names: list[str]) -> list[str]:
    """All names, or three of them."""
    return names if rng.random() < 0.5 else [names[i] for i in rng.permutation(len(names))[:3]]


def _thing(rng: Generator, kind: tuple[str, str], place: int, size: float, glyph: str) -> Thing:
    room = (_PLACE - size) / 2 - 1
    x, y = ((n + 0.5) * _PLACE + rng.uniform(-room, room) for n in (place % 3, place // 3))
    return Thing(*kind, place, x, y, size, glyph)


def _ground(rng: Generator) -> np.ndarray:
    """Grey with a tint, slow waves, and a grain of coloured blotches: [SIZE, SIZE, 3] uint8."""
    base = rng.uniform(95, 165) + rng.uniform(-14, 14, 3)
    image = np.broadcast_to(base.astype(np.float32), (SIZE, SIZE, 3)).copy()
    image += _blotches(rng, 4, 22, Image.Resampling.BICUBIC) + _blotches(rng, 42, 9, Image.Resampling.NEAREST)
    angle, wave = rng.uniform(0, math.pi), rng.uniform(0.08, 0.5)
    across, down = np.arange(SIZE) * (wave * math.cos(angle)), np.arange(SIZE) * (wave * math.sin(angle))
    image += (rng.uniform(0, 12) * np.sin(across + down[:, None]).astype(np.float32))[..., None]
    return image.clip(0, 255).astype(np.uint8)


def _blotches(rng: Generator, cells: int, strength: float, resample: Image.Resampling) -> np.ndarray:
    """Coloured noise, mostly grey, of cells x cells blotches."""
    coarse = rng.normal(0, strength, (cells, cells, 4)).astype(np.float32)
    planes = [Image.fromarray(coarse[..., 3] + 0.4 * coarse[..., i]).resize((SIZE, SIZE), resample) for i in range(3)]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def _tint(rng: Generator, colour: str) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(c + rng.normal(0, 9), 0, 255)) for c in COLOURS[colour])
    return r, g, b


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, tint: tuple[int, int, int]) -> None:
    x, y, half = thing.x * _FINE, thing.y * _FINE, thing.size / 2 * _FINE
    outline = OUTLINES[thing.shape]
    draw.polygon([(x + px * half, y + py * half) for px, py in outline], fill=tint)
    if thing.glyph:
        ink = (20, 20, 20) if sum(tint) > 380 else (250, 250, 250)
        draw.text((x, y + _LOWERED.get(thing.shape, 0) * half), thing.glyph, ink, _font(), anchor="mm")


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(17 * _FINE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError("Pillow must have FreeType to draw scenes, got a build without it. Reinstall pillow.")
    return font


def _ring(points: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Points on the unit circle, from the top; every second one at `inner`."""
    step = 2 * math.pi / points
    return [
        (math.sin(i * step) * (inner if i % 2 else 1), -math.cos(i * step) * (inner if i % 2 else 1))
        for i in range(points)
    ]


def _cross(arm: float) -> list[tuple[float, float]]:
    """A plus sign, from its top left corner round."""
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _ring(48),
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "star": _ring(10, 0.5),
    "cross": _cross(0.36),
}
"""Corners of each shape in a box from -1 to 1."""
_LOWERED = {"triangle": 0.35}  # where there is room for a glyph
