"""AWQ where it is meant to help: llava-tiny with the outlier channels of large models, on ONNX Runtime against torch.

llava-tiny itself has none, and int4 costs it little. The same function with outliers is made of it by scaling channels
the wrong way: what a norm returns grows, the columns that read it shrink, and plain int4 loses them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from rich.progress import Progress
from safetensors.numpy import save_file

from calib.calibration import Calibration, load_calibration, smoothed
from calib.groups import groups
from calib.quantize import QuantizeSettings, calibrate_quantize
from export.builder import save
from export.language import language_model
from flowcut.aliases import ASSETS, resolve
from flowcut.checkpoint import Weights
from flowcut.contract import Limits, language_contract, past_names
from flowcut.language import KVCache, LanguageModel
from flowcut.preprocess import ImageSettings, pixel_values
from flowcut.prompt import Encoded, Tokenizer, question_prompt
from flowcut.schedule import make_schedule
from flowcut.tensors import expected_tensors
from flowcut.tiny.scenes import make_scene, render
from flowcut.vision import VisionModel

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, LAYERS, OUTLIERS, TIMES = 16, 2, 6, 24.0
LIMITS = Limits(max_batch=1, max_images=1, max_prompt=48, max_new_tokens=1)
QUESTION = "How many objects are there?"
Sample = tuple[np.ndarray, Encoded]


@pytest.fixture(scope="module")
def with_outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of llava-tiny with a few channels of every group scaled up."""
    found, rng = resolve("llava-tiny", decoder_layers=LAYERS), np.random.default_rng(0)
    scales = {}
    for group in groups(found.config):
        if group.part == "language":
            scales[group.name] = np.ones(group.inputs, np.float32)
            scales[group.name][rng.permutation(group.inputs)[:OUTLIERS]] = 1 / TIMES
    weights = smoothed(found.weights, Calibration("", {}, scales, {}, ""), {"language"})
    directory = tmp_path_factory.mktemp("outliers")
    for name in ("preprocessor_config.json", "tokenizer.json"):
        (directory / name).write_bytes((ASSETS / "llava-tiny" / name).read_bytes())
    config = (ASSETS / "llava-tiny" / "config.json").read_text()
    (directory / "config.json").write_text(config.replace('"num_hidden_layers": 4', f'"num_hidden_layers": {LAYERS}'))
    tensors = {name: np.ascontiguousarray(weights.load(name)) for name in expected_tensors(weights.config)}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def calibration(with_outliers: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    directory = tmp_path_factory.mktemp("calibration")
    for number in range(4):
        render(make_scene("val", number)).save(directory / f"{number}.png")
    out = directory / "c.safetensors"
    with Progress(disable=True) as progress:
        settings = QuantizeSettings(str(with_outliers), directory, out, precision="int4", questions=(QUESTION,))
        calibrate_quantize(settings, progress)
    return load_calibration(out, resolve(str(with_outliers)).weights)


@pytest.fixture(scope="module")
def samples(with_outliers: Path) -> list[Sample]:
    """Unseen pictures' embeddings with their prompt."""
    found = resolve(str(with_outliers))
    model, settings = VisionModel.from_weights(found.weights), ImageSettings.from_directory(with_outliers, 168)
    tokenizer = Tokenizer.from_file(found.tokenizer, found.config.image_token_id, found.config.text.vocab_size)
    prompt = tokenizer.encode(question_prompt(QUESTION), [TOKENS], TOKENS)
    schedule, out = make_schedule("static", found.config.vision, TOKENS), []
    with torch.inference_mode():
        for number in range(8):
            pixels = pixel_values([render(make_scene("test", number))], settings)
            out.append((model(torch.from_numpy(pixels), schedule)[0].numpy(), prompt))
    return out


def torch_logits(weights: Weights, samples: list[Sample]) -> np.ndarray:
    """Of the last token, float32."""
    model, out = LanguageModel.from_weights(weights), []
    for embeds, prompt in samples:
        n = len(prompt.input_ids)
        ids, rows = (torch.from_numpy(x)[None] for x in (prompt.input_ids, prompt.image_rows))
        cache = KVCache.allocate(weights.config.text, 1, n)
        hidden = model(ids, torch.arange(n)[None], rows, torch.from_numpy(embeds), cache)
        out.append(model.logits(hidden, torch.tensor([n - 1]))[0].numpy())
    return np.stack(out)


def int4_logits(weights: Weights, samples: list[Sample], path: Path) -> np.ndarray:
    """The same of the int4 graph."""
    contract = language_contract(weights.config, TOKENS, "int4", LIMITS)
    save(language_model(weights, contract, "int4", {}), path)
    session, out = ort.InferenceSession(path, providers=["CPUExecutionProvider"]), []
    shapes = {i.name: i.shape[1:] for i in session.get_inputs()}
    cache = {n: np.zeros((1, *shapes[n]), np.float16) for i in range(LAYERS) for n in past_names(i)}
    for embeds, prompt in samples:
        n = len(prompt.input_ids)
        given = {"input_ids": prompt.input_ids[None], "image_rows": prompt.image_rows[None]}
        given |= {"position_ids": np.arange(n)[None], "last_token": np.array([n - 1])}
        out.append(session.run(["logits"], given | {"image_embeds": embeds.astype(np.float16)} | cache)[0][0])
    return np.stack(out)


def test_scales_lower_the_error_of_the_int4_decoder(
    with_outliers: Path, calibration: Calibration, samples: list[Sample], tmp_path: Path
) -> None:
    weights = resolve(str(with_outliers)).weights
    exact = torch_logits(weights, samples)
    assert exact == pytest.approx(torch_logits(resolve("llava-tiny", decoder_layers=LAYERS).weights, samples), abs=1e-3)
    scaled = smoothed(weights, calibration, {"language"})
    plain, awq = (
        np.linalg.norm(int4_logits(w, samples, tmp_path / f"{name}.onnx") - exact) / np.linalg.norm(exact)
        for name, w in (("plain", weights), ("awq", scaled))
    )
    assert awq < 0.6 * plain


def test_errors_that_the_file_states_fall_with_it(calibration: Calibration) -> None:
    errors = [e for name, e in calibration.info["errors"].items() if name.startswith("language_model.")]
    assert np.mean([e["after"] for e in errors]) < 0.6 * np.mean([e["before"] for e in errors])
