"""LLaVA-NeXT's vision graph: pictures of tiles, packed as docs/algorithm.md 5 says, in shapes that follow no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import recipe
import torch
from conftest import WriteCheckpoint
from next_checkpoint import write_next
from references import relative_error

from export.builder import save
from export.packing import MOST_SLOTS
from export.vision import vision_model
from flowcut.anyres import NO_TOKEN, Tiling, choose_tiling, image_slots, vision_feeds
from flowcut.checkpoint import Weights, open_checkpoint, random_weights
from flowcut.config import LlavaConfig, Precision, TextConfig, VisionConfig
from flowcut.contract import Limits, vision_contract
from flowcut.errors import ConfigError
from flowcut.packing import pack
from flowcut.schedule import Schedule, make_schedule

Arrays = dict[str, np.ndarray]
SIDE, PATCHES = 56, 64
LIMITS = Limits(max_images=4)
# Wide, tall and square pictures of 3 to 5 tiles, with padding of either kind and without.
SIZES = ((112, 40), (33, 101), (112, 112), (100, 70), (56, 112), (400, 150))
SCHEDULES = {
    "off": Schedule("off", PATCHES, PATCHES),
    "static": Schedule("static", PATCHES, 8, (50, 41, 30, 20, 8)),
    "static-odd": Schedule("static", PATCHES, 9, (50, 41, 30, 20, 9)),
    "masked": Schedule("masked", PATCHES, 8, (62, 50, 50, 20, 8)),
    "nearly-all": Schedule("static", PATCHES, 63, (64, 64, 64, 64, 63)),
    "one": Schedule("static", PATCHES, 1, (50, 41, 30, 20, 1)),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return open_checkpoint(write_next(checkpoint("tiny", seed=4), tmp_path_factory.mktemp("next") / "checkpoint"))


@pytest.fixture(scope="module")
def export(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """export(name of a schedule, precision="fp32", trace=True) -> path; each is written once."""
    directory = tmp_path_factory.mktemp("packing")

    @cache
    def path_of(name: str, precision: Precision = "fp32", trace: bool = True) -> Path:
        path = directory / f"{name}-{precision}-{trace}.onnx"
        contract = vision_contract(weights.config, SCHEDULES[name].tokens, precision, LIMITS)
        save(vision_model(weights, contract, SCHEDULES[name], precision, {}, trace), path)
        return path

    return path_of


def run(
    path: Path, config: LlavaConfig, tokens: int, tilings: Sequence[Tiling], pixels: np.ndarray | None = None
) -> Arrays:
    """All outputs for pictures of these pixels, or of seeded ones."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = vision_feeds(config, tokens, tilings)
    dtype = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
    feeds = {
        "pixel_values": (seeded(tilings) if pixels is None else pixels).astype(dtype),
        "tile_places": given.tile_places,
        "image_tiles": given.image_tiles,
        "newline_places": given.newline_places,
    }
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def seeded(tilings: Sequence[Tiling]) -> np.ndarray:
    """The tower's input for pictures of that many tiles."""
    return recipe.pixels(SIDE, sum(each.tiles for each in tilings), 3)


