"""Questions: an oracle that reads each question's text and looks at the scene agrees with every answer."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import get_args

import pytest

from flowcut.tiny import questions as world  # its function test_questions would be collected as a test
from flowcut.tiny.questions import KINDS, Kind, Question, all_questions
from flowcut.tiny.scenes import COLOURS, GLYPHS, MOST, PLACES, SHAPES, Scene, Split, Thing, make_scene

SPLITS: tuple[Split, ...] = get_args(Split)
SCENES = 300
ASKED = 400  # test scenes, as the evaluation takes them
# What the committed checkpoint's accuracy is measured on: it changes only together with the checkpoint.
PINNED = "beb2f7ce542f13bb704747f7ee27b8646c187afcd468a7bbcd344684a3661ab6"
PATCH = 14  # pixels
ANSWERS: dict[Kind, tuple[str, ...]] = {
    "color": tuple(COLOURS),
    "shape": SHAPES,
    "count": tuple(map(str, range(MOST + 1))),
    "larger": SHAPES,
    "relation": ("left", "right", "above", "below"),
    "text": tuple(GLYPHS),
}
MOST_FREQUENT = {"count": 0.3}  # of others, twice their even share at most


def meant(scene: Scene, name: str) -> Thing:
    """The only thing that a name can mean: "circle", "red circle", "red object" or a place."""
    fits = [t for t in scene.things if name in (t.shape, f"{t.colour} {t.shape}", f"{t.colour} object", place(t))]
    assert len(fits) == 1, f"{name!r} means {len(fits)} things in {scene}"
    return fits[0]


def place(thing: Thing) -> str:
    """From its position alone."""
    row, column = int(thing.y * 3 / 168), int(thing.x * 3 / 168)
    words = f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip()
    return words or "center"


def oracle(scene: Scene, text: str) -> tuple[Kind, str]:
    for pattern, answer in READ.items():
        if found := re.fullmatch(pattern, text):
            return answer(scene, *found.groups())
    raise AssertionError(f"not a known question: {text}")


def colour_of(scene: Scene, name: str) -> tuple[Kind, str]:
    return "color", meant(scene, name).colour


def shape_of(scene: Scene, name: str) -> tuple[Kind, str]:
    return "shape", meant(scene, name).shape


def how_many(scene: Scene, name: str) -> tuple[Kind, str]:
    plurals = {"circles": "circle", "squares": "square", "triangles": "triangle", "diamonds": "diamond"}
    plurals |= {"stars": "star", "crosses": "cross"}
    if name == "objects":
        return "count", str(len(scene.things))
    if name in plurals:
        return "count", str(sum(t.shape == plurals[name] for t in scene.things))
    assert name.removesuffix(" objects") in COLOURS
    return "count", str(sum(t.colour == name.removesuffix(" objects") for t in scene.things))


def larger_of(scene: Scene, one: str, other: str) -> tuple[Kind, str]:
    a, b = meant(scene, one), meant(scene, other)
    assert a.shape != b.shape, "the shape must tell which one is meant"
    small, large = sorted((a, b), key=lambda t: t.size)
    assert large.size / small.size > 1.29, "too close to call"
    return "larger", large.shape


def across(scene: Scene, one: str, other: str) -> tuple[Kind, str]:
    gap = meant(scene, one).x - meant(scene, other).x
    assert abs(gap) >= PATCH, "too close to call"
    return "relation", "left" if gap < 0 else "right"


def upright(scene: Scene, one: str, other: str) -> tuple[Kind, str]:
    gap = meant(scene, one).y - meant(scene, other).y
    assert abs(gap) >= PATCH, "too close to call"
    return "relation", "above" if gap < 0 else "below"


def written_on(scene: Scene, name: str) -> tuple[Kind, str]:
    return "text", meant(scene, name).glyph


READ = {
    r"What color is the object at the ([a-z ]+)\?": colour_of,
    r"What color is the ([a-z]+)\?": colour_of,
    r"What shape is at the ([a-z ]+)\?": shape_of,
    r"What shape is the ([a-z]+ object)\?": shape_of,
    r"How many ([a-z ]+) are there\?": how_many,
    r"Which is larger, the ([a-z ]+) or the ([a-z ]+)\?": larger_of,
    r"Is the ([a-z ]+) left of or right of the ([a-z ]+)\?": across,
    r"Is the ([a-z ]+) above or below the ([a-z ]+)\?": upright,
    r"What is written on the ([a-z ]+)\?": written_on,
}


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    """What the test split asks."""
    return [q for number in range(ASKED) for q in world.test_questions(make_scene("test", number))]


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_what_the_text_asks_for(split: Split) -> None:
    for number in range(SCENES):
        scene = make_scene(split, number)
        for question in all_questions(scene):
            assert (question.kind, question.answer) == oracle(scene, question.text)


def test_no_question_is_asked_twice_of_a_scene() -> None:
    for number in range(SCENES):
        texts = [q.text for q in all_questions(make_scene("train", number))]
        assert len(texts) == len(set(texts))


def test_every_scene_can_be_asked_about_every_thing() -> None:
    """What there is to ask follows from the scene, not from chance: places, and totals of every colour and shape."""
    for number in range(SCENES):
        scene = make_scene("val", number)
        texts = {q.text for q in all_questions(scene)}
        assert sum(text.startswith("How many") for text in texts) == 1 + len(COLOURS) + len(SHAPES)
        for thing in scene.things:
            assert f"What color is the object at the {PLACES[thing.place]}?" in texts
            assert f"What shape is at the {PLACES[thing.place]}?" in texts
            written = f"What is written on the {thing.colour} {thing.shape}?"
            assert (written in texts) == bool(thing.glyph)


def test_a_scene_is_tested_with_one_of_its_questions_of_each_kind() -> None:
    for number in range(SCENES):
        scene = make_scene("test", number)
        every, chosen = all_questions(scene), world.test_questions(scene)
        assert set(chosen) <= set(every)
        assert [q.kind for q in chosen] == [kind for kind in KINDS if any(q.kind == kind for q in every)]
        assert world.test_questions(scene) == chosen


def test_first_scenes_of_the_test_split_make_enough_questions(asked: list[Question]) -> None:
    assert len(asked) >= 2000
    assert all(sum(q.kind == kind for q in asked) >= 300 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_can_be_guessed(kind: Kind, asked: list[Question]) -> None:
    answers = Counter(q.answer for q in asked if q.kind == kind)
    assert answers.keys() == set(ANSWERS[kind])
    limit = MOST_FREQUENT.get(kind, 1.5 / len(ANSWERS[kind]))
    assert max(answers.values()) / answers.total() < limit, answers


def test_test_questions_are_those_of_the_committed_checkpoint(asked: list[Question]) -> None:
    lines = "".join(f"{q.kind} {q.text} {q.answer}\n" for q in asked)
    assert hashlib.sha256(lines.encode()).hexdigest() == PINNED
