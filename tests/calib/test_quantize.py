"""`calibrate quantize` on a small checkpoint: its figures are transformers', an interruption changes no byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress
from safetensors.numpy import load_file, save_file

from calib import measure
from calib.calibration import load_calibration
from calib.groups import groups, linear_layers
from calib.quantize import QUESTIONS, Quantized, QuantizeSettings, calibrate_quantize
from flowcut.aliases import ASSETS, resolve
from flowcut.errors import CheckpointError, ConfigError, InputError
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.prompt import Tokenizer, question_prompt

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vision": {"layers": 4}, "text": {"layers": 3}}
QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Path:
    """A seeded checkpoint with the stand-in's settings, whose tokenizer has 512 tokens."""
    directory = tmp_path_factory.mktemp("model") / "seeded"
    directory.mkdir()
    for file in checkpoint(**SIZES).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 255, (7, 7, 3), np.uint8))
        coarse.resize((70, 60)).save(directory / f"{i}.png")
    return directory


@pytest.fixture(scope="module")
def plain(model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Calibrated in one go."""
    return run(model, images, tmp_path_factory.mktemp("plain") / "c.safetensors")


def run(model: Path, images: Path, out: Path, **more: Any) -> Quantized:
    with Progress(disable=True) as progress:
        return calibrate_quantize(QuantizeSettings(str(model), images, out, **more), progress)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_layer_has_a_range_and_every_group_a_scale(plain: Quantized, model: Path) -> None:
    weights = resolve(str(model)).weights
    read = load_calibration(plain.out, weights)
    assert read.ranges.keys() == set(linear_layers(weights.config))
    assert read.scales.keys() == {group.name for group in groups(weights.config)}
    assert read.sha256 == plain.calibration.sha256
    assert left(plain.out.parent) == ["c.safetensors"]


def test_no_group_gets_worse(plain: Quantized) -> None:
    errors = plain.calibration.info["errors"]
    assert errors.keys() == plain.calibration.scales.keys()
    assert all(0 < error["after"] <= error["before"] < 0.3 for error in errors.values())
    assert any(error["after"] < error["before"] for error in errors.values())


def test_file_says_where_it_comes_from(plain: Quantized, model: Path) -> None:
    info = plain.calibration.info
    assert [picture["name"] for picture in info["pictures"]] == ["0.png", "1.png", "2.png"]
    assert all(len(picture["sha256"]) == 64 for picture in info["pictures"])
    assert info["questions"] == list(QUESTIONS)
    assert info["schedule"]["kind"] == "static"
    assert info["weights"] == "checkpoint"
    assert {"torch", "numpy", "pillow", "flowcut-trt"} <= info["versions"].keys()
    tokens = info["tokens"]
    assert tokens["visual"] == info["schedule"]["tokens"]
    assert 3 * tokens["visual"] < tokens["compared"] == tokens["language"]


def test_ranges_are_those_of_transformers(model: Path, images: Path, tmp_path: Path) -> None:
    """Unpruned, on the same pictures and prompt, the largest input that hooks on transformers' layers see."""
    got = run(model, images, tmp_path / "c.safetensors", tokens="all", precision="fp8", questions=(QUESTION,))
    assert got.calibration.ranges == pytest.approx(transformers_ranges(model, images), rel=1e-3)


def transformers_ranges(model: Path, images: Path) -> dict[str, float]:
    from transformers import LlavaForConditionalGeneration

    theirs = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    largest: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(arguments[0].abs().max()))

        return see

    wanted = set(linear_layers(resolve(str(model)).config))
    for name, layer in theirs.named_modules():
        ours = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        ours = ours.replace("vision_tower.encoder", "vision_tower.vision_model.encoder")
        if ours in wanted:
            layer.register_forward_pre_hook(hook(ours))
    found = resolve(str(model))
    patches = found.config.vision.patches
    settings = ImageSettings.from_directory(found.files, found.config.vision.image_size)
    tokenizer = Tokenizer.from_file(found.tokenizer, found.config.image_token_id, found.config.text.vocab_size)
    prompt = tokenizer.encode(question_prompt(QUESTION), [patches], patches)
    for path in sorted(images.iterdir()):
        pixels = torch.from_numpy(pixel_values([open_image(path)], settings))
        with torch.inference_mode():
            theirs(input_ids=torch.from_numpy(prompt.input_ids)[None], pixel_values=pixels)
    return largest


def test_same_inputs_same_bytes(plain: Quantized, model: Path, images: Path, tmp_path: Path) -> None:
    again = run(model, images, tmp_path / "other name.safetensors")
    assert again.out.read_bytes() == plain.out.read_bytes()