def tilings_of(config: LlavaConfig) -> list[Tiling]:
    """Pictures of SIZES, one of 1 x 1 tiles, and one of the base tile alone."""
    return [
        *(choose_tiling(config, *size) for size in SIZES),
        Tiling(50, 40, 1, 1, SIDE // 7),
        Tiling(300, 20, 0, 0, SIDE // 7),
    ]


def projected(weights: Weights, features: np.ndarray) -> torch.Tensor:
    """What the projector makes of the traced features, in float64."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        w, b = (torch.from_numpy(weights.load(f"multi_modal_projector.{name}.{part}")) for part in ("weight", "bias"))
        return x @ w.double().T + b.double()

    x = linear(torch.from_numpy(features).double(), "linear_1")
    return linear(torch.nn.functional.gelu(x), "linear_2")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_picture_of_a_mixed_batch_is_packed_as_by_itself(
    name: str, weights: Weights, export: Callable[..., Path]
) -> None:
    """Against flowcut.packing, which puts patches back on the grid and crops it."""
    tokens, tilings = SCHEDULES[name].tokens, tilings_of(weights.config)
    got = run(export(name), weights.config, tokens, tilings)
    embeds, newline = projected(weights, got["features"]), torch.from_numpy(weights.load("image_newline")).double()
    first = 0
    for i, each in enumerate(tilings):
        tiles = slice(first, first + each.tiles)
        rows, places = pack(embeds[tiles], torch.from_numpy(got["tile_kept"][tiles]), each, newline)
        count = len(rows)
        assert got["image_lengths"][i] == count
        np.testing.assert_array_equal(got["kept"][i], [*places.tolist(), *[NO_TOKEN] * (got["kept"].shape[1] - count)])
        assert relative_error(got["image_embeds"][i, :count], rows.numpy()) < 1e-5
        first += each.tiles
    assert np.isfinite(got["image_embeds"]).all()


def test_the_pictures_of_these_tests_differ_in_what_matters(weights: Weights) -> None:
    tilings = tilings_of(weights.config)
    assert {each.tiles for each in tilings} == {1, 2, 3, 4, 5}
    padded = {tuple(len(seen) < whole for seen, whole in zip(t.seen, t.grid, strict=True)) for t in tilings[:-1]}
    assert padded == {(False, False), (True, False), (False, True)}


@pytest.mark.parametrize("name", ["static", "off"])
def test_a_picture_is_the_same_alone_and_in_a_batch(name: str, weights: Weights, export: Callable[..., Path]) -> None:
    tilings, tokens = tilings_of(weights.config), SCHEDULES[name].tokens
    pixels, first = seeded(tilings), 0
    together = run(export(name), weights.config, tokens, tilings, pixels)
    for i, each in enumerate(tilings):
        own = pixels[first : first + each.tiles]
        alone = run(export(name), weights.config, tokens, [each], own)
        first += each.tiles
        for output in ("kept", "image_lengths"):
            np.testing.assert_array_equal(together[output][i], alone[output][0])
        count = alone["image_lengths"][0]
        assert relative_error(together["image_embeds"][i, :count], alone["image_embeds"][0, :count]) < 1e-5


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_the_file_declares_the_contract(precision: Precision, weights: Weights, export: Callable[..., Path]) -> None:
    path = export("static", precision, False)
    onnx.checker.check_model(path, full_check=True)
    graph, contract = (
        onnx.load(path, load_external_data=False).graph,
        vision_contract(weights.config, 8, precision, LIMITS),
    )
    for specs, values in ((contract.inputs, graph.input), (contract.outputs, graph.output)):
        found = [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]
        assert found == [(spec.name, list(spec.dims)) for spec in specs]
    (newline,) = (tensor for tensor in graph.initializer if tensor.name == "image_newline")
    assert newline.data_type == (onnx.TensorProto.BFLOAT16 if precision == "bf16" else onnx.TensorProto.FLOAT16)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_form_passes_the_full_check(name: str, trace: bool, export: Callable[..., Path]) -> None:
    onnx.checker.check_model(export(name, "fp32", trace), full_check=True)


def test_pinpoints_of_more_rows_than_tensorrt_sorts_are_refused() -> None:
    text = TextConfig(64, 128, 3, 4, 4, 512)
    largest = LlavaConfig(VisionConfig(), text, 448, grid_pinpoints=((672, 672),))
    assert image_slots(largest, 576) == 2928 <= MOST_SLOTS
    config = LlavaConfig(VisionConfig(), text, 448, grid_pinpoints=((1008, 1008),))
    contract = vision_contract(config, 576, "fp16", LIMITS)
    schedule = make_schedule("static", config.vision, 576)  # all of them: off
    with pytest.raises(ConfigError, match=r"at most 3840 .*, got 5832\. Keep fewer tokens"):
        vision_model(random_weights(config), contract, schedule, "fp16", {})
    kept = vision_contract(config, 80, "fp16", LIMITS)
    vision_model(random_weights(config), kept, make_schedule("static", config.vision, 80), "fp16", {})
