"""Calibrations of LLaVA-NeXT: tiles are the tower's samples, pictures are halved, the decoder sees what an engine's
would."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from next_checkpoint import write_next
from PIL import Image
from rich.progress import Progress

from calib.calibration import load_calibration
from calib.groups import linear_layers
from calib.quantize import Quantized, QuantizeSettings, calibrate_quantize
from calib.schedule import Calibrated, ScheduleSettings, calibrate_schedule
from flowcut.aliases import Model, resolve
from flowcut.anyres import choose_tiling
from flowcut.budget import Budget, make_budget
from flowcut.errors import ConfigError, InputError
from flowcut.language import LanguageModel
from flowcut.language_pruning import read
from flowcut.preprocess import ImageSettings, open_image
from flowcut.prompt import Tokenizer, question_prompt
from flowcut.schedule import Schedule, make_schedule
from flowcut.tiles import image_tiles
from flowcut.vision import VisionModel

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"wide.png": (150, 50), "tall.png": (50, 150), "square.png": (120, 120), "low.png": (100, 40)}
TILES = {"wide.png": 4, "tall.png": 4, "square.png": 5, "low.png": 3}
TOKENS = 20
QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Path:
    source = checkpoint(vision={"layers": 6}, text={"layers": 4})
    return write_next(source, tmp_path_factory.mktemp("next") / "seeded")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, size in SIZES.items():
        Image.fromarray(rng.integers(0, 255, (7, 7, 3), np.uint8)).resize(size).save(directory / name)
    return directory


class Asked:
    """The checkpoint, asked directly."""

    def __init__(self, directory: Path, images: Path) -> None:
        self.found: Model = resolve(str(directory))
        self.config, self.images = self.found.config, images
        self.vision = VisionModel.from_weights(self.found.weights)
        size, pinpoints = self.config.vision.image_size, self.config.grid_pinpoints
        self.settings = ImageSettings.from_directory(self.found.files, size, pinpoints)

    def tiles(self, name: str) -> torch.Tensor:
        image = open_image(self.images / name)
        return torch.from_numpy(image_tiles(image, self.settings, choose_tiling(self.config, *image.size)))

    def prompt(self, count: int) -> Any:
        text = self.config.text
        tokenizer = Tokenizer.from_file(self.found.tokenizer, self.config.image_token_id, text.vocab_size)
        return tokenizer.encode(question_prompt(QUESTION, anyres=True), [count], count)


@pytest.fixture(scope="module")
def asked(model: Path, images: Path) -> Asked:
    return Asked(model, images)


def quantize(model: Path, images: Path, out: Path, **more: Any) -> Quantized:
    given: dict[str, Any] = {"precision": "fp8", "questions": (QUESTION,), **more}
    with Progress(disable=True) as progress:
        return calibrate_quantize(QuantizeSettings(str(model), images, out, **given), progress)


def schedule(model: Path, images: Path, out: Path, **more: Any) -> Calibrated:
    with Progress(disable=True) as progress:
        return calibrate_schedule(ScheduleSettings(str(model), images, out, **{"tokens": TOKENS, **more}), progress)


# --- schedule ---


@pytest.fixture(scope="module")
def chosen(model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return schedule(model, images, tmp_path_factory.mktemp("schedule") / "s.json")


def halves(chosen: Calibrated) -> dict[str, list[str]]:
    pictures = chosen.static["calibration"]["pictures"]
    return {half: sorted(p["name"] for p in pictures if p["half"] == half) for half in ("calibration", "held_out")}


def test_halves_are_of_pictures_and_every_tile_is_a_sample(chosen: Calibrated, asked: Asked) -> None:
    assert {name: len(asked.tiles(name)) for name in SIZES} == TILES
    assert sorted(name for names in halves(chosen).values() for name in names) == sorted(SIZES)
    expected = {half: sum(TILES[name] for name in names) for half, names in halves(chosen).items()}
    assert chosen.static["calibration"]["tiles"] == expected == chosen.to_dict()["samples"]
    assert chosen.to_dict()["pictures"] == {"calibration": 2, "held_out": 2}
    assert (chosen.to_dict()["tokens"], chosen.to_dict()["tokens_per_tile"]) == (TOKENS, TOKENS // 2)


def test_constants_are_medians_over_tiles_of_the_calibration_half(chosen: Calibrated, asked: Asked) -> None:
    vision = asked.config.vision
    adaptive = make_schedule("adaptive", vision, TOKENS // 2)
    with torch.inference_mode():
        counts = [
            asked.vision.features(tile[None], adaptive).counts[0].tolist()
            for name in halves(chosen)["calibration"]
            for tile in asked.tiles(name)
        ]
    after = [[row[layer + 1] for row in counts] for layer in adaptive.points(vision.num_hidden_layers)]
    assert chosen.static["counts"] == [int(np.floor(statistics.median(column) + 0.5)) for column in after]
    assert chosen.masked["counts"] == [max(column) for column in after]
    assert (chosen.static["patches"], chosen.static["tokens"]) == (vision.patches, TOKENS // 2)


def test_an_engine_takes_the_file_and_its_budget(chosen: Calibrated, asked: Asked) -> None:
    budget = make_budget(asked.config, None, str(chosen.out))
    assert budget == Budget(TOKENS // 2, TOKENS)
    read_back = make_schedule(str(chosen.out), asked.config.vision, budget.tokens, weights=asked.found.weights)
    assert list(read_back.counts) == chosen.static["counts"]


def test_an_interrupted_run_continues_to_the_same_bytes(
    chosen: Calibrated, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.tower import Tower

    calls, run = list[int](), Tower.run

    def counted(self: Tower, pixels: np.ndarray, schedule: Schedule) -> Any:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return run(self, pixels, schedule)

    monkeypatch.setattr(Tower, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        schedule(model, images, tmp_path / "s.json")
    schedule(model, images, tmp_path / "s.json")
    assert (tmp_path / "s.json").read_bytes() == chosen.out.read_bytes()
    whole = sum(TILES.values()) + 4 * chosen.to_dict()["samples"]["held_out"]  # adaptive; then it and three beside it
    assert whole < len(calls) <= whole + 5, "no more than the interrupted picture's tiles again"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("all", "tokens must be less than the 64 patches of a tile, got 'all': nothing is pruned"),
        (21, "tokens must be even and in 2..126 for LLaVA-NeXT .* got 21"),
        (0, "tokens must be even and in 2..126 for LLaVA-NeXT .* got 0"),
        (128, "tokens must be even and in 2..126 for LLaVA-NeXT .* got 128"),
    ],
)
def test_budgets_that_cannot_be_are_refused(
    tokens: int | str, message: str, model: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule(model, images, tmp_path / "s.json", tokens=tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_line_of_pixels_and_pictures_of_one_tile_are_samples_too(
    checkpoint: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    folder, lone = tmp_path / "images", tmp_path / "lone"
    folder.mkdir()
    (folder / "square.png").write_bytes((images / "square.png").read_bytes())
    Image.new("RGB", (1, 3000)).save(folder / "line.png")
    write_next(checkpoint(vision={"layers": 6}, text={"layers": 4}), lone, pinpoints=[])
    told = schedule(lone, folder, tmp_path / "s.json").to_dict()
    assert told["skipped"] == 0
    assert told["pictures"] == told["samples"] == {"calibration": 1, "held_out": 1}


# --- quantize ---


@contextmanager
def largest_inputs(module: torch.nn.Module, names: Callable[[str], str]) -> Iterator[dict[str, float]]:
    """Of every linear layer whose name `names` returns, the largest absolute input."""
    largest: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(arguments[0].abs().max()))

        return see

    handles = [
        layer.register_forward_pre_hook(hook(ours)) for name, layer in module.named_modules() if (ours := names(name))
    ]
    yield largest
    for handle in handles:
        handle.remove()


def test_unpruned_ranges_are_those_of_transformers(model: Path, images: Path, tmp_path: Path, asked: Asked) -> None:
    from transformers import LlavaNextForConditionalGeneration

    got = quantize(model, images, tmp_path / "c.safetensors", tokens="all")
    theirs = LlavaNextForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    wanted = set(linear_layers(asked.config))

    def ours(name: str) -> str:
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        name = name.replace("vision_tower.encoder", "vision_tower.vision_model.encoder")
        return name if name in wanted else ""

    with largest_inputs(theirs, ours) as largest, torch.inference_mode():
        for name, (width, height) in SIZES.items():
            (visual, _) = asked.vision.see(
                asked.tiles(name),
                choose_tiling(asked.config, width, height),
                make_schedule("static", asked.config.vision, 64),
            )
            theirs(
                input_ids=torch.from_numpy(asked.prompt(len(visual)).input_ids)[None],
                pixel_values=asked.tiles(name)[None],
                image_sizes=torch.tensor([[height, width]]),
            )
    assert got.calibration.ranges == pytest.approx(largest, rel=1e-3)


def test_pruned_the_decoders_ranges_are_of_what_is_left(
    model: Path, images: Path, tmp_path: Path, asked: Asked
) -> None:
    """Against the eager decoder that drops rows, on the pictures' own visual tokens."""
    got = quantize(model, images, tmp_path / "c.safetensors", tokens=TOKENS)
    whole = quantize(model, images, tmp_path / "all.safetensors", tokens="all")
    decoder, static = LanguageModel.from_weights(asked.found.weights), make_schedule("static", asked.config.vision, 10)
    wanted, lengths = set(linear_layers(asked.config)), list[int]()
    with (
        largest_inputs(
            decoder, lambda name: f"language_model.{name}" if f"language_model.{name}" in wanted else ""
        ) as largest,
        torch.inference_mode(),
    ):
        for name, size in SIZES.items():
            visual, _ = asked.vision.see(asked.tiles(name), choose_tiling(asked.config, *size), static)
            prompt = asked.prompt(len(visual))
            ids, rows = (torch.from_numpy(array)[None] for array in (prompt.input_ids, prompt.image_rows))
            reading = read(decoder, decoder.embed(ids, rows, visual[None]), prompt.spans.tolist(), TOKENS)
            assert len(reading.kept[0]) == TOKENS
            lengths.append(len(prompt.input_ids))
    ranges = got.calibration.ranges
    assert largest.keys() == {name for name in ranges if name.startswith("language_model.")}
    assert {name: ranges[name] for name in largest} == pytest.approx(largest, rel=1e-5)
    assert any(ranges[name] != pytest.approx(whole.calibration.ranges[name], rel=1e-3) for name in largest)
    tokens = got.calibration.info["tokens"]
    assert (tokens["visual"], tokens["language"]) == (TOKENS, sum(lengths))
    assert got.calibration.info["llm_tokens"] == TOKENS
    assert "llm_tokens" not in whole.calibration.info


