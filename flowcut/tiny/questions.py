"""Questions about a scene, each with one right answer of one word. Needs neither torch nor pillow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, get_args

import numpy as np

from flowcut.tiny.scenes import COLOURS, PLACES, SHAPES, Scene, Thing, scene_random

Kind = Literal["color", "shape", "count", "larger", "relation", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LARGER = 1.3  # two sizes are compared when they differ by this factor at least
APART = 14.0  # two positions are compared when they differ by a patch at least, in pixels


@dataclass(frozen=True)
class Question:
    """A question as people would type it, and the word that answers it."""

    kind: Kind
    text: str
    answer: str


def all_questions(scene: Scene) -> list[Question]:
    """Every question that has one answer in this scene."""
    return [*_colour(scene), *_shape(scene), *_count(scene), *_larger(scene), *_relation(scene), *_text(scene)]


def test_questions(scene: Scene) -> list[Question]:
    """One question of each kind, chosen by the scene's seed; first the answer, so that rare ones are asked as often."""
    rng = scene_random(scene, "questions")
    asked = all_questions(scene)
    of_kind = [[q for q in asked if q.kind == kind] for kind in KINDS]
    return [_choose(rng, questions) for questions in of_kind if questions]


def _choose(rng: np.random.Generator, questions: list[Question]) -> Question:
    answers = sorted({q.answer for q in questions})
    answer = answers[rng.integers(len(answers))]
    fitting = [q for q in questions if q.answer == answer]
    return fitting[rng.integers(len(fitting))]


def _names(scene: Scene) -> Iterator[tuple[Thing, list[str]]]:
    """Each thing with the names that mean it alone: always "red circle", and "circle" where there is one circle."""
    shapes = Counter(thing.shape for thing in scene.things)
    for thing in scene.things:
        full = f"{thing.colour} {thing.shape}"
        yield thing, [full, thing.shape] if shapes[thing.shape] == 1 else [full]


def _colour(scene: Scene) -> Iterator[Question]:
    for thing, names in _names(scene):
        yield Question("color", f"What color is the object at the {PLACES[thing.place]}?", thing.colour)
        if thing.shape in names:
            yield Question("color", f"What color is the {thing.shape}?", thing.colour)


def _shape(scene: Scene) -> Iterator[Question]:
    colours = Counter(thing.colour for thing in scene.things)
    for thing in scene.things:
        yield Question("shape", f"What shape is at the {PLACES[thing.place]}?", thing.shape)
        if colours[thing.colour] == 1:
            yield Question("shape", f"What shape is the {thing.colour} object?", thing.shape)


def _count(scene: Scene) -> Iterator[Question]:
    yield Question("count", "How many objects are there?", str(len(scene.things)))
    for colour in COLOURS:
        number = sum(thing.colour == colour for thing in scene.things)
        yield Question("count", f"How many {colour} objects are there?", str(number))
    for shape in SHAPES:
        number = sum(thing.shape == shape for thing in scene.things)
        yield Question("count", f"How many {plural(shape)} are there?", str(number))


def _larger(scene: Scene) -> Iterator[Question]:
    for (a, of_a), (b, of_b) in permutations(_names(scene), 2):
        large = a if a.size > b.size else b
        if a.shape != b.shape and max(a.size, b.size) >= LARGER * min(a.size, b.size):
            yield Question("larger", f"Which is larger, the {of_a[-1]} or the {of_b[-1]}?", large.shape)


def _relation(scene: Scene) -> Iterator[Question]:
    for (a, of_a), (b, of_b) in permutations(_names(scene), 2):
        for axis, words in (("x", ("left of", "right of")), ("y", ("above", "below"))):
            gap = getattr(a, axis) - getattr(b, axis)
            if abs(gap) >= APART:
                text = f"Is the {of_a[-1]} {words[0]} or {words[1]} the {of_b[-1]}?"
                yield Question("relation", text, words[gap > 0].split()[0])


def _text(scene: Scene) -> Iterator[Question]:
    for thing, names in _names(scene):
        if thing.glyph:
            yield from (Question("text", f"What is written on the {name}?", thing.glyph) for name in names)


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")
