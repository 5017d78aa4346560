"""Labels against the rendered pixels; pictures drawn ahead against rendering them now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from flowcut.tiny.drawing import GRID, GROUND, PATCH, PATCHES, SHOWN, UNCLEAR, Labels, draw, labels
from flowcut.tiny.scenes import COLOURS, GLYPHS, MOST, SHAPES, SIZE, Scene, Split, make_scene, render

COUNT = 130  # more than one process draws at once
MARGIN = PATCH  # pixels of a patch: labels count a whole row of those that an outline only touches
FIELDS = tuple(Labels.__dataclass_fields__)


def shown_pixels(scene: Scene) -> np.ndarray:
    """[things, PATCHES] pixels of each thing in each patch: those that change when the thing is recoloured."""
    plain = replace(scene, things=tuple(replace(thing, glyph="") for thing in scene.things))
    picture = np.asarray(render(plain), np.float32)
    counts = []
    for i, thing in enumerate(plain.things):
        other = replace(thing, colour="white" if thing.colour == "black" else "black")
        recoloured = replace(plain, things=(*plain.things[:i], other, *plain.things[i + 1 :]))
        change = np.abs(np.asarray(render(recoloured), np.float32) - picture).max(-1)
        rows, columns = np.nonzero(change > change.max() / 2)
        counts.append(np.bincount(rows // PATCH * GRID + columns // PATCH, minlength=PATCHES))
    return np.stack(counts)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, Labels]:
    directory = tmp_path_factory.mktemp("scenes")
    return directory, *draw(directory, "val", COUNT, Progress(disable=True))


@pytest.mark.parametrize("number", range(12))
def test_a_patch_belongs_to_the_thing_that_it_shows(number: int) -> None:
    scene = make_scene("test", number)
    owner, pixels = labels(scene).owner, shown_pixels(scene)
    most, best = pixels.max(0), pixels.argmax(0)
    clear = most >= SHOWN + MARGIN
    assert clear.sum() > 10
    np.testing.assert_array_equal(owner[clear], best[clear])
    assert np.all(most[owner == UNCLEAR] < SHOWN)
    assert np.all(most[owner == GROUND] == 0)
    near = {tuple(place) for place in np.argwhere(pixels > 0)}
    for patch in np.nonzero(owner >= 0)[0]:
        row, column = divmod(int(patch), GRID)
        around = [(row + y) * GRID + column + x for y in (-1, 0, 1) for x in (-1, 0, 1)]
        assert any((owner[patch], place) in near for place in around)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_patch_of_a_middle_shows_its_thing(split: Split) -> None:
    for number in range(300):
        scene = make_scene(split, number)
        told = labels(scene)
        for i, thing in enumerate(scene.things):
            row, column = divmod(int(told.centre[i]), GRID)
            assert row * PATCH <= thing.y < (row + 1) * PATCH
            assert column * PATCH <= thing.x < (column + 1) * PATCH
            assert told.owner[told.centre[i]] == i


def test_tables_say_what_the_scene_holds() -> None:
    for number in range(100):
        scene, told = make_scene("val", number), labels(make_scene("val", number))
        count = len(scene.things)
        assert [tuple(row) for row in told.table[:count]] == [
            (SHAPES.index(t.shape), tuple(COLOURS).index(t.colour), GLYPHS.find(t.glyph) + 1 if t.glyph else 0)
            for t in scene.things
        ]
        np.testing.assert_allclose(told.place[:count], [(t.x, t.y, t.size) for t in scene.things], rtol=1e-6)
        assert told.table.shape == told.place.shape == (MOST, 3)
        assert np.all(told.table[count:] == -1)
        assert np.all(told.centre[count:] == -1)
        assert np.all(told.place[count:] == 0)


def test_pictures_and_labels_are_in_the_order_of_their_numbers(drawn: tuple[Path, np.ndarray, Labels]) -> None:
    _, pictures, told = drawn
    assert pictures.shape == (COUNT, SIZE, SIZE, 3)
    assert len(told) == COUNT
    for number in (0, 1, 99, 100, COUNT - 1):
        scene = make_scene("val", number)
        np.testing.assert_array_equal(pictures[number], np.asarray(render(scene)))
        expected = labels(scene)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(told, name)[number], getattr(expected, name))


def test_what_is_drawn_is_read_and_not_drawn_again(
    drawn: tuple[Path, np.ndarray, Labels], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, pictures, told = drawn
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    monkeypatch.setattr("flowcut.tiny.drawing.render", None)
    again, told_again = draw(directory, "val", COUNT, Progress(disable=True))
    np.testing.assert_array_equal(again, pictures)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(told_again, name), getattr(told, name))
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_drawing_begins_anew_where_it_was_stopped_on_the_way(tmp_path: Path) -> None:
    """Pictures come first, labels last: without labels nothing on the disk counts."""
    (tmp_path / "val-3.partial").write_bytes(b"half")
    (tmp_path / "val-3.npy").write_bytes(b"of another run")
    pictures, told = draw(tmp_path, "val", 3, Progress(disable=True))
    np.testing.assert_array_equal(pictures[2], np.asarray(render(make_scene("val", 2))))
    assert len(told) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val-3.npy", "val-3.npz"]


def test_another_count_is_drawn_beside(drawn: tuple[Path, np.ndarray, Labels]) -> None:
    directory, pictures, _ = drawn
    fewer, told = draw(directory, "val", 2, Progress(disable=True))
    np.testing.assert_array_equal(fewer, pictures[:2])
    assert len(told) == 2
