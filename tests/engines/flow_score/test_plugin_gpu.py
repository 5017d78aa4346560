"""The kernels and the plugin in TensorRT engines on a GPU, beside ONNX Runtime. That has not run yet.

Ahead of time: beside the engine without the plugin. Just in time: built and run in a process of its own (`main`).
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import fake_gpu
import fake_tensorrt
import numpy as np
import onnx
import pytest
import recipe
from references import relative_error

from engines import compiler
from engines.backends import trt_module
from engines.build import build_engine
from engines.compiler import BuildRequest, compile_engine
from engines.flow_score.cache import SHIPPED_HEAD_SIZES
from engines.flow_score.check import check_kernels
from engines.flow_score.launch import DTYPES
from engines.flow_score.nodes import plugin_model
from engines.flow_score.plugin import NAMESPACE
from engines.flow_score.run import ptx_launch
from engines.sessions.ort_session import OrtSession
from export.builder import save
from export.vision import vision_model
from flowcut.aliases import resolve
from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.contract import GraphContract, Limits, vision_contract
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

    def agreeing(self, name: str, other: str = "onnxruntime") -> list[int]:
        """Patches that the other keeps too, per image."""
        pairs = zip(self.kept[name], self.kept[other], strict=True)
        return [len(np.intersect1d(a, b)) for a, b in pairs]

    def error(self, name: str, other: str = "onnxruntime") -> float:
        """Of the features of patches that both keep."""
        got, expected = [], []
        for image, pair in enumerate(zip(self.kept[name], self.kept[other], strict=True)):
            _, here, there = np.intersect1d(*pair, return_indices=True)
            got.append(self.features[name][image, here])
            expected.append(self.features[other][image, there])
        return relative_error(np.concatenate(got), np.concatenate(expected))


@pytest.fixture(scope="module")
def cuda_core() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core, of the trt extra")


@pytest.fixture(scope="module")
def tensorrt(cuda_core: None) -> None:
    try:
        trt_module("trt")
    except FlowCutError as error:
        pytest.skip(f"needs TensorRT: {error}")


@pytest.fixture(scope="module", params=["llava-tiny", "llava-tiny-masked", "clip-l"])
def runs(tensorrt: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Both engines of one vision graph, run in a process without this project, and ONNX Runtime."""
    directory = tmp_path_factory.mktemp(request.param)
    path, contract = exported(request.param, directory)
    engines = {name: directory / f"{name}.engine" for name in ("plugin", "body")}
    for name, engine in engines.items():
        build_engine(path, engine, contract, "trt", plugin=name == "plugin")
    pixels = save_pixels(contract, directory)
    command = ["-I", str(ALONE), alone_arguments(directory, engines, RUNS)]  # -I: nothing of this checkout on its path
    done = run_child(command, directory)
    reference = OrtSession(path, contract).run({"pixel_values": pixels}).arrays
    done.kept["onnxruntime"], done.features["onnxruntime"] = reference["kept"], reference["image_embeds"]
    done.figures.update(case=request.param, images=IMAGES, tokens=contract.outputs[0].dims[1])
    report(done, engines)
    return done


