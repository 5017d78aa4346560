"""flowcut verify where visual tokens are dropped inside the decoder, and where pictures are tiles."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import WriteCheckpoint
from next_checkpoint import write_next
from polygraphy.backend.onnxrt import OnnxrtRunner
from rich.progress import Progress

from engines import verify as module
from engines import verify_inputs
from engines.comparison import TOLERANCES, Row
from engines.loading import graph_contracts
from engines.pipeline import BuildSettings, build_directory
from engines.reference import ExportedWeights
from engines.reference_next import TorchPruning, TorchTiles
from engines.runners import onnx_runner
from engines.verify import Report, verify
from flowcut.aliases import resolve
from flowcut.anyres import NO_TOKEN
from flowcut.artifacts import read_manifest, write_manifest
from flowcut.contract import Limits, vision_contract
from flowcut.schedule import make_schedule

pytestmark = pytest.mark.usefixtures("one_thread")

Build = Callable[..., Path]
Outputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def source(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_next(checkpoint("tiny", seed=2), tmp_path_factory.mktemp("next") / "checkpoint")


@pytest.fixture(scope="module")
def build(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(precision, ..) -> engine directory, built once; copy it before changing it. Of LLaVA-NeXT, if not said."""
    built: dict[str, Path] = {}

    def write(precision: str = "fp32", **settings: Any) -> Path:
        key = repr((precision, sorted(settings.items())))
        if key not in built:
            out = tmp_path_factory.mktemp("engines") / "engine"
            chosen = {"model": str(source), "tokens": 24, "precision": precision, "backend": "ort", **settings}
            built[key] = build_directory(BuildSettings(out=out, **chosen), Progress(disable=True)).directory
        return built[key]

    return write


@pytest.fixture
def engine(build: Build, tmp_path: Path) -> Path:
    """A copy of the fp32 engine, to be spoiled."""
    return shutil.copytree(build("fp32"), tmp_path / "engine")


def rehash(directory: Path, **changes: Any) -> Path:
    write_manifest(directory, replace(read_manifest(directory), **changes))
    return directory


def failed(report: Report) -> set[tuple[str, str]]:
    return {(r.graph, r.output) for r in report.rows if r.verdict == "FAILED"}


def row(report: Report, graph: str, runner: str, output: str) -> Row:
    (found,) = (r for r in report.rows if (r.graph, r.runner, r.output) == (graph, runner, output))
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "bf16": {"precision": "bf16"},
    "masked": {"schedule": "masked"},
    "two stages": {"stages": 2},
    "three stages": {"stages": 3, "precision": "fp16"},
    "nothing pruned": {"tokens": "all"},
    "two tokens": {"tokens": 2},
    "one short prompt": {"max_batch": 1, "max_images": 1, "max_prompt": 62, "max_new_tokens": 1},
    "llava-tiny": {"model": "llava-tiny", "tokens": 48, "llm_tokens": 16},
    "llava-tiny in fp16": {"model": "llava-tiny", "tokens": 48, "llm_tokens": 16, "precision": "fp16", "stages": 2},
    "llava-tiny, all from the tower": {"model": "llava-tiny", "tokens": "all", "llm_tokens": 9},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_accepts_what_was_built(build: Build, case: str) -> None:
    report = verify(build(**SETTINGS[case]))
    assert report.ok, report.rows
    worst = max(r.error for r in report.rows if r.error is not None and not r.output.startswith("kept"))
    assert worst < (1e-5 if SETTINGS[case].get("precision", "fp32") == "fp32" else 5e-3)


def test_compares_what_the_decoder_drops(build: Build) -> None:
    report = verify(build("fp32"), samples=3)
    assert report.inputs.startswith("3 pictures of 5, 3, 4 tiles; prompts of ")
    compared = [r.output for r in report.rows if r.graph == "language" and r.reference == "torch"]
    assert compared == [
        *("kept_tokens", "lengths", "pruned_lengths", "logits, prefill"),
        *(f"logits, decode {i}" for i in (1, 2, 3)),
        "cache",
    ]
    assert all(r.error for r in report.rows if r.output.startswith("logits"))


def test_the_pictures_have_padding_and_fewer_tokens_than_rows(source: Path) -> None:
    config = resolve(str(source)).config
    each = verify_inputs.tilings(config, 4)
    assert len({cut.tiles for cut in each}) > 1
    assert any(len(cut.seen[0]) * len(cut.seen[1]) < cut.grid[0] * cut.grid[1] for cut in each)


def test_rejects_another_newline(build: Build, tmp_path: Path) -> None:
    directory = shutil.copytree(build("fp32", tokens="all"), tmp_path / "engine")
    spoil(directory / "vision.onnx", "image_newline")
    assert {("vision", "weights"), ("vision", "image_embeds")} <= failed(verify(rehash(directory)))


def spoil(path: Path, name: str) -> None:
    """Negate a small tensor, which is in the file itself."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), name))
    onnx.save(model, path)


def test_rejects_another_number_of_tokens_in_the_manifest(engine: Path) -> None:
    model = onnx.load(engine / "language.onnx", load_external_data=False)
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["flowcut.llm_tokens"] == "24"
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, properties | {"flowcut.llm_tokens": "23"})
    onnx.save(model, engine / "language.onnx")
    report = verify(rehash(engine))
    assert failed(report) == {("language", "metadata")}


# An engine with other results, played by ONNX Runtime


class Tampered(OnnxrtRunner):
    """ONNX Runtime in TensorRT's place, with its inputs or outputs changed."""

    change: Callable[[Outputs], None]

    def infer_impl(self, feed_dict: Any) -> Outputs:
        outputs = {name: array.copy() for name, array in super().infer_impl(feed_dict).items()}
        self.change(outputs)
        return outputs


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, directory: Path, change: Callable[[Outputs], None]) -> Path:
    def runner(path: Path, backend: str) -> Tampered:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), options, ["CPUExecutionProvider"])
        tampered = Tampered(session, name="fake")
        tampered.change = change
        return tampered

    monkeypatch.setattr(module, "gpu_present", lambda: True)
    monkeypatch.setattr(module, "engine_runner", runner)
    return rehash(directory, backend="rtx")