def test_scales_and_ranges_are_of_this_checkpoint(model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    got = quantize(model, images, out, tokens=TOKENS, precision="all")
    again = load_calibration(out, resolve(str(model)).weights)
    assert again.sha256 == got.calibration.sha256
    assert again.scales
    assert json.loads(json.dumps(got.to_dict()))["tokens"]["visual"] == TOKENS


def test_llava_1_5_drops_inside_the_language_model_where_asked(
    checkpoint: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    plain = checkpoint(vision={"layers": 6}, text={"layers": 4})
    got = quantize(plain, images, tmp_path / "a.safetensors", tokens=20, llm_tokens=5).calibration
    whole = quantize(plain, images, tmp_path / "b.safetensors", tokens=20).calibration
    early = [name for name in got.ranges if ".layers.3." not in name and ".layers.2." not in name]
    vision_and_first = [name for name in early if "language_model" not in name or ".layers.0." in name]
    assert {n: got.ranges[n] for n in vision_and_first} == {n: whole.ranges[n] for n in vision_and_first}
    assert got.ranges != whole.ranges
    assert got.info["llm_tokens"] == 5


def test_options_of_the_other_family_are_refused(
    model: Path, checkpoint: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^llm_tokens must not be given for LLaVA-NeXT, got 5\."):
        quantize(model, images, tmp_path / "c.safetensors", llm_tokens=5)
    plain = checkpoint(vision={"layers": 6}, text={"layers": 4})
    with pytest.raises(ConfigError, match=r"^llm_tokens must be in 1\.\.6 .* got 7\."):
        quantize(plain, images, tmp_path / "c.safetensors", tokens=7, llm_tokens=7)
    short = checkpoint(vision={"layers": 6}, text={"layers": 2})
    with pytest.raises(ConfigError, match="decoder_layers must be at least 3"):
        quantize(short, images, tmp_path / "c.safetensors", tokens=7, llm_tokens=3)
    assert list(tmp_path.iterdir()) == []


def test_a_question_too_long_with_the_largest_picture_is_refused(
    model: Path, images: Path, tmp_path: Path, asked: Asked
) -> None:
    most = asked.config.text.max_position_embeddings
    with pytest.raises(InputError, match=f"question must be text of at most {most} tokens with 51 visual ones"):
        quantize(model, images, tmp_path / "c.safetensors", tokens=TOKENS, questions=("why " * most,))
    assert list(tmp_path.iterdir()) == []
