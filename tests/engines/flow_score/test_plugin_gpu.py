"""The plugin in a TensorRT engine on a GPU, beside the engine without it and ONNX Runtime. That has not run yet."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
import recipe
from references import relative_error
from tiny_engine import LIMITS, write_engine

from engines.backends import trt_module
from engines.build import build_engine
from engines.session import OrtSession
from export.builder import save
from export.vision import vision_model
from flowcut.aliases import resolve
from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.contract import Limits, vision_contract
from flowcut.errors import FlowCutError
from flowcut.schedule import make_schedule

IMAGES, RUNS = 4, 200
ALONE = Path(__file__).parents[2] / "engine_alone.py"
FIGURES = Path(__file__).parents[3] / "build" / "plugin_gpu"
CLIP_L = LlavaConfig(VisionConfig(), TextConfig(64, 128, 1, 4, 4, 512), image_token_id=448)  # the tower is what counts


@dataclass(frozen=True)
class Runs:
    """`kept` [images, T] and `image_embeds` [images, T, D] of each: plugin, body, onnxruntime; and the figures."""

    kept: dict[str, np.ndarray]
    features: dict[str, np.ndarray]
    figures: dict[str, Any]

    def agreeing(self, name: str) -> list[int]:
        """Patches that ONNX Runtime keeps too, per image."""
        pairs = zip(self.kept[name], self.kept["onnxruntime"], strict=True)
        return [len(np.intersect1d(a, b)) for a, b in pairs]

    def error(self, name: str) -> float:
        """Of the features of patches that both keep."""
        got, expected = [], []
        for image, pair in enumerate(zip(self.kept[name], self.kept["onnxruntime"], strict=True)):
            _, here, there = np.intersect1d(*pair, return_indices=True)
            got.append(self.features[name][image, here])
            expected.append(self.features["onnxruntime"][image, there])
        return relative_error(np.concatenate(got), np.concatenate(expected))


@pytest.fixture(scope="module")
def tensorrt() -> None:
    try:
        trt_module("trt")
    except FlowCutError as error:
        pytest.skip(f"needs TensorRT: {error}")
    pytest.importorskip("cuda.core", reason="needs cuda-core, of the trt extra")


@pytest.fixture(scope="module", params=["llava-tiny", "llava-tiny-masked", "clip-l"])
def runs(tensorrt: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Both engines of one vision graph, run in a process of their own, and ONNX Runtime."""
    directory = tmp_path_factory.mktemp(request.param)
    weights, tokens = (random_weights(CLIP_L), 64) if request.param == "clip-l" else (resolve("llava-tiny").weights, 16)
    limits = Limits(max_images=IMAGES)
    contract = vision_contract(weights.config, tokens, "fp16", limits)
    kind = "masked" if request.param.endswith("masked") else "static"
    schedule = make_schedule(kind, weights.config.vision, tokens)
    path = directory / "vision.onnx"
    save(vision_model(weights, contract, schedule, "fp16", {}), path)
    engines = {name: directory / f"{name}.engine" for name in ("plugin", "body")}
    for name, engine in engines.items():
        build_engine(path, engine, contract, "trt", plugin=name == "plugin")
    pixels = recipe.pixels(weights.config.vision.image_size, IMAGES, 0).astype(np.float16)
    figures, results = run_alone(directory, engines, pixels)
    reference = OrtSession(path, contract).run({"pixel_values": pixels}).arrays
    results |= {f"onnxruntime.{name}": array for name, array in reference.items()}
    names = (*engines, "onnxruntime")
    kept, features = ({name: results[f"{name}.{x}"] for name in names} for x in ("kept", "image_embeds"))
    done = Runs(kept, features, figures | {"case": request.param, "images": IMAGES, "tokens": tokens})
    report(done, engines)
    return done