@pytest.mark.parametrize(
    ("function", "before"),
    [("_see", 2), ("search", 3), ("_run_layer", 0), ("_run_layer", 2), ("_embedded", 0)],
    ids=["second picture", "tower's scales", "first layer", "last layer", "after the tower"],
)
def test_interrupted_it_resumes_and_gives_the_same_bytes(
    plain: Quantized,
    model: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    before: int,
) -> None:
    out, calls, real = tmp_path / "c.safetensors", list[str](), getattr(measure, function)

    def counted(*arguments: Any) -> Any:
        calls.append(function)
        if len(calls) > before:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(measure, function, counted)
        with pytest.raises(KeyboardInterrupt):
            run(model, images, out)
    assert not out.exists()
    layers, see, run_layer = list[int](), list[object](), measure._run_layer
    monkeypatch.setattr(measure, "_run_layer", lambda bench, i, *rest: layers.append(i) or run_layer(bench, i, *rest))
    monkeypatch.setattr(measure.VisionModel, "forward", counting(measure.VisionModel.forward, see))
    assert run(model, images, out).out.read_bytes() == plain.out.read_bytes()
    assert left(tmp_path) == ["c.safetensors"]
    assert len(layers) == 3 - (before if function == "_run_layer" else 0)
    assert len(see) == (1 if function == "_see" else 0)


