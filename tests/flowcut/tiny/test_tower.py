"""The tower in training against transformers and the runtime's tower and preprocessing; targets against the scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import relative_error

from flowcut.config import LlavaConfig
from flowcut.preprocess import ImageSettings, pixel_values
from flowcut.schedule import Schedule
from flowcut.tensors import expected_tensors
from flowcut.tiny import tower
from flowcut.tiny.drawing import GRID, GROUND, PATCH, PATCHES, UNCLEAR, Labels
from flowcut.tiny.scenes import COLOURS, GLYPHS, LARGEST, SHAPES, SIZE, Scene, make_scene, render
from flowcut.tiny.tower import Teacher, Tower
from flowcut.vision import VisionModel

SCENES = 6
PREFIX = "vision_tower.vision_model."

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings(tiny_files: Path) -> ImageSettings:
    return ImageSettings.from_directory(tiny_files, SIZE)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene("val", number) for number in range(SCENES)]


@pytest.fixture(scope="module")
def told(scenes: list[Scene], stack_labels: Callable[[Iterable[Scene]], Labels]) -> Labels:
    return stack_labels(scenes)


@pytest.fixture(scope="module")
def pixels(scenes: list[Scene], settings: ImageSettings) -> torch.Tensor:
    """[SCENES, 3, SIZE, SIZE], by the runtime's preprocessing."""
    return torch.from_numpy(pixel_values([render(scene) for scene in scenes], settings))


@pytest.fixture(scope="module")
def patches(scenes: list[Scene], settings: ImageSettings) -> torch.Tensor:
    pictures = np.stack([np.asarray(render(scene)) for scene in scenes])
    return tower.to_patches(pictures, torch.tensor(settings.mean), torch.tensor(settings.std))


@pytest.fixture(scope="module")
def model(config: LlavaConfig) -> Tower:
    """With weights large enough for every layer to matter."""
    torch.manual_seed(3)
    built = Tower(config.vision).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * torch.randn_like(parameter) if norm else 0.08 * torch.randn_like(parameter))
    return built


@pytest.fixture(scope="module")
def states(model: Tower, patches: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        hidden: list[torch.Tensor] = model(patches)
    return hidden


def transformers_tower(model: Tower) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**asdict(model.config), attn_implementation="eager")
    theirs = transformers.CLIPVisionModel(config)
    inner = getattr(theirs, "vision_model", theirs)  # transformers 4 has one module more
    inner.load_state_dict(model.state_dict())
    return theirs.eval()


def test_every_hidden_state_is_that_of_transformers(
    model: Tower, pixels: torch.Tensor, states: list[torch.Tensor]
) -> None:
    with torch.no_grad():
        theirs = transformers_tower(model)(pixels, output_hidden_states=True)
    assert len(states) == len(theirs.hidden_states) == model.config.num_hidden_layers + 1
    for ours, expected in zip(states[:-1], theirs.hidden_states[:-1], strict=True):
        assert relative_error(ours, expected) < 2e-6
    assert relative_error(states[-1][:, 0], theirs.pooler_output) < 2e-6


def test_features_are_those_of_the_runtime(
    config: LlavaConfig, model: Tower, pixels: torch.Tensor, states: list[torch.Tensor]
) -> None:
    runtime = VisionModel(config).eval()
    own = {n: x for n, x in model.state_dict().items() if f"{PREFIX}{n}" in runtime.state_dict()}
    runtime.vision_tower["vision_model"].load_state_dict(own)
    with torch.no_grad():
        features = runtime.features(pixels, Schedule("off", PATCHES, PATCHES)).features
    assert relative_error(states[-2][:, 1:], features) < 2e-6


def test_names_and_shapes_are_the_checkpoints(config: LlavaConfig, model: Tower) -> None:
    expected = {n: shape for n, shape in expected_tensors(config).items() if n.startswith("vision_tower.")}
    assert {f"{PREFIX}{n}": tuple(x.shape) for n, x in model.state_dict().items()} == expected


def test_patches_are_what_the_convolution_takes(model: Tower, pixels: torch.Tensor, patches: torch.Tensor) -> None:
    assert patches.shape == (SCENES, PATCHES, 3 * PATCH * PATCH)
    unfolded = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
    assert relative_error(patches, unfolded) < 1e-6
    with torch.no_grad():
        expected = model.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        ours = F.linear(patches, model.embeddings.patch_embedding.weight.flatten(1))
    assert relative_error(ours, expected) < 2e-6