def run_alone(directory: Path, engines: dict[str, Path], pixels: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """What engine_alone.py prints last, and the outputs by "engine.tensor"."""
    np.save(directory / "pixels.npy", pixels)
    results = directory / "results.npz"
    paths = {name: str(path) for name, path in engines.items()}
    arguments = json.dumps([paths, str(directory / "pixels.npy"), str(results), RUNS])
    command = [sys.executable, "-I", str(ALONE), arguments]  # -I: nothing of this checkout on its path
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(results) as data:
        return json.loads(done.stdout.splitlines()[-1]), dict(data)


def report(runs: Runs, engines: dict[str, Path]) -> None:
    """Figures into FIGURES and, with -s, onto the terminal: never a time without its agreement."""
    for name, path in engines.items():
        agreement = {"kept_as_onnxruntime": runs.agreeing(name), "feature_error": runs.error(name)}
        runs.figures["engines"][name] |= {"bytes": path.stat().st_size, **agreement}
    text = json.dumps(runs.figures)
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / f"{runs.figures['case']}.json").write_text(f"{text}\n", encoding="utf-8")
    print(text)


@pytest.mark.gpu
def test_the_engine_runs_where_neither_this_project_nor_triton_is(runs: Runs) -> None:
    assert runs.figures["foreign"] == []
    assert all(figures["n"] == RUNS for figures in runs.figures["engines"].values())


@pytest.mark.gpu
def test_patches_are_kept_as_onnx_runtime_keeps_them(runs: Runs) -> None:
    """Ties aside: where scores are equal but for rounding, as random weights have them, the body shows how many."""
    least = np.array(runs.agreeing("body")) - 2 if runs.figures["case"] == "clip-l" else 15
    assert (np.array(runs.agreeing("plugin")) >= least).all()


@pytest.mark.gpu
def test_features_are_those_of_onnx_runtime(runs: Runs) -> None:
    """float16 rounds differently in every library, so the engine without the plugin is the measure."""
    assert runs.error("plugin") <= max(2 * runs.error("body"), 2e-2)


@pytest.mark.gpu
def test_the_plugin_costs_no_more_than_the_body(runs: Runs) -> None:
    times = {name: figures["median_ms"] for name, figures in runs.figures["engines"].items()}
    assert times["plugin"] <= 1.05 * times["body"]


@pytest.mark.gpu
def test_both_have_their_weights_once(runs: Runs) -> None:
    sizes = [figures["bytes"] for figures in runs.figures["engines"].values()]
    assert max(sizes) < 1.2 * min(sizes)


def test_the_script_runs_engines_on_a_stand_in_for_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its every line, before it meets a GPU."""
    tiny = write_engine(tmp_path / "engine", precision="fp16", backend="trt")
    gpu = fake_gpu.install(monkeypatch)
    trt, device = sys.modules["tensorrt"], sys.modules["cuda.core"].Device
    monkeypatch.setattr(device, "name", "none", raising=False)
    vars(trt).update(Logger=Logger, __version__="0", nptype=lambda kind: fake_gpu.NUMPY_DTYPES[kind.name])
    concrete = lambda self, name: tuple(IMAGES if d < 0 else d for d in self.engine.get_tensor_shape(name))  # noqa: E731
    monkeypatch.setattr(fake_gpu.Context, "get_tensor_shape", concrete, raising=False)
    pixels = recipe.pixels(tiny.model.config.vision.image_size, IMAGES, 0).astype(np.float16)
    np.save(tmp_path / "pixels.npy", pixels)
    paths = {name: str(tiny.directory / "vision.engine") for name in ("plugin", "body")}
    arguments = [paths, str(tmp_path / "pixels.npy"), str(tmp_path / "results.npz"), 3]
    monkeypatch.setattr(sys, "argv", [str(ALONE), json.dumps(arguments)])
    runpy.run_path(str(ALONE))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["engines"]["plugin"]["n"] == 3
    assert "engines" in figures["foreign"]  # as this process is none of its own
    assert gpu.calls.count("execute") == 2 * 23
    contract = vision_contract(tiny.model.config, 16, "fp16", LIMITS)
    expected = OrtSession(tiny.directory / "vision.onnx", contract).run({"pixel_values": pixels}).arrays
    with np.load(tmp_path / "results.npz") as results:
        np.testing.assert_array_equal(results["body.kept"], expected["kept"])
        np.testing.assert_array_equal(results["plugin.image_embeds"], expected["image_embeds"])


class Logger:
    """tensorrt.Logger."""

    WARNING = 2

    def __init__(self, level: int) -> None:
        assert level == self.WARNING
