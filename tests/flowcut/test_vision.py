"""The torch tower and projector: against transformers with pruning off, against a float64 tower with pruning on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe
import references
import torch
from conftest import WriteCheckpoint
from references import relative_error

from flowcut.checkpoint import Weights, open_checkpoint
from flowcut.schedule import Schedule, make_schedule
from flowcut.selector import selector
from flowcut.vision import VisionModel, VisionOutput

SIZES = (12, 4, 7)  # layers, heads and patch size of the preset "tiny"; 64 patches
PATCHES, TOKENS, IMAGES = 64, 9, 3
PIXELS = recipe.pixels(56, IMAGES, 5)
OFF = Schedule("off", PATCHES, PATCHES)
SCHEDULES = {
    "adaptive": Schedule("adaptive", PATCHES, TOKENS),
    "static": Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, 9)),
    "masked": Schedule("masked", PATCHES, TOKENS, (64, 64, 64, 64, 9)),
    "masked-tight": Schedule("masked", PATCHES, TOKENS, (62, 50, 50, 20, 9)),
    "reaches-the-budget-early": Schedule("static", PATCHES, TOKENS, (64, 30, 9, 9, 9)),
}
ABLATIONS = ("no-history", "no-semantic", "no-strength")
RULES: dict[str, references.KeepRule] = {
    "adaptive": references.adaptive_rule(12, TOKENS),
    "static": references.constant_rule(12, (50, 41, 30, 20, 9)),
    "masked": references.adaptive_rule(12, TOKENS),
    "masked-tight": references.capped_rule(12, TOKENS, (62, 50, 50, 20, 9)),
    "reaches-the-budget-early": references.constant_rule(12, (64, 30, 9, 9, 9)),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(checkpoint: WriteCheckpoint) -> Path:
    return checkpoint("tiny", seed=4)


@pytest.fixture(scope="module")
def weights(directory: Path) -> Weights:
    return open_checkpoint(directory)


@pytest.fixture(scope="module")
def model(weights: Weights) -> VisionModel:
    return VisionModel.from_weights(weights)


@pytest.fixture(scope="module")
def features(model: VisionModel) -> Callable[..., VisionOutput]:
    def run(schedule: Schedule, pixels: np.ndarray = PIXELS) -> VisionOutput:
        with torch.inference_mode():
            return model.features(torch.from_numpy(pixels), schedule)

    return run


@pytest.fixture(scope="module")
def transformers_model(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()


def test_with_pruning_off_features_are_transformers_hidden_state_minus_2(
    features: Callable[..., VisionOutput], transformers_model: Any
) -> None:
    output = features(OFF)
    with torch.inference_mode():
        tower = transformers_model.model.vision_tower(torch.from_numpy(PIXELS), output_hidden_states=True)
    assert relative_error(output.features, tower.hidden_states[-2][:, 1:]) <= 1e-4
    assert output.kept.tolist() == [list(range(PATCHES))] * IMAGES
    assert output.counts.shape == (IMAGES, 13)
    assert (output.counts == PATCHES).all()


def test_with_pruning_off_embeddings_are_transformers_image_features(
    model: VisionModel, transformers_model: Any
) -> None:
    with torch.inference_mode():
        embeds, _ = model(torch.from_numpy(PIXELS), OFF)
        tower = transformers_model.model.vision_tower(torch.from_numpy(PIXELS), output_hidden_states=True)
        expected = transformers_model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
    assert relative_error(embeds, expected) <= 1e-4


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_float64_tower_image_by_image(
    name: str, weights: Weights, features: Callable[..., VisionOutput]
) -> None:
    output = features(SCHEDULES[name])
    for b, pixels in enumerate(PIXELS):
        expected = references.tower(weights, pixels, SIZES, TOKENS, RULES[name])
        assert output.counts[b].tolist() == expected.counts
        assert output.kept[b].tolist() == expected.kept.tolist()
        assert relative_error(output.features[b], expected.features) <= 1e-4


@pytest.mark.parametrize(
    "schedule",
    [
        *(Schedule("adaptive", PATCHES, TOKENS, (), name) for name in ABLATIONS),
        *(Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, 9), name) for name in ABLATIONS),
        Schedule("masked", PATCHES, TOKENS, (62, 50, 50, 20, 9), "no-history"),
        *(Schedule("static", PATCHES, TOKENS, (TOKENS,), name) for name in ("cls", "grid", "random-3")),
    ],
    ids=lambda s: f"{s.selector}-{s.kind}",
)
def test_every_selector_equals_the_float64_tower(
    schedule: Schedule, weights: Weights, features: Callable[..., VisionOutput]
) -> None:
    output, rule = features(schedule), RULES["masked-tight" if schedule.kind == "masked" else schedule.kind]
    constant = selector(schedule.selector).constant
    scores = () if constant is None else constant(PATCHES, TOKENS)
    for b, pixels in enumerate(PIXELS):
        expected = references.tower(weights, pixels, SIZES, TOKENS, rule, schedule.selector, scores)
        assert output.counts[b].tolist() == expected.counts
        assert output.kept[b].tolist() == expected.kept.tolist()
        assert relative_error(output.features[b], expected.features) <= 1e-4


def test_every_selector_keeps_other_patches(weights: Weights, features: Callable[..., VisionOutput]) -> None:
    """Otherwise the test above would not tell them apart."""
    names = ("flowcut", *ABLATIONS, "cls", "grid", "random-0", "random-1")
    kept = [features(make_schedule("static", weights.config.vision, TOKENS, name)).kept for name in names]
    assert len({tuple(numbers.flatten().tolist()) for numbers in kept}) == len(names)


def test_the_tight_capacities_are_felt(features: Callable[..., VisionOutput]) -> None:
    """Otherwise the test above would say nothing of min(rule, capacity)."""
    full, tight = (features(SCHEDULES[name]).counts for name in ("masked", "masked-tight"))
    assert (tight <= full).all()
    assert (tight[:, 4] == 50).all()  # clamped here
    assert (tight[:, 2] == full[:, 2]).any()  # and not here for every image


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_image_comes_out_the_same_alone_and_in_any_batch(name: str, features: Callable[..., VisionOutput]) -> None:
    batch, other_order = features(SCHEDULES[name]), features(SCHEDULES[name], PIXELS[::-1].copy())
    for b in range(IMAGES):
        alone = features(SCHEDULES[name], PIXELS[b : b + 1])
        for output, at in ((batch, b), (other_order, IMAGES - 1 - b)):
            assert torch.equal(output.kept[at], alone.kept[0])
            assert torch.equal(output.counts[at], alone.counts[0])
            assert relative_error(output.features[at], alone.features[0]) <= 1e-5


@pytest.mark.parametrize("spec", ["adaptive", "static", "masked"])
def test_one_token_can_be_kept(spec: str, weights: Weights, features: Callable[..., VisionOutput]) -> None:
    output = features(make_schedule(spec, weights.config.vision, 1))
    assert output.kept.shape == (IMAGES, 1)
    assert output.features.shape == (IMAGES, 1, 64)
    assert output.counts[:, -1].tolist() == [1] * IMAGES
    rule = references.adaptive_rule(12, 1)
    if spec != "static":
        assert output.kept[0].tolist() == references.tower(weights, PIXELS[0], SIZES, 1, rule).kept.tolist()


def test_one_token_less_than_there_are_can_be_kept(features: Callable[..., VisionOutput]) -> None:
    output = features(Schedule("static", PATCHES, PATCHES - 1, (PATCHES - 1,) * 5))
    assert output.kept.shape == (IMAGES, PATCHES - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_half_precision_runs_and_nearly_agrees(
    name: str, dtype: torch.dtype, weights: Weights, features: Callable[..., VisionOutput]
) -> None:
    low = VisionModel.from_weights(weights, dtype)
    with torch.inference_mode():
        output = low.features(torch.from_numpy(PIXELS).to(dtype), SCHEDULES[name])
        embeds, kept = low(torch.from_numpy(PIXELS).to(dtype), SCHEDULES[name])
    full = features(SCHEDULES[name])
    assert output.features.dtype == embeds.dtype == dtype
    assert embeds.isfinite().all()
    assert torch.equal(kept, output.kept)
    # bfloat16 has three digits: close scores change places
    assert jaccard(output.kept, full.kept) >= (0.9 if dtype == torch.float16 else 0.6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_trace_shrinks_to_what_is_kept(name: str, features: Callable[..., VisionOutput]) -> None:
    output = features(SCHEDULES[name])
    assert [layer for layer, _ in output.trace][-1] <= 9
    for b in range(IMAGES):
        before = set(range(PATCHES))
        for layer, kept in output.trace:
            assert len(kept[b]) == output.counts[b, layer + 1]
            assert set(kept[b].tolist()) <= before
            before = set(kept[b].tolist())
        assert sorted(before) == output.kept[b].tolist()


@pytest.mark.parametrize(("layers", "grid"), [(3, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize("spec", ["adaptive", "static", "masked"])
def test_small_towers(layers: int, grid: int, spec: str, checkpoint: WriteCheckpoint) -> None:
    weights = open_checkpoint(checkpoint("tiny", {"layers": layers, "image": 7 * grid}))
    tokens, pixels = max(1, grid * grid - 1), recipe.pixels(7 * grid, 1)
    with torch.inference_mode():
        schedule = make_schedule(spec, weights.config.vision, tokens)
        output = VisionModel.from_weights(weights).features(torch.from_numpy(pixels), schedule)
    expected = references.tower(weights, pixels[0], (layers, 4, 7), tokens, references.adaptive_rule(layers, tokens))
    assert output.kept[0].tolist() == expected.kept.tolist()
    assert relative_error(output.features[0], expected.features) <= 1e-4


def jaccard(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over images of |A and B| / |A or B|."""
    pairs = [(set(x), set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return sum(len(x & y) / len(x | y) for x, y in pairs) / len(pairs)
