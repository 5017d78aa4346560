"""LLaVA-NeXT in torch with pruning off: against transformers' model, from its own processor's pixels to logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WriteCheckpoint
from next_checkpoint import PINPOINTS, write_next
from PIL import Image
from references import relative_error
from torch import Tensor

from flowcut.anyres import Tiling, choose_tiling, vision_feeds
from flowcut.checkpoint import Weights, open_checkpoint
from flowcut.language import KVCache, LanguageModel
from flowcut.schedule import Schedule, make_schedule
from flowcut.vision import VisionModel

PATCHES, IMAGE_TOKEN = 64, 448
OFF = Schedule("off", PATCHES, PATCHES)
SIZES = {  # width, height
    "wide": (300, 100),
    "twice as wide": (200, 100),
    "tall": (100, 310),
    "twice as tall": (100, 200),
    "square": (150, 150),
    "nearly square": (133, 121),
    "a tile's": (56, 56),
    "tiny": (5, 4),
    "one pixel": (1, 1),
    "one pixel wide": (1, 300),
    "one pixel tall": (300, 1),
}

pytestmark = pytest.mark.usefixtures("one_thread")


class Models:
    """One checkpoint, here and in transformers."""

    def __init__(self, directory: Path) -> None:
        transformers = pytest.importorskip("transformers")
        processing = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
        self.processor = processing.LlavaNextImageProcessorPil.from_pretrained(directory)
        auto = transformers.LlavaNextForConditionalGeneration
        self.theirs: Any = auto.from_pretrained(directory, attn_implementation="eager").eval()
        self.weights: Weights = open_checkpoint(directory)
        self.vision = VisionModel.from_weights(self.weights)
        self.language = LanguageModel.from_weights(self.weights)

    def tiling(self, size: tuple[int, int]) -> Tiling:
        return choose_tiling(self.weights.config, *size)

    def see(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Visual tokens [n, D] of one picture."""
        with torch.inference_mode():
            return self.vision.see(pixels, self.tiling(size), OFF)[0]

    def logits(self, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """[1, S, V] with visual tokens [n, D] in place of the n image tokens."""
        rows, length = torch.full_like(input_ids, -1), input_ids.shape[1]
        rows[input_ids == IMAGE_TOKEN] = torch.arange(len(tokens))
        cache = KVCache.allocate(self.language.config, 1, length)
        hidden = self.language(input_ids, torch.arange(length)[None], rows, tokens[None], cache)
        return self.language.logits(hidden)


@pytest.fixture(scope="module")
def models(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(write_next(checkpoint("tiny", seed=2), tmp_path_factory.mktemp("next") / "checkpoint"))


@pytest.fixture(scope="module")
def lone(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A checkpoint whose pictures are the base tile alone."""
    return Models(write_next(checkpoint("tiny", seed=2), tmp_path_factory.mktemp("lone") / "checkpoint", ()))


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    rng = np.random.default_rng([seed, width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def prompt(*visual_tokens: int) -> Tensor:
    """[1, S]: text, then each picture's image tokens and more text."""
    rng = np.random.default_rng(3)
    parts = [rng.integers(3, IMAGE_TOKEN, 5)]
    for count in visual_tokens:
        parts += [np.full(count, IMAGE_TOKEN), rng.integers(3, IMAGE_TOKEN, 7)]
    return torch.from_numpy(np.concatenate(parts))[None]


def test_every_grid_pinpoint_is_tried(models: Models) -> None:
    grids = {(56 * tiling.rows, 56 * tiling.columns) for tiling in map(models.tiling, SIZES.values())}
    assert grids == set(PINPOINTS)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_logits_equal_transformers(size: tuple[int, int], models: Models) -> None:
    inputs = models.processor(picture(size), return_tensors="pt")
    tokens = models.see(inputs["pixel_values"][0], size)
    assert len(tokens) == vision_feeds(models.weights.config, PATCHES, [models.tiling(size)]).rows[0]
    input_ids = prompt(len(tokens))
    with torch.inference_mode():
        theirs = models.theirs(input_ids=input_ids, **inputs).logits
    ours = models.logits(input_ids, tokens)
    assert float((ours - theirs).abs().max()) <= 1e-3
    assert relative_error(ours, theirs) <= 1e-5


def test_logits_equal_transformers_where_a_prompt_has_two_pictures(models: Models) -> None:
    sizes = [SIZES["wide"], SIZES["square"]]
    inputs = models.processor([[picture(size)] for size in sizes], return_tensors="pt")
    seen = [
        models.see(pixels[: models.tiling(size).tiles], size)  # what follows are whole tiles of padding
        for pixels, size in zip(inputs["pixel_values"], sizes, strict=True)
    ]
    input_ids = prompt(*map(len, seen))
    with torch.inference_mode():
        theirs = models.theirs(input_ids=input_ids, **inputs).logits
    assert relative_error(models.logits(input_ids, torch.cat(seen)), theirs) <= 1e-5


def test_a_lone_base_tile_equals_transformers(lone: Models) -> None:
    """transformers chooses among no pinpoints in vain, so its parts are called one by one."""
    pixels, theirs = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 56, 56), np.float32)), lone.theirs
    tokens, input_ids = lone.see(pixels, (90, 60)), prompt(PATCHES + 1)
    with torch.inference_mode():
        tower = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        (packed,), _ = theirs.model.pack_image_features(
            [theirs.model.multi_modal_projector(tower)], [(60, 90)], "default", theirs.model.image_newline
        )
        embeds = theirs.get_input_embeddings()(input_ids)
        embeds[input_ids == IMAGE_TOKEN] = packed
        expected = theirs(inputs_embeds=embeds).logits
    assert relative_error(tokens, packed) <= 1e-5
    assert relative_error(lone.logits(input_ids, tokens), expected) <= 1e-5


def test_the_newline_is_the_checkpoints_own(models: Models) -> None:
    assert torch.equal(models.vision.image_newline, models.theirs.model.image_newline)
    assert float(models.vision.image_newline.abs().max()) > 0


@pytest.mark.parametrize("spec", ["adaptive", "static", "masked"])
def test_pruned_tiles_give_tokens_of_the_unpruned_kind(spec: str, models: Models) -> None:
    """Each tile is pruned alone; what packing makes of that is test_packing's."""
    pixels = models.processor(picture(SIZES["nearly square"]), return_tensors="pt")["pixel_values"][0]
    tiling, schedule = models.tiling(SIZES["nearly square"]), make_schedule(spec, models.weights.config.vision, 20)
    with torch.inference_mode():
        tokens, places = models.vision.see(pixels, tiling, schedule)
        alone = [models.vision(tile[None], schedule) for tile in pixels]
    assert places[:20].tolist() == (2 * alone[0][1][0]).tolist()
    assert relative_error(tokens[:20], alone[0][0][0]) <= 1e-5
    assert (places.diff() > 0).all()
    rows, columns = tiling.seen
    expected = 20
    for tile, (_, kept) in enumerate(alone[1:]):
        r = kept[0] // 8 + 8 * (tile // tiling.columns)
        c = kept[0] % 8 + 8 * (tile % tiling.columns)
        expected += sum(int(a) in rows and int(b) in columns for a, b in zip(r, c, strict=True))
    assert len(tokens) == len(places) == expected