def counting(function: Callable[..., Any], calls: list[object]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        calls.append(function)
        return function(*arguments)

    return counted


def test_what_is_left_of_other_inputs_is_not_taken(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(measure, "_embedded", counting_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, images, out, tokens=7, precision="fp8")
    assert left(tmp_path) == [".c.safetensors.partial"]
    for file in (tmp_path / ".c.safetensors.partial").iterdir():
        file.write_bytes(file.read_bytes()[:-5] if "vision-" in file.name else file.read_bytes())
    again = run(model, images, out, tokens=9, precision="fp8")
    clean = run(model, images, tmp_path / "d.safetensors", tokens=9, precision="fp8")
    assert again.out.read_bytes() == clean.out.read_bytes()


def counting_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_fp8_alone_searches_no_scales(model: Path, images: Path, tmp_path: Path, plain: Quantized) -> None:
    got = run(model, images, tmp_path / "c.safetensors", precision="fp8").calibration
    assert (got.scales, got.info["errors"]) == ({}, {})
    assert got.ranges == plain.calibration.ranges


def test_int4_alone_keeps_no_ranges(model: Path, images: Path, tmp_path: Path, plain: Quantized) -> None:
    got = run(model, images, tmp_path / "c.safetensors", precision="int4").calibration
    assert got.ranges == {}
    assert all(np.array_equal(scale, plain.calibration.scales[name]) for name, scale in got.scales.items())


def test_broken_pictures_are_listed_and_order_follows_from_content(
    model: Path, images: Path, tmp_path: Path, plain: Quantized
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, source in (("z", "0"), ("y", "1"), ("x", "2")):
        (folder / f"{name}.png").write_bytes((images / f"{source}.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no picture")
    got = run(model, folder, tmp_path / "c.safetensors").calibration
    assert [item["name"] for item in got.info["skipped"]] == ["broken.png"]
    assert got.ranges == plain.calibration.ranges
    assert got.info["errors"] == plain.calibration.info["errors"]


def test_questions_and_tokens_decide(model: Path, images: Path, tmp_path: Path, plain: Quantized) -> None:
    got = run(model, images, tmp_path / "c.safetensors", precision="fp8", tokens=20, questions=("Why?", "How many?"))
    assert got.calibration.info["questions"] == ["Why?", "How many?"]
    assert got.calibration.info["tokens"]["visual"] == 20
    assert got.calibration.ranges != plain.calibration.ranges


def test_pruned_patches_take_no_part(model: Path, images: Path, tmp_path: Path) -> None:
    """Of few kept patches late layers see less than of all; the first layer sees all the same."""
    few, every = (
        run(model, images, tmp_path / f"{n}.safetensors", precision="fp8", tokens=n).calibration.ranges
        for n in (1, "all")
    )
    name = "vision_tower.vision_model.encoder.layers.{}.mlp.fc2"
    assert few[name.format(0)] == every[name.format(0)]
    assert few[name.format(2)] < every[name.format(2)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", "layers.1.mlp.fc1.weight must be finite"),
        ("language_model.model.layers.2.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight must be finite"),
        ("language_model.model.embed_tokens.weight", "embed_tokens.weight must be finite"),
    ],
)
def test_nan_is_named(model: Path, images: Path, tmp_path: Path, name: str, said: str) -> None:
    broken = with_tensor(model, tmp_path / "broken", name, np.nan)
    with pytest.raises(CheckpointError, match=said):
        run(broken, images, tmp_path / "c.safetensors", precision="fp8")
    assert not (tmp_path / "c.safetensors").exists()


def test_overflow_is_named(model: Path, images: Path, tmp_path: Path) -> None:
    broken = with_tensor(model, tmp_path / "broken", "language_model.model.layers.1.mlp.down_proj.weight", 3e38)
    with pytest.raises(CheckpointError, match=r"output of language_model\.model\.layers\.1 must be finite in float32"):
        run(broken, images, tmp_path / "c.safetensors", precision="fp8")


def with_tensor(model: Path, to: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint, one tensor all `value`."""
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    for file in to.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = np.full_like(tensors[name], value)
            save_file(tensors, file, {"format": "pt"})
            return to
    raise AssertionError(f"no {name}")


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"limit": 0}, ConfigError, r"limit must be at least 1, got 0\."),
        ({"threads": 0}, ConfigError, r"threads must be at least 1, got 0\."),
        ({"precision": "int8"}, ConfigError, r"precision must be one of int4, fp8, all, got 'int8'\."),
        ({"tokens": 65}, ConfigError, r"tokens must be in 1\.\.64"),
        ({"decoder_layers": 9}, ConfigError, r"decoder_layers must be in 1\.\.3, got 9\."),
        ({"questions": (" ",)}, InputError, r"question must be text of at most \d+ tokens .*, got ' '"),
        ({"questions": ("what " * 5000,)}, InputError, r"question must be text of at most \d+ tokens"),
        ({"questions": ("<image> and?",)}, InputError, r"prompt must have one <image> for each image \(1\), got 2\."),
        ({"out": Path("c.json")}, ConfigError, r"out must be a \.safetensors file in an existing directory"),
        ({"out": Path("absent/c.safetensors")}, ConfigError, r"out must be a \.safetensors file in an existing"),
        ({"images": Path("absent")}, ConfigError, r"images must be a directory of pictures, got 'absent'"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_settings_that_do_not_fit_are_refused_before_anything_runs(
    model: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure.VisionModel, "from_weights", counting_interrupt)
    given = {"images": images, "out": Path("c.safetensors")} | more
    with pytest.raises(error, match=said):
        run(model, **given)
    assert left(tmp_path) == []


def test_int4_of_a_width_that_no_block_divides_is_refused(
    checkpoint: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    odd = checkpoint(vision={"layers": 4, "mlp": 96, "hidden": 96}, text={"layers": 1})
    with pytest.raises(ConfigError, match=r"inputs of a layer in int4 must be a multiple of 64, got 96\."):
        run(odd, images, tmp_path / "c.safetensors")
    assert run(odd, images, tmp_path / "c.safetensors", precision="fp8").calibration.ranges


def test_random_weights_are_marked(images: Path, model: Path, tmp_path: Path) -> None:
    got = run(model, images, tmp_path / "c.safetensors", random=True, seed=4, decoder_layers=1, precision="fp8")
    assert got.calibration.info["weights"] == "random, seed 4"
    assert got.to_dict()["note"].startswith("random weights, 1 of 3 decoder layers")
    with pytest.raises(ConfigError, match="must be made for"):
        load_calibration(got.out, resolve(str(model)).weights)


def test_bundled_calibration_is_of_the_bundled_checkpoint() -> None:
    found = resolve("llava-tiny")
    path = ASSETS / "llava-tiny" / "calibration.safetensors"
    read = load_calibration(path, found.weights)
    assert path.stat().st_size < 100_000
    assert read.ranges
    assert read.scales
    assert len(read.info["pictures"]) == 32


def test_merged_statistics_are_those_of_all_tokens() -> None:
    """Two samples apart, saved and read back, are the two together."""
    from calib.inputs import Inputs

    found = resolve("llava-tiny")
    (group, *_) = groups(found.config)
    layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(group.inputs, 3)})
    prefix = group.name.removesuffix("q_proj")
    samples = [torch.randn(1, n, group.inputs, generator=torch.Generator().manual_seed(n)) for n in (5, 9)]
    total, every = Inputs([group]), torch.cat([s[0] for s in samples]).double()
    for sample in samples:
        inputs = Inputs([group])
        with inputs.watching(layer, prefix, lambda tokens: np.arange(min(tokens, 6))):
            layer["q_proj"](sample)
        total.merge(Inputs.restored([group], *inputs.saved()))
        layer["q_proj"](sample * 100)  # nobody watches
    assert total.largest == {group.name: pytest.approx(float(every.abs().max()))}
    assert total.mean(group.name) == pytest.approx(every.abs().mean(0).numpy())
    assert total.sample(group.name).shape == (11, group.inputs)
    assert np.array_equal(total.sample(group.name)[:5], samples[0][0].numpy())


def test_calibrations_of_fewer_layers_are_of_that_checkpoint(model: Path, images: Path, tmp_path: Path) -> None:
    got = run(model, images, tmp_path / "c.safetensors", decoder_layers=2)
    cut = resolve(str(model), decoder_layers=2)
    assert load_calibration(got.out, cut.weights).scales.keys() == {group.name for group in groups(cut.config)}
    assert replace(cut.config, text=replace(cut.config.text, num_hidden_layers=3)) == resolve(str(model)).config
