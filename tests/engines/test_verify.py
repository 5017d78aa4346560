"""flowcut verify: passes on what the pipeline builds, and fails on whatever is not that."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import load_file, save_file
from verify_engines import Build, builder, failed, rehash, row

from calib.calibration import load_calibration
from engines import verify as module
from engines.comparison import TOLERANCES, Judge, jaccard, relative_error
from engines.numerics import CALIBRATION
from engines.pipeline import BuildSettings, build_directory
from engines.reference import ExportedWeights, TorchVision, choose
from engines.trust import checks_here
from engines.verify import print_report, verify
from flowcut.aliases import ASSETS, resolve
from flowcut.artifacts import read_manifest
from flowcut.config import LlavaConfig
from flowcut.contract import Limits, vision_contract
from flowcut.errors import CheckpointError, ConfigError, EngineError
from flowcut.schedule import make_schedule
from flowcut.vision import VisionModel

pytestmark = pytest.mark.usefixtures("one_thread")

PATCHES = LlavaConfig.from_file(ASSETS / "llava-tiny" / "config.json").vision.patches


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(precision, ..) -> engine directory as the pipeline publishes it, built once; copy it before changing it."""
    return builder(tmp_path_factory, model="llava-tiny", max_prompt=64)


@pytest.fixture
def engine(build: Build, tmp_path: Path) -> Path:
    """A copy of the fp32 engine, to be spoiled."""
    return shutil.copytree(build("fp32"), tmp_path / "engine")


# What is right passes