def other_tokens(outputs: Outputs) -> None:
    if "kept_tokens" in outputs:
        outputs["kept_tokens"][:] = np.arange(outputs["kept_tokens"].shape[1])


def one_token_more(outputs: Outputs) -> None:
    if "kept_tokens" in outputs:
        outputs["pruned_lengths"] += 1


def a_gap(outputs: Outputs) -> None:
    if "kept" in outputs:
        outputs["image_lengths"] -= 1


def no_order(outputs: Outputs) -> None:
    for name in outputs.keys() & {"kept", "kept_tokens"}:
        outputs[name][:, :2] = outputs[name][:, 1::-1]


def the_padding(outputs: Outputs) -> None:
    """Patches in the padding: what a wrong order would pack."""
    if "kept" in outputs:
        outputs["kept"][outputs["kept"] == NO_TOKEN] = 2 * 300
        outputs["image_lengths"][:] = outputs["kept"].shape[1]


def cache_of_a_late_layer(outputs: Outputs) -> None:
    if "present.3.key" in outputs:
        outputs["present.3.key"][:, :, 8] += 1


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (other_tokens, ("language", "kept_tokens")),
        (one_token_more, ("language", "pruned_lengths")),
        (a_gap, ("vision", "kept")),
        (no_order, ("vision", "kept")),
        (no_order, ("language", "kept_tokens")),
        (the_padding, ("vision", "kept")),
        (cache_of_a_late_layer, ("language", "cache")),
    ],
)
def test_rejects_an_engine_with_other_results(
    engine: Path, change: Callable[[Outputs], None], wrong: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verify(pretend_gpu(monkeypatch, engine, change))
    assert wrong in failed(report)
    assert {r.runner for r in report.rows if r.verdict == "FAILED"} == {"tensorrt_rtx"}


def test_without_the_checkpoint_engines_are_compared_as_far_as_can_be(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = rehash(pretend_gpu(monkeypatch, engine, lambda _: None), source="")
    assert verify(directory).ok
    report = verify(pretend_gpu(monkeypatch, directory, other_tokens))
    assert ("language", "kept_tokens") in failed(report)
    assert "ties cannot be told" in row(report, "language", "tensorrt_rtx", "kept_tokens").detail


def test_values_are_compared_with_torch_keeping_the_same_tokens(
    engine: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that keeps others, and computes rightly with them: wrong, unless their scores are equal."""
    weights = ExportedWeights(resolve(str(source)).weights, "fp32")
    manifest = read_manifest(engine)
    other = np.tile(np.arange(24), (2, 1))

    def runner(path: Path, _: str) -> Any:
        if path.stem == "vision":
            return onnx_runner(path.with_suffix(".onnx"))
        torch = TorchPruning(weights, graph_contracts(manifest)[1])
        torch.follow = other
        return torch

    monkeypatch.setattr(module, "gpu_present", lambda: True)
    monkeypatch.setattr(module, "engine_runner", runner)
    rehash(engine, backend="rtx")
    report = verify(engine)
    assert failed(report) == {("language", "kept_tokens")}
    wrong = row(report, "language", "tensorrt_rtx", "kept_tokens")
    assert (wrong.reference, wrong.error is not None and wrong.error > 1e-2) == ("torch", True)
    for name in ("logits, prefill", "logits, decode 3", "cache"):
        assert row(report, "language", "tensorrt_rtx", name).verdict == "ok"
    monkeypatch.setitem(TOLERANCES, "fp32", replace(TOLERANCES["fp32"], score_gap=1e9))
    report = verify(engine)
    assert report.ok, report.rows
    assert row(report, "language", "tensorrt_rtx", "kept_tokens").verdict == "tie"


@pytest.mark.parametrize("kind", ["static", "masked"])
def test_torch_led_by_its_own_choice_is_torch(source: Path, kind: str) -> None:
    """Though which patches of the padding its tiles kept cannot be seen in what it is told."""
    weights = resolve(str(source)).weights
    schedule = make_schedule(kind, weights.config.vision, 12)
    cuts = verify_inputs.tilings(weights.config, 3)
    pixels = verify_inputs.pictures(sum(each.tiles for each in cuts), weights.config.vision.image_size, 0)
    contract = vision_contract(weights.config, 12, "fp32", Limits())
    with TorchTiles(ExportedWeights(weights, "fp32"), contract, schedule, cuts) as runner:
        outputs = runner.infer({"pixel_values": pixels, **others(contract, cuts, pixels)})
        kept = [row[:n] for row, n in zip(outputs["kept"], outputs["image_lengths"], strict=True)]
        led = runner.lead(pixels, kept, 1e-9)
        wrong = [np.delete(own, 3) for own in kept]
        assert runner.lead(pixels, wrong, 1e-9).widest_gap >= 0
    assert led.widest_gap == 0
    for i, tokens in enumerate(led.image_embeds):
        np.testing.assert_allclose(tokens, outputs["image_embeds"][i, : len(tokens)], rtol=1e-4, atol=1e-5)


def others(contract: Any, cuts: Any, pixels: np.ndarray) -> Outputs:
    """Inputs that the reference does not read: zeros."""
    sizes = {"images": len(cuts), "tiles": len(pixels)}
    return {s.name: np.zeros(s.shape(sizes), s.dtype) for s in contract.inputs[1:]}