@pytest.fixture(scope="module", params=["llava-tiny", "llava-tiny-masked"])
def forms(tensorrt: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The engine with the plugin ahead of time, "plugin", and the one with it just in time, "jit"."""
    directory = tmp_path_factory.mktemp(f"jit-{request.param}")
    path, contract = exported(request.param, directory)
    build_engine(path, directory / "plugin.engine", contract, "trt")
    save_pixels(contract, directory)
    return run_child([__file__, str(directory)], directory)


def exported(case: str, directory: Path) -> tuple[Path, GraphContract]:
    """The vision graph of a case."""
    weights, tokens = (random_weights(CLIP_L), 64) if case == "clip-l" else (resolve("llava-tiny").weights, 16)
    contract = vision_contract(weights.config, tokens, "fp16", Limits(max_images=IMAGES))
    schedule = make_schedule("masked" if case.endswith("masked") else "static", weights.config.vision, tokens)
    path = directory / "vision.onnx"
    save(vision_model(weights, contract, schedule, "fp16", {}), path)
    return path, contract


def save_pixels(contract: GraphContract, directory: Path) -> np.ndarray:
    pixels = recipe.pixels(contract.inputs[0].dims[-1], IMAGES, 0).astype(np.float16)
    np.save(directory / "pixels.npy", pixels)
    return pixels


def alone_arguments(directory: Path, engines: dict[str, Path], count: int) -> str:
    """For engine_alone.py, which `run_child` expects to write results.npz."""
    paths = {name: str(path) for name, path in engines.items()}
    return json.dumps([paths, str(directory / "pixels.npy"), str(directory / "results.npz"), count])


def run_child(arguments: Sequence[str], directory: Path) -> Runs:
    """What the engines gave in a Python process of their own, and the figures that it printed last."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    with np.load(directory / "results.npz") as data:
        kept, features = ({name: data[f"{name}.{x}"] for name in figures["engines"]} for x in ("kept", "image_embeds"))
    return Runs(kept, features, figures)


def main(directory: Path) -> None:
    """Build the graph with just-in-time plugins and run it here, where they are registered, beside plugin.engine."""
    engines = {name: directory / f"{name}.engine" for name in ("plugin", "jit")}
    contract = vision_contract(resolve("llava-tiny").config, 16, "fp16", Limits(max_images=IMAGES))
    with mock.patch("engines.compiler.plugin_model", just_in_time):
        compile_engine(BuildRequest(directory / "vision.onnx", engines["jit"], contract, "trt"), lambda *event: None)
    with mock.patch.object(sys, "argv", [str(ALONE), alone_arguments(directory, engines, 1)]):
        runpy.run_path(str(ALONE))


def just_in_time(model: onnx.ModelProto, directory: Path) -> onnx.ModelProto:
    """The graph with plugin nodes whose kernels this project launches while the engine runs."""
    rewritten = plugin_model(model, directory)
    for node in rewritten.graph.node:
        for attribute in node.attribute:
            if (node.domain, attribute.name) == (NAMESPACE, "aot"):
                attribute.i = 0
    return rewritten


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
def test_compiled_kernels_score_as_float64_does(cuda_core: None) -> None:
    """What `flowcut plugin` checks: every type, heads of 32 to 128, by heads and by tokens, grouped and masked."""
    torch = pytest.importorskip("torch", reason="needs torch with CUDA")
    if not torch.cuda.is_available():
        pytest.skip("needs torch with CUDA, this one finds no device")
    checks = check_kernels(ptx_launch(), "cuda")
    assert {check.dtype for check in checks} == set(DTYPES)
    assert {check.shape[3] for check in checks} >= set(SHIPPED_HEAD_SIZES)
    assert [check for check in checks if not check.ok] == []


@pytest.mark.gpu
def test_the_plugin_just_in_time_gives_what_it_gives_ahead_of_time(forms: Runs) -> None:
    """The same kernels; the rest of the graph may round differently from one build to the next."""
    assert min(forms.agreeing("jit", "plugin")) >= 15
    assert forms.error("jit", "plugin") <= 2e-2


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


@dataclass(frozen=True)
class StandIn:
    """`gpu` runs what an engine file names, an ONNX file: here `vision`."""

    gpu: fake_gpu.FakeGpu
    vision: Path
    expected: dict[str, np.ndarray]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A machine for the scripts, so that their every line runs before it meets a GPU; pixels.npy in tmp_path."""
    vision, contract = exported("llava-tiny", tmp_path)
    expected = OrtSession(vision, contract).run({"pixel_values": save_pixels(contract, tmp_path)}).arrays
    gpu = fake_gpu.install(monkeypatch)
    trt, device = sys.modules["tensorrt"], sys.modules["cuda.core"].Device
    monkeypatch.setattr(device, "name", "none", raising=False)
    vars(trt).update(Logger=Logger, __version__="0", nptype=lambda kind: fake_tensorrt.NUMPY_DTYPES[kind.name])
    concrete = lambda self, name: tuple(IMAGES if d < 0 else d for d in self.engine.get_tensor_shape(name))  # noqa: E731
    monkeypatch.setattr(fake_tensorrt.Context, "get_tensor_shape", concrete, raising=False)
    return StandIn(gpu, vision, expected)


def test_the_script_runs_engines_on_a_stand_in_for_the_gpu(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "vision.engine"
    engine.write_text(str(stand_in.vision), encoding="utf-8")
    arguments = alone_arguments(tmp_path, dict.fromkeys(("plugin", "body"), engine), 3)
    monkeypatch.setattr(sys, "argv", [str(ALONE), arguments])
    runpy.run_path(str(ALONE))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["engines"]["plugin"]["n"] == 3
    assert "engines" in figures["foreign"]  # as this process is none of its own
    assert stand_in.gpu.calls.count("execute") == 2 * 23
    with np.load(tmp_path / "results.npz") as results:
        np.testing.assert_array_equal(results["body.kept"], stand_in.expected["kept"])
        np.testing.assert_array_equal(results["plugin.image_embeds"], stand_in.expected["image_embeds"])


def test_the_just_in_time_engine_is_built_and_run_in_one_process(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is built differs from the other graph in every plugin node's `aot`, and in nothing else."""

    def compiled(request: BuildRequest, notify: Any) -> None:
        graph = onnx.load(request.onnx_path, load_external_data=False)
        built, expected = compiler.plugin_model(graph, tmp_path), plugin_model(graph, tmp_path)
        aot = [a for node in built.graph.node if node.domain for a in node.attribute if a.name == "aot"]
        assert [a.i for a in aot] == [0] * len(aot) != []
        for attribute in aot:
            attribute.i = 1
        assert built == expected
        request.engine_path.write_text(str(request.onnx_path), encoding="utf-8")

    monkeypatch.setitem(globals(), "compile_engine", compiled)
    (tmp_path / "plugin.engine").write_text(str(stand_in.vision), encoding="utf-8")
    main(tmp_path)
    with np.load(tmp_path / "results.npz") as results:
        np.testing.assert_array_equal(results["jit.kept"], stand_in.expected["kept"])
        np.testing.assert_array_equal(results["plugin.kept"], stand_in.expected["kept"])


class Logger:
    """tensorrt.Logger."""

    WARNING = 2

    def __init__(self, level: int) -> None:
        assert level == self.WARNING


if __name__ == "__main__":
    main(Path(sys.argv[1]))