def test_targets_of_patches_say_what_the_scenes_show(scenes: list[Scene], told: Labels) -> None:
    wanted = tower.targets(told, np.arange(SCENES))
    for s, scene in enumerate(scenes):
        for patch, owner in enumerate(told.owner[s]):
            read = {n: wanted[n][s, patch] for n in ("shape", "colour", "glyph", "centre", "where", "weight")}
            thing = scene.things[owner] if owner >= 0 else None
            assert read["shape"] == (1 + SHAPES.index(thing.shape) if thing else 0)
            assert read["colour"] == (1 + tuple(COLOURS).index(thing.colour) if thing else 0)
            assert read["glyph"] == (1 + GLYPHS.index(thing.glyph) if thing and thing.glyph else 0)
            holds = [t for t in scene.things if (int(t.y // PATCH) * GRID + int(t.x // PATCH)) == patch]
            assert read["centre"] == len(holds)
            assert (read["weight"] == 0) == (owner == UNCLEAR)
            assert (read["weight"] == 1) == (owner >= 0)
            row, column = divmod(patch, GRID)
            middle = [(column + 0.5) / GRID, (row + 0.5) / GRID]
            np.testing.assert_allclose((read["where"][:2] + 1) / 2, middle, atol=1e-6)
            if thing:
                its = [thing.x / SIZE, thing.y / SIZE, thing.size / LARGEST]
                np.testing.assert_allclose((read["where"][2:] + 1) / 2, its, atol=1e-6)
    assert (told.owner == GROUND).any()
    assert (told.owner == UNCLEAR).any()


def test_targets_of_cls_say_what_the_scenes_hold(scenes: list[Scene], told: Labels) -> None:
    wanted = tower.targets(told, np.arange(SCENES))
    for s, scene in enumerate(scenes):
        pairs = {(SHAPES[i // len(COLOURS)], tuple(COLOURS)[i % len(COLOURS)]) for i in ones(wanted["pairs"][s])}
        assert pairs == {(t.shape, t.colour) for t in scene.things}
        assert {GLYPHS[i] for i in ones(wanted["glyphs"][s])} == {t.glyph for t in scene.things if t.glyph}
        counts = [sum(t.shape == shape for t in scene.things) for shape in SHAPES]
        counts += [sum(t.colour == colour for t in scene.things) for colour in COLOURS]
        assert wanted["counts"][s].tolist() == [min(c, tower.SEVERAL - 1) for c in counts]
        assert wanted["things"][s] == len(scene.things)


def ones(row: torch.Tensor) -> list[int]:
    return row.nonzero().flatten().tolist()


def perfect(wanted: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Readings that are sure, and right."""

    def sure(name: str, classes: int) -> torch.Tensor:
        return 40.0 * F.one_hot(wanted[name], classes).float()

    def switch(name: str) -> torch.Tensor:
        return 40.0 * (2 * wanted[name] - 1)

    read = {n: sure(n, tower.PATCH_PARTS[n]) for n in ("shape", "colour", "glyph")}
    read |= {"centre": switch("centre")[..., None], "where": wanted["where"].float()}
    told = {"pairs": switch("pairs"), "glyphs": switch("glyphs"), "counts": sure("counts", tower.SEVERAL).flatten(1)}
    return read, told | {"things": sure("things", tower.CLS_PARTS["things"])}


def test_right_readings_cost_nothing_and_measure_perfect(told: Labels) -> None:
    wanted = tower.targets(told, np.arange(SCENES))
    read, known = perfect(wanted)
    assert tower.patch_loss(read, wanted).item() < 1e-5
    assert tower.cls_loss(known, wanted).item() < 1e-5
    measured = tower.accuracies(read, known, wanted)
    assert (measured.pop("pixels"), measured.pop("size")) == (0, 0)
    assert measured == dict.fromkeys(measured, 1.0)


def test_measures_are_numbers_where_nothing_is_found(told: Labels) -> None:
    """JSON has no NaN."""
    wanted = tower.targets(told, np.arange(SCENES))
    read, known = perfect(wanted)
    measured = tower.accuracies(read | {"centre": -40 * torch.ones(SCENES, PATCHES, 1)}, known, wanted)
    assert (measured["centre"], measured["centre_precision"]) == (0, 0)


@pytest.mark.parametrize("part", tower.PATCH_PARTS)
def test_every_reading_of_a_patch_matters(part: str, told: Labels) -> None:
    wanted = tower.targets(told, np.arange(SCENES))
    read, _ = perfect(wanted)
    assert tower.patch_loss(read | {part: -read[part]}, wanted).item() > 0.1


@pytest.mark.parametrize("part", tower.CLS_PARTS)
def test_every_reading_of_cls_matters(part: str, told: Labels) -> None:
    wanted = tower.targets(told, np.arange(SCENES))
    _, known = perfect(wanted)
    assert tower.cls_loss(known | {part: -known[part]}, wanted).item() > 0.1


def test_teacher_reads_at_every_depth_and_teaches_every_layer(
    config: LlavaConfig, patches: torch.Tensor, told: Labels
) -> None:
    torch.manual_seed(0)
    teacher = Teacher(config.vision)
    read, depths = teacher(patches)
    assert {n: x.shape for n, x in read.items()} == {
        n: (SCENES, PATCHES, size) for n, size in tower.PATCH_PARTS.items()
    }
    assert len(depths) == len(tower.CLS_DEPTHS) + 2
    for known in depths:
        assert {n: x.shape for n, x in known.items()} == {n: (SCENES, size) for n, size in tower.CLS_PARTS.items()}
    wanted = tower.targets(told, np.arange(SCENES))
    (tower.patch_loss(read, wanted) + sum(tower.cls_loss(k, wanted) for k in depths)).backward()  # type: ignore[no-untyped-call]
    assert [n for n, p in teacher.named_parameters() if p.grad is None or not p.grad.any()] == []
