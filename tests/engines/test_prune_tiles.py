"""`flowcut prune` for LLaVA-NeXT: every tile pruned, each picture's tiles put together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe
from next_checkpoint import write_next
from PIL import Image
from references import adaptive_rule, tower
from rich.console import Console
from rich.progress import Progress

from engines import report
from engines.prune import PruneSettings, prune
from engines.prune_result import Outcome
from engines.prune_torch import merge
from flowcut.aliases import resolve
from flowcut.anyres import Tiling
from flowcut.errors import ConfigError, InputError
from flowcut.image_settings import ImageSettings
from flowcut.tiles import image_tiles

SIDE, GRID, PATCHES, TOKENS = 56, 8, 64, 24
SIZES = {"square": (90, 80), "wide": (150, 40), "tall": (30, 70), "line": (300, 1)}
GRIDS = {"square": (2, 2), "wide": (1, 3), "tall": (2, 1), "line": (1, 2)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("next")
    recipe.write(root / "plain", *recipe.PRESETS["tiny"])
    return write_next(root / "plain", root / "next")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(8)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / f"{name}.png")
    return {name: root / f"{name}.png" for name in SIZES}


def run(checkpoint: Path, **options: Any) -> Outcome:
    return prune(PruneSettings(str(checkpoint), **{"tokens": TOKENS, **options}), Progress(disable=True))


def put_together(kept: np.ndarray, width: int, height: int, grid: tuple[int, int]) -> list[int]:
    """docs/algorithm.md 5 with a sheet of patches: base first, then the grid row by row without its padding."""
    gh, gw = (n * GRID for n in grid)
    sheet = np.zeros((gh, gw), bool)
    for tile, numbers in enumerate(kept[1:]):
        top, left = tile // grid[1] * GRID, tile % grid[1] * GRID
        for n in numbers:
            sheet[top + n // GRID, left + n % GRID] = True
    if width / height > gw / gh:
        cut = (gh - int(height * gw / width)) // 2
        sheet[:cut] = sheet[gh - cut :] = False
    else:
        cut = (gw - int(width * gh / height)) // 2
        sheet[:, :cut] = sheet[:, gw - cut :] = False
    return [*kept[0].tolist(), *(PATCHES + np.flatnonzero(sheet)).tolist()]


@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_tiles_of_several_pictures_are_put_together(backend: str, checkpoint: Path, pictures: dict[str, Path]) -> None:
    result = run(checkpoint, images=tuple(pictures.values()), backend=backend).to_dict()
    assert result["grids"] == [list(GRIDS[name]) for name in pictures]
    assert result["llm_tokens"] == TOKENS
    assert result["schedule"]["tokens"] == TOKENS // 2
    tiles, first = np.array(result["tile_kept"]), 0
    assert tiles.shape == (5 + 4 + 3 + 3, TOKENS // 2)
    for name, kept in zip(pictures, result["kept"], strict=True):
        rows, columns = GRIDS[name]
        own = tiles[first : first + 1 + rows * columns]
        assert kept == put_together(own, *SIZES[name], (rows, columns))
        first += len(own)


def test_each_tile_is_pruned_as_a_picture_of_its_own(checkpoint: Path, pictures: dict[str, Path]) -> None:
    pruned = run(checkpoint, images=(pictures["wide"],)).pruned
    tiles = image_tiles(Image.open(pictures["wide"]), ImageSettings(SIDE, SIDE), Tiling(150, 40, 1, 3, GRID))
    model = resolve(str(checkpoint))
    vision = model.config.vision
    sizes = (vision.num_hidden_layers, vision.num_attention_heads, vision.patch_size)
    for i, tile in enumerate(tiles):
        rule = adaptive_rule(vision.num_hidden_layers, TOKENS // 2)
        expected = tower(model.weights, tile, sizes, TOKENS // 2, rule)
        np.testing.assert_array_equal(pruned.kept[i], expected.kept)
        np.testing.assert_array_equal(pruned.counts[i], expected.counts)


def test_both_backends_agree_to_the_last_patch(checkpoint: Path, pictures: dict[str, Path]) -> None:
    images = (pictures["square"], pictures["tall"])
    torch, ort = (run(checkpoint, images=images, schedule="masked", backend=b).pruned for b in ("torch", "ort"))
    assert [layer for layer, _ in torch.trace] == [layer for layer, _ in ort.trace]
    for (_, ours), (_, theirs) in zip(torch.trace, ort.trace, strict=True):
        assert [numbers.tolist() for numbers in ours] == [numbers.tolist() for numbers in theirs]
    assert torch.to_dict() == ort.to_dict()


@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_nothing_is_pruned_when_all_tokens_are_kept(backend: str, checkpoint: Path, pictures: dict[str, Path]) -> None:
    outcome = run(checkpoint, images=(pictures["tall"],), tokens="all", backend=backend)
    assert (outcome.to_dict()["llm_tokens"], outcome.schedule.kind) == (None, "off")
    whole = np.tile(np.arange(PATCHES), (3, 1))
    assert outcome.pruned.merged[0].tolist() == put_together(whole, *SIZES["tall"], GRIDS["tall"])


def test_lone_tile_keeps_its_patches(tmp_path: Path, checkpoint: Path, pictures: dict[str, Path]) -> None:
    plain = checkpoint.parent / "plain"
    lone = write_next(plain, tmp_path / "lone", pinpoints=())
    for backend in ("torch", "ort"):
        result = run(lone, images=(pictures["wide"],), backend=backend).to_dict()
        assert result["grids"] == [[0, 0]]
        assert result["kept"] == result["tile_kept"]
        assert len(result["kept"][0]) == TOKENS // 2


def test_files_hold_the_pictures_and_their_tiles(checkpoint: Path, pictures: dict[str, Path], tmp_path: Path) -> None:
    images = (pictures["square"], pictures["line"])
    outcome = run(checkpoint, images=images, out=tmp_path / "a.npz", overlay=tmp_path / "a.png")
    assert outcome.written == [str(tmp_path / name) for name in ("a.npz", "a-0.png", "a-1.png")]
    result = outcome.to_dict()
    with np.load(tmp_path / "a.npz") as data:
        assert sorted(data.files) == ["counts", "features", "grids", "kept", "tile_kept"]
        assert data["grids"].tolist() == result["grids"] == [[2, 2], [1, 2]]
        assert data["features"].shape[:2] == data["tile_kept"].shape == (8, TOKENS // 2)
        assert len(data["counts"]) == 8
        for row, kept in zip(data["kept"], result["kept"], strict=True):
            assert row[: len(kept)].tolist() == kept
            assert (row[len(kept) :] == -1).all()
    assert len(result["kept"][1]) == TOKENS // 2  # of a line of pixels the base tile alone is not padding
    assert json.loads(json.dumps(result)) == result
    assert Image.open(tmp_path / "a-1.png").width > 288


def test_page_of_a_picture_does_not_depend_on_those_beside_it(
    checkpoint: Path, pictures: dict[str, Path], tmp_path: Path
) -> None:
    images = (pictures["square"], pictures["tall"])
    run(checkpoint, images=images, overlay=tmp_path / "both.png")
    for i, image in enumerate(images):
        run(checkpoint, images=(image,), overlay=tmp_path / "alone.png")
        assert (tmp_path / "alone.png").read_bytes() == (tmp_path / f"both-{i}.png").read_bytes()


def test_report_names_every_tile_and_says_where_the_budget_is_reached(
    checkpoint: Path, pictures: dict[str, Path]
) -> None:
    console = Console(record=True, width=100, highlight=False, markup=False)
    outcome = run(checkpoint, images=(pictures["tall"], pictures["line"]))
    report.pruned(console, outcome)
    text = console.export_text()
    for words in ("0 base", "0 r2c1", "1 r1c2", "12 patches of 3 tiles; 24 more were in the padding", "at most 24"):
        assert words in text
    assert "0 r1c2" not in text
    console = Console(record=True, width=100, highlight=False, markup=False)
    report.pruned(console, run(checkpoint, images=(pictures["tall"],), tokens="all"))
    assert f"Nothing is pruned: all {PATCHES} patches of every tile stay." in console.export_text()


def test_tiles_that_are_all_padding_leave_nothing() -> None:
    kept = np.tile(np.arange(3), (3, 1))
    assert [numbers.tolist() for numbers in merge(kept, [Tiling(3000, 1, 1, 2, 2)])] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pixels": Path("tiles.npy")}, r"pixels must not be given for LLaVA-NeXT, got 'tiles\.npy'.* Give --image\."),
        ({"tokens": 25}, r"tokens must be even and in 2\.\.126 for LLaVA-NeXT"),
        ({"tokens": 1}, r"tokens must be even and in 2\.\.126"),
        ({"tokens": 128}, r"tokens must be even and in 2\.\.126"),
    ],
)
def test_options_of_llava_are_refused(options: dict[str, Any], match: str, checkpoint: Path) -> None:
    with pytest.raises((ConfigError, InputError), match=match):
        run(checkpoint, **options)


def test_picture_too_narrow_to_resize_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("1", (1, 2_000_000)).save(tmp_path / "thread.png")
    with pytest.raises(InputError, match=r"image must take at most .* 1 x 2000000 -> 56 x 56"):
        run(checkpoint, images=(tmp_path / "thread.png",))


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[56, 112]]},
            r"must be \[\[56, 112\], .* got \[\[56, 112\]\]",
        ),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "must be LlavaNextImageProcessor"),
        ("config.json", {"image_grid_pinpoints": [[60, 112]]}, r"multiples of 56 .*, got \[60, 112\]"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    name: str, change: dict[str, Any], match: str, checkpoint: Path, pictures: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "next")
    file = tmp_path / "next" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=match):
        run(tmp_path / "next", images=(pictures["wide"],))