@pytest.mark.parametrize("schedule", ["static", "masked"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_accepts_what_was_built(build: Build, precision: str, schedule: str, capfd: pytest.CaptureFixture[str]) -> None:
    directory = build(precision, schedule=schedule)
    capfd.readouterr()
    report = verify(directory)
    assert report.ok, report.rows
    assert capfd.readouterr() == ("", "")  # neither Polygraphy nor ONNX Runtime may talk
    compared = [(r.graph, r.reference, r.runner, r.output) for r in report.rows if r.error is not None]
    assert compared == [
        ("vision", "checkpoint", "onnx", "weights"),
        ("vision", "torch", "onnxruntime", "kept"),
        ("vision", "torch", "onnxruntime", "image_embeds"),
        ("language", "checkpoint", "onnx", "weights"),
        ("language", "torch", "onnxruntime", "logits, prefill"),
        *(("language", "torch", "onnxruntime", f"logits, decode {i}") for i in (1, 2, 3)),
        ("language", "torch", "onnxruntime", "cache"),
    ]
    errors = [r.error for r in report.rows if r.error]
    assert len(errors) >= 6  # two libraries never agree to the last bit: the values were really compared
    assert max(errors) < (1e-5 if precision == "fp32" else 5e-3)


# What the worst value may be: a tenth of what is allowed where float16 or float32 compute, so that a reference that
# rounds otherwise than the graph would show. FP8 rounds activations, see engines.comparison.
PRECISIONS = [
    ("int8", None, 2e-3),
    ("int4", None, 2e-3),
    ("fp8", None, 1e-1),
    ("bf16", None, 1e-3),
    ("int4", "fp16", 2e-3),
    ("fp16", "fp8", 1e-1),
    ("fp16", "bf16", 2e-3),
    ("fp32", "int8", 2e-3),
]


@pytest.mark.parametrize(("precision", "vision", "worst"), PRECISIONS)
def test_accepts_every_precision_and_mixture(
    build: Build, precision: str, vision: str | None, worst: float, caplog: pytest.LogCaptureFixture
) -> None:
    report = verify(build(precision, vision_precision=vision, schedule="masked"))
    assert report.ok, report.rows
    assert max(r.error for r in report.rows if r.error is not None and r.output != "kept") < worst
    assert row(report, "vision", "onnx", "weights").error == row(report, "language", "onnx", "weights").error == 0
    assert ("computed in float32" in caplog.text) == ("bf16" in (precision, vision))
    assert (report.precision, report.vision_precision) == (
        precision,
        read_manifest(Path(report.directory)).vision_precision,
    )


def test_rounded_weights_are_not_the_checkpoints(build: Build) -> None:
    """Or the precisions above would show nothing: torch with unrounded weights is far from what the graphs compute."""
    weights = resolve("llava-tiny").weights
    name = "language_model.model.layers.0.self_attn.k_proj.weight"
    exact = weights.load(name).astype(np.float32)
    calibration = load_calibration(ASSETS / "llava-tiny" / CALIBRATION, weights)
    for precision in ("int8", "int4", "fp8", "bf16"):
        assert relative_error(ExportedWeights(weights, precision, calibration.ranges).load(name), exact) > 1e-3


@pytest.mark.parametrize(("precision", "stages"), [("fp32", 3), ("int4", 2), ("bf16", 2)])
def test_accepts_a_decoder_in_stages(build: Build, precision: str, stages: int) -> None:
    report = verify(build(precision, stages=stages))
    assert report.ok, report.rows
    assert report.graphs == ("vision", *(f"language.{i}" for i in range(stages)))
    for graph in report.graphs[1:-1]:
        layer = {("language.0", 2): 2, ("language.0", 3): 1, ("language.1", 3): 3}[graph, stages]
        assert [
            r.output for r in report.rows if r.graph == graph and r.runner == "onnxruntime" and r.error is not None
        ] == [
            f"hidden.{layer}, prefill",
            *(f"hidden.{layer}, decode {i}" for i in (1, 2, 3)),
            "cache",
        ]
    assert row(report, report.graphs[-1], "onnxruntime", "logits, decode 3").verdict == "ok"


def test_names_the_stage_that_is_wrong(build: Build, tmp_path: Path) -> None:
    directory = shutil.copytree(build("fp32", stages=3), tmp_path / "engine")
    spoil(directory / "language.1.onnx", "down_proj.weight")
    report = verify(rehash(directory))
    assert {graph for graph, _ in failed(report)} == {"language.1"}
    assert {("language.1", "weights"), ("language.1", "hidden.3, prefill"), ("language.1", "cache")} <= failed(report)


def test_goes_on_after_a_stage_that_does_not_load(build: Build, tmp_path: Path) -> None:
    directory = shutil.copytree(build("fp32", stages=2), tmp_path / "engine")
    (directory / "language.0.onnx").write_bytes(b"no model")
    report = verify(rehash(directory))
    assert failed(report) == {("language.0", "signature"), ("language.0", "weights")}
    assert row(report, "language.1", "onnxruntime", "logits, decode 3").verdict == "ok"
    report = verify(rehash(directory, source=""))  # without torch nothing is handed on but random numbers
    assert failed(report) == {("language.0", "signature")}
    assert row(report, "language.1", "onnxruntime", "signature").verdict == "ok"


@pytest.mark.parametrize("selector", ["no-history", "no-semantic", "no-strength", "cls", "random-1", "grid"])
def test_accepts_every_selector(build: Build, selector: str) -> None:
    report = verify(build("fp32", selector=selector))
    assert report.ok, report.rows


@pytest.mark.parametrize("tokens", ["all", 1])
def test_accepts_extreme_token_counts(build: Build, tokens: int | str) -> None:
    assert verify(build("fp32", tokens=tokens, max_prompt=None)).ok


def test_accepts_an_engine_for_one_short_prompt(build: Build) -> None:
    """Fewer samples than asked for, and a prompt with no room for text after the picture."""
    report = verify(build("fp32", max_batch=1, max_images=1, max_prompt=17, max_new_tokens=1, tokens=16))
    assert report.ok, report.rows
    assert report.inputs == "1 pictures; prompts of 17 tokens and 1 decode steps; seed 0"


def test_inputs_follow_the_seed(build: Build) -> None:
    first, again, other = (verify(build("fp16"), seed=seed).to_dict()["rows"] for seed in (0, 0, 1))
    assert first == again != other


def test_finds_random_weights_by_their_seed(build: Build) -> None:
    directory = build("fp16", random=True)
    assert verify(directory).ok
    other = rehash(shutil.copytree(directory, directory.parent / "other"), seed=5)
    report = verify(other)
    assert not report.ok
    assert "is not the one that was exported" in row(report, "vision", "torch", "all").detail


# What is wrong fails


@pytest.mark.parametrize("graph", ["vision", "language"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rejects_altered_weights(build: Build, tmp_path: Path, precision: str, graph: str) -> None:
    directory = shutil.copytree(build(precision), tmp_path / "engine")
    spoil(directory / f"{graph}.onnx", {"vision": "fc2.weight", "language": "down_proj.weight"}[graph])
    assert ("directory", "size, sha256") in failed(verify(directory))
    report = verify(rehash(directory))
    assert not report.ok
    expected = {"vision": ("vision", "image_embeds"), "language": ("language", "logits, prefill")}[graph]
    assert {expected, (graph, "weights")} <= failed(report)
    assert {g for g, _ in failed(report)} == {graph}


def spoil(path: Path, name_end: str) -> None:
    """Negate the first tensor with such a name in the external weights."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name.endswith(name_end))
    where = {e.key: e.value for e in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = np.memmap(
        path.parent / where["location"], dtype, "r+", int(where["offset"]), (int(where["length"]) // dtype.itemsize,)
    )
    data *= -1
    data.flush()


SCALES = [
    ("int8", "vision", "layers.3.mlp.fc1.weight.scale"),
    ("int4", "language", "layers.0.self_attn.q_proj+k_proj+v_proj.weight.scale"),
    ("fp8", "vision", "linear_1.weight.scale"),
    ("fp8", "language", "layers.3.mlp.gate_proj+up_proj.weight.scale"),
]


@pytest.mark.parametrize(("precision", "graph", "name"), SCALES)
def test_rejects_one_scale_that_is_wrong_by_two_percent(
    build: Build, tmp_path: Path, precision: str, graph: str, name: str
) -> None:
    """Of one output, or of one output and block: no tolerance for what the whole graph returns would show it."""
    directory = shutil.copytree(build(precision), tmp_path / "engine")
    change_scale(directory / f"{graph}.onnx", name)
    report = verify(rehash(directory))
    assert (graph, "weights") in failed(report)
    found = row(report, graph, "onnx", "weights")
    assert found.detail == f"greatest at {weight_name(directory / f'{graph}.onnx', name)}"
    assert found.error == pytest.approx(0.02, rel=0.75)  # of one scale's largest weight, over the tensor's
    assert {g for g, _ in failed(report)} == {graph}


def test_rejects_an_input_scale_that_is_wrong_by_two_percent(build: Build, tmp_path: Path) -> None:
    directory = shutil.copytree(build("fp8"), tmp_path / "engine")
    model = onnx.load(directory / "language.onnx", load_external_data=False)
    producers = {node.output[0]: node for node in model.graph.node}
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    again = producers[product.input[0]]
    tensor = next(t for t in model.graph.initializer if t.name == again.input[1])
    tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * np.float16(1.02)).tobytes()
    onnx.save(model, directory / "language.onnx")
    report = verify(rehash(directory))
    assert ("language", "weights") in failed(report)
    found = row(report, "language", "onnx", "weights")
    assert found.detail == "greatest at the scale of language_model.model.layers.0.self_attn.q_proj's input"
    assert found.error == pytest.approx(0.02, rel=0.1)


def test_rejects_inputs_that_are_not_rounded(build: Build, tmp_path: Path) -> None:
    directory = shutil.copytree(build("fp8"), tmp_path / "engine")
    model = onnx.load(directory / "vision.onnx", load_external_data=False)
    producers = {node.output[0]: node for node in model.graph.node}
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    product.input[0] = producers[producers[product.input[0]].input[0]].input[0]
    onnx.save(model, directory / "vision.onnx")
    report = verify(rehash(directory))
    assert ("vision", "weights") in failed(report)
    assert "q_proj's input is not rounded to FP8" in row(report, "vision", "onnx", "weights").detail


def change_scale(path: Path, name_end: str) -> None:
    """Multiply the first element of a scale by 1.02, wherever it is stored."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name.endswith(name_end))
    if tensor.external_data:
        where = {e.key: e.value for e in tensor.external_data}
        data = np.memmap(path.parent / where["location"], np.float16, "r+", int(where["offset"]), (1,))
        data *= np.float16(1.02)
        data.flush()
    else:
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.flat[0] *= np.float16(1.02)
        tensor.raw_data = array.tobytes()
        onnx.save(model, path)


def weight_name(path: Path, scale_end: str) -> str:
    (name,) = (
        t.name for t in onnx.load(path, load_external_data=False).graph.initializer if t.name.endswith(scale_end)
    )
    return name.removesuffix(".scale")


def test_rejects_another_calibration(build: Build, tmp_path: Path) -> None:
    """The directory says with which it was made: without it the weights are other ones."""
    directory = shutil.copytree(build("int4", vision_precision="fp16"), tmp_path / "engine")
    assert read_manifest(directory).calibration
    report = verify(rehash(directory, calibration={}))
    assert failed(report) >= {("language", "weights"), ("language", "cache")}
    assert not any(graph == "vision" for graph, _ in failed(report))


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokens", "9"), ("schedule", "{}"), ("precision", "fp16"), ("source_sha256", "0" * 64), ("note", None)],
)
def test_rejects_a_file_that_describes_itself_otherwise(engine: Path, key: str, value: str | None) -> None:
    model = onnx.load(engine / "language.onnx", load_external_data=False)
    properties = {p.key: p.value for p in model.metadata_props}
    if value is None:
        del properties[f"flowcut.{key}"]
    else:
        properties[f"flowcut.{key}"] = value
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, engine / "language.onnx")
    report = verify(rehash(engine))
    assert failed(report) == {("language", "metadata")}
    assert f"flowcut.{key} must be" in row(report, "language", "onnxruntime", "metadata").detail


@pytest.mark.parametrize(
    ("graph", "old", "new"),
    [("vision", "kept", "chosen"), ("vision", "pixel_values", "pixels"), ("language", "present.0.key", "present.0.k")],
)
def test_rejects_renamed_tensors(engine: Path, graph: str, old: str, new: str) -> None:
    model = onnx.load(engine / f"{graph}.onnx", load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    onnx.save(model, engine / f"{graph}.onnx")
    report = verify(rehash(engine))
    assert failed(report) == {(graph, "signature")}
    assert not report.ok
    detail = row(report, graph, "onnxruntime", "signature").detail
    assert old in detail
    assert "\n" not in detail


def test_rejects_a_file_that_does_not_load(engine: Path) -> None:
    (engine / "vision.onnx").write_bytes(b"no model")
    assert failed(verify(rehash(engine))) == {("vision", "signature"), ("vision", "weights")}


# Which patches were kept


class Tampered(OnnxrtRunner):
    """ONNX Runtime in TensorRT's place, with its outputs changed."""

    change: Callable[[dict[str, np.ndarray]], None]

    def infer_impl(self, feed_dict: Any) -> dict[str, np.ndarray]:
        outputs = {name: array.copy() for name, array in super().infer_impl(feed_dict).items()}
        self.change(outputs)
        return outputs


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, directory: Path, change: Callable[[dict[str, np.ndarray]], None]
) -> Path:
    """Make `directory` one of an engine that runs here."""

    def runner(path: Path, backend: str) -> Tampered:
        assert (path.suffix, backend) == (".engine", "rtx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        tampered = Tampered(
            onnxruntime.InferenceSession(path.with_suffix(".onnx"), options, ["CPUExecutionProvider"]), name="fake"
        )
        tampered.change = change
        return tampered

    monkeypatch.setattr(module, "gpu_present", lambda: True)
    monkeypatch.setattr(module, "checks_here", lambda manifest, backend: [])
    monkeypatch.setattr(module, "engine_runner", runner)
    return rehash(directory, backend="rtx")


def keep_the_last(outputs: dict[str, np.ndarray]) -> None:
    if "kept" in outputs:
        outputs["kept"][:] = np.arange(PATCHES - outputs["kept"].shape[1], PATCHES)


@pytest.fixture
def flat_checkpoint(tmp_path: Path) -> Path:
    """llava-tiny without positions: on a plain picture all patches are the same."""
    directory = shutil.copytree(ASSETS / "llava-tiny", tmp_path / "flat")
    tensors = load_file(directory / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith("position_embedding.weight"))
    tensors[name][1:] = tensors[name][1]
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_equal_scores_are_a_tie(flat_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BuildSettings(str(flat_checkpoint), precision="fp32", backend="ort", out=tmp_path / "engine", tokens=16)
    directory = build_directory(settings, Progress(disable=True)).directory
    pretend_gpu(monkeypatch, directory, keep_the_last)
    assert ("vision", "kept") in failed(verify(directory, checkpoint=str(flat_checkpoint)))
    monkeypatch.setattr(module, "pictures", lambda count, size, seed: np.full((count, 3, size, size), 0.5, np.float32))
    report = verify(directory, checkpoint=str(flat_checkpoint))
    assert report.ok, report.rows
    tie = row(report, "vision", "tensorrt_rtx", "kept")
    assert (tie.verdict, tie.reference) == ("tie", "torch")
    assert tie.detail.startswith("agreement 0.")
    assert row(report, "vision", "tensorrt_rtx", "image_embeds").verdict == "ok"
    untold = verify(rehash(directory, source=""))  # without the checkpoint nobody can tell
    assert ("vision", "kept") in failed(untold)
    assert "ties cannot be told" in row(untold, "vision", "tensorrt_rtx", "kept").detail


@pytest.mark.parametrize("kept", [[1, 0], [3, 3], [-1, 2], [2, 64]])
def test_rejects_what_cannot_be_patch_numbers(kept: list[int]) -> None:
    outputs = {"kept": np.array([kept]), "image_embeds": np.zeros((1, 2, 4), np.float32)}
    (found,) = Judge("vision", "a", "b", TOLERANCES["fp16"]).vision(outputs, outputs, 64, None)
    assert found.verdict == "FAILED"


def test_without_scores_common_patches_are_compared() -> None:
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((1, 64, 8)).astype(np.float32)
    kept = np.arange(40)[None]
    other = np.append(np.arange(39), 50)[None]
    a, b = ({"kept": k, "image_embeds": np.take_along_axis(embeds, k[..., None], 1)} for k in (kept, other))
    rows = Judge("vision", "onnxruntime", "tensorrt", TOLERANCES["fp16"]).vision(b, a, 64, None)
    assert [r.verdict for r in rows] == ["ok", "ok"]
    assert rows[0].error == pytest.approx(2 / 41)
    b["image_embeds"][0, 7] += 1
    rows = Judge("vision", "onnxruntime", "tensorrt", TOLERANCES["fp16"]).vision(b, a, 64, None)
    assert [r.verdict for r in rows] == ["ok", "FAILED"]


@pytest.mark.parametrize(
    ("kind", "selector"),
    [("static", "flowcut"), ("masked", "flowcut"), ("masked", "no-history"), ("static", "cls"), ("static", "random")],
)
def test_torch_led_by_its_own_choice_is_torch(kind: str, selector: str) -> None:
    weights = resolve("llava-tiny").weights
    schedule = make_schedule(kind, weights.config.vision, 16, selector)
    pixels = module.pictures(3, weights.config.vision.image_size, 0)
    embeds, kept = VisionModel.from_weights(weights)(torch.from_numpy(pixels), schedule)
    contract = vision_contract(weights.config, 16, "fp32", Limits())
    with TorchVision(ExportedWeights(weights, "fp32"), contract, schedule) as runner:
        led = runner.lead(pixels, kept.numpy(), 1e-9)
        swapped = kept.numpy().copy()
        absent = np.setdiff1d(np.arange(PATCHES), swapped[0])
        swapped[0] = np.sort(np.append(swapped[0, 1:], absent[-1]))
        assert runner.lead(pixels, swapped, 1e-9).widest_gap > 1e-2
        assert runner.lead(pixels, swapped, 1e-9).firm_gap == runner.lead(pixels, swapped, 1e-9).widest_gap
        if len(schedule.counts) > 1:
            assert runner.lead(pixels, swapped, 1.0).firm_gap == 0.0  # everything is a tie from the first point on
    assert led.widest_gap == led.firm_gap == 0.0
    assert 0 < led.closest_call < 1
    assert relative_error(np.stack(led.image_embeds), embeds.detach().numpy()) < 1e-5


def test_swapped_rows_are_measured_at_the_cut() -> None:
    scores = torch.tensor([0.5, 0.9, 0.4, 0.8, 0.1])
    own = choose(scores, torch.tensor([False, True, False, True, False]), 3)
    assert own[0].tolist() == [0, 1, 3]
    assert own[1:] == pytest.approx((0.0, 0.1 / 0.5))
    near = choose(scores, torch.tensor([False, True, True, True, False]), 3)
    assert near[0].tolist() == [1, 2, 3]
    assert near[1] == pytest.approx((0.5 - 0.4) / 0.5)
    # the best row was dropped for the worst: the cut alone would not show how wrong that is
    far = choose(scores, torch.tensor([True, False, False, True, True]), 3)
    assert far[0].tolist() == [0, 3, 4]
    assert far[1] == pytest.approx((0.9 - 0.1) / 0.5)
    assert choose(scores, torch.ones(5, dtype=torch.bool), 5)[1:] == (0.0, math.inf)
    assert choose(torch.zeros(3), torch.tensor([False, False, True]), 1)[1] == 0.0


# TensorRT, played by ONNX Runtime


def test_without_a_gpu_engines_are_not_run(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpu_present", lambda: False)
    report = verify(rehash(engine, backend="rtx"))
    assert report.ok
    for graph in ("vision", "language"):
        found = row(report, graph, "tensorrt_rtx", "all")
        assert (found.verdict, found.detail, found.reference) == ("not run", "no CUDA GPU", "onnxruntime")


def test_engines_are_compared_with_onnxruntime(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify(pretend_gpu(monkeypatch, engine, lambda outputs: None))
    assert report.ok
    found = [r for r in report.rows if r.runner == "tensorrt_rtx" and r.error is not None]
    assert len(found) == 7
    assert {(r.reference, r.verdict, r.error) for r in found} == {("onnxruntime", "ok", 0.0)}


def test_engines_of_a_changed_directory_are_not_run(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, engine, lambda outputs: pytest.fail("the engine was run"))
    (engine / "new").touch()
    report = verify(engine)
    assert failed(report) == {("directory", "size, sha256")}
    for graph in ("vision", "language"):
        found = row(report, graph, "tensorrt_rtx", "all")
        assert (found.verdict, found.detail) == (
            "not run",
            "the directory was changed, and an engine is executable code",
        )


@pytest.mark.parametrize("what", ["tensorrt_rtx", "GPU"])
def test_engines_of_another_version_or_gpu_are_not_run(
    engine: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As load_engine refuses them."""
    pretend_gpu(monkeypatch, engine, lambda outputs: pytest.fail("the engine was run"))
    monkeypatch.setattr(module, "checks_here", checks_here)
    fake_gpu.install(monkeypatch)
    versions = {"tensorrt_rtx": "0.1" if what == "tensorrt_rtx" else fake_gpu.VERSION}
    report = verify(rehash(engine, versions=versions, compute_capabilities=("sm86",)))
    assert report.ok
    for graph in ("vision", "language"):
        found = row(report, graph, "tensorrt_rtx", "all")
        assert found.verdict == "not run"
        assert found.detail.startswith(f"{what} must be ")


def test_engines_without_their_library_are_not_run(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(manifest: object, backend: str) -> None:
        raise EngineError("tensorrt_rtx is not installed.")

    pretend_gpu(monkeypatch, engine, lambda outputs: pytest.fail("the engine was run"))
    monkeypatch.setattr(module, "checks_here", refuse)
    report = verify(engine)
    assert row(report, "vision", "tensorrt_rtx", "all").detail == "tensorrt_rtx is not installed."


def test_rejects_an_engine_with_other_results(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(outputs: dict[str, np.ndarray]) -> None:
        if "logits" in outputs:
            outputs["logits"][0, 0] = np.nan
            outputs["present.0.value"][0, :, 0] += 1
        else:
            outputs["image_embeds"] *= 1.5

    report = verify(pretend_gpu(monkeypatch, engine, change))
    assert {r.runner for r in report.rows if r.verdict == "FAILED"} == {"tensorrt_rtx"}
    assert {("vision", "image_embeds"), ("language", "logits, prefill"), ("language", "cache")} <= failed(report)
    assert row(report, "language", "tensorrt_rtx", "logits, prefill").detail == "not finite"
    json.dumps(report.to_dict(), allow_nan=False)


def test_rejects_an_engine_that_does_not_load(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runner(path: Path, backend: str) -> OnnxrtRunner:
        return OnnxrtRunner(lambda: (_ for _ in ()).throw(RuntimeError("driver\ntoo old")), name="fake")

    monkeypatch.setattr(module, "gpu_present", lambda: True)
    monkeypatch.setattr(module, "checks_here", lambda manifest, backend: [])
    monkeypatch.setattr(module, "engine_runner", runner)
    report = verify(rehash(engine, backend="rtx"))
    assert failed(report) == {("vision", "signature"), ("language", "signature")}
    assert row(report, "vision", "tensorrt_rtx", "signature").detail == "driver too old"


@pytest.mark.gpu
def test_real_engines_agree(build: Build) -> None:
    report = verify(build("fp16", backend="rtx"))
    assert report.ok, report.rows
    assert row(report, "language", "tensorrt_rtx", "logits, prefill").error


# Where the weights come from


def test_a_local_checkpoint_that_moved_has_to_be_named(tmp_path: Path) -> None:
    source = shutil.copytree(ASSETS / "llava-tiny", tmp_path / "mine")
    settings = BuildSettings(str(source), precision="fp16", backend="ort", out=tmp_path / "engine")
    directory = build_directory(settings, Progress(disable=True)).directory
    assert verify(directory).ok  # found where it was
    source = source.rename(tmp_path / "moved")
    report = verify(directory)
    assert not report.ok  # nothing was compared with anything
    assert not failed(report)
    assert row(report, "vision", "torch", "all").detail == "checkpoint not found; pass --checkpoint DIR"
    console = Console(file=StringIO(), width=200)
    print_report(console, report)
    assert "Not verified: the values of language and vision" in console.file.getvalue()  # type: ignore[attr-defined]
    assert verify(directory, checkpoint=str(source)).ok


def test_refuses_another_checkpoint(build: Build, flat_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint must be the one that was exported"):
        verify(build("fp32"), checkpoint=str(flat_checkpoint))


def test_refuses_what_is_no_engine_directory(build: Build, engine: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="must be an engine directory"):
        verify(tmp_path / "none")
    with pytest.raises(ConfigError, match="samples must be at least 1, got 0"):
        verify(engine, samples=0)


# The figures


def test_reports_name_the_figures(build: Build) -> None:
    report = verify(build("fp16"))
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["ok"] is True
    assert data["note"] == ""
    assert data["tolerance"]["values"] == data["vision_tolerance"]["values"] == 2e-2
    assert data["vision_tolerance"]["values_after_tie"] == 0.1
    console = Console(file=StringIO(), width=200)
    print_report(console, replace(report, note="random weights", model="a\x1b[2J"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "(random weights)" in text
    assert "\x1b" not in text
    assert "2.0e-02" in text


def test_relative_error_and_agreement() -> None:
    assert relative_error(np.array([1.0, 3.0]), np.array([1.0, -4.0])) == 7 / 4
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0
    assert relative_error(np.ones(2), np.zeros(2)) == math.inf
    assert math.isnan(relative_error(np.array([np.inf]), np.array([np.inf])))
    assert relative_error(np.float16([60000.0]), np.float16([-60000.0])) == 2.0  # the difference is beyond float16
    assert jaccard(np.array([[0, 1], [2, 3]]), np.array([[0, 1], [3, 4]])) == 1 / 3
