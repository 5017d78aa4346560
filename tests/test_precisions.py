"""Every precision from a checkpoint to an answer: exported, compiled by TensorRT-RTX, run by ONNX Runtime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress

from engines import load_engine
from engines.build import build_engine
from engines.pipeline import BuildSettings, Built, build_directory, save_graph
from export.language import language_model
from flowcut.aliases import ASSETS, resolve
from flowcut.artifacts import check_files
from flowcut.config import Precision
from flowcut.contract import Limits, language_contract
from flowcut.deps import available
from flowcut.errors import CheckpointError, ConfigError, EngineError
from flowcut.integrity import MANIFEST
from flowcut.prompt import question_prompt
from flowcut.tensors import expected_tensors
from flowcut.tiny.scenes import make_scene, render

safetensors = pytest.importorskip("safetensors.numpy")
needs_rtx = pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")

SCENE = ASSETS / "example" / "scene.png"
COMPILED: tuple[tuple[Precision, int], ...] = (("bf16", 1), ("int8", 1), ("fp8", 1), ("int4", 1), ("int4", 2))
RUN: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
WEIGHT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
WIDE = Limits(1, 1, 256, 64)


def build(out: Path, **changes: Any) -> Built:
    with Progress(disable=True) as progress:
        return build_directory(BuildSettings(**{"model": "llava-tiny", "out": out, **changes}), progress)


@needs_rtx
@pytest.mark.parametrize(("precision", "stages"), COMPILED)
def test_a_compiled_precision_answers(precision: Precision, stages: int, tmp_path: Path) -> None:
    built = build(tmp_path / "e", precision=precision, stages=stages, backend="rtx")
    assert built.manifest.precision == precision
    assert [n for n in built.manifest.files if n.endswith(".engine")] == sorted(f"{g}.engine" for g in built.reports)
    assert len(built.reports) == 1 + stages
    assert all(r.engine_bytes > r.weight_bytes and not r.warnings for r in built.reports.values())
    assert check_files(built.directory, built.manifest) == []
    answer = load_engine(built.directory).generate(SCENE, question_prompt("What color is the circle?"))
    assert answer.texts == ["red"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision], Path]:
    """Built for ONNX Runtime, each once."""
    root, known = tmp_path_factory.mktemp("directories"), dict[str, Path]()

    def get(precision: Precision) -> Path:
        if precision not in known:
            known[precision] = build(root / precision, precision=precision, backend="ort").directory
        return known[precision]

    return get


@pytest.mark.parametrize("precision", RUN)
def test_a_precision_keeps_nearly_the_patches_of_float32_and_its_logits(
    precision: Precision, directory: Callable[[Precision], Path]
) -> None:
    """What is not alike is precision's own doing; results/precision.md has how much over many questions."""
    pictures = [render(make_scene("test", number)) for number in range(24)]  # of 4 two answers may differ, by processor
    prompt = question_prompt("How many objects are there?")
    engines = [load_engine(directory(p), "ort") for p in (precision, "fp32")]
    own, exact = ([engine.prefill(picture, prompt) for picture in pictures] for engine in engines)
    both = [(set(a.kept[0][0].tolist()), set(b.kept[0][0].tolist())) for a, b in zip(own, exact, strict=True)]
    assert np.mean([len(a & b) / len(a | b) for a, b in both]) > (0.999 if precision == "fp32" else 0.75)
    same = np.mean([a.logits.argmax() == b.logits.argmax() for a, b in zip(own, exact, strict=True)])
    assert same >= (1.0 if precision in ("fp32", "fp16") else 0.75)


def test_fewer_bits_make_smaller_files(directory: Callable[[Precision], Path]) -> None:
    """Linear layers only: embeddings, norms, positions and the head stay."""
    config = resolve("llava-tiny").config
    shapes = expected_tensors(config)
    linear = sum(
        a * b for name, (a, *rest) in shapes.items() if ".layers." in name and "language" in name for b in rest
    )
    for precision in ("int8", "int4"):
        sizes = [(directory(p) / "language.onnx.data").stat().st_size for p in ("fp16", precision)]
        scales = linear * 2 // 64 if precision == "int4" else 0
        saved = linear * (16 - WEIGHT_BITS[precision]) // 8 - scales
        assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.02)


def test_a_checkpoint_with_nan_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    source = shutil.copytree(ASSETS / "llava-tiny", tmp_path / "broken")
    tensors = safetensors.load_file(source / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith("language_model.layers.2.mlp.up_proj.weight")
               or n == "language_model.model.layers.2.mlp.up_proj.weight")  # fmt: skip
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan
    safetensors.save_file(tensors, source / "model.safetensors")
    for precision in ("fp16", "int8", "int4"):
        with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\..*up_proj\.weight must be finite, got nan at \["):
            build(tmp_path / "e", model=str(source), precision=precision, backend="ort", calibration="none")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_a_weight_beyond_float16_asks_for_another_precision(tmp_path: Path) -> None:
    source = shutil.copytree(ASSETS / "llava-tiny", tmp_path / "large")
    tensors = {n: t.astype(np.float32) for n, t in safetensors.load_file(source / "model.safetensors").items()}
    (name,) = (n for n in tensors if n.endswith("layers.1.input_layernorm.weight"))
    tensors[name][7] = 1e6
    safetensors.save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight must be finite in fp16, got inf at \[7\]"):
        build(tmp_path / "e", model=str(source), backend="ort")
    build(tmp_path / "e", model=str(source), precision="bf16", backend="ort")


def test_a_linear_weight_beyond_float16_is_refused_in_every_precision_that_computes_in_it(tmp_path: Path) -> None:
    source = shutil.copytree(ASSETS / "llava-tiny", tmp_path / "large")
    tensors = {n: t.astype(np.float32) for n, t in safetensors.load_file(source / "model.safetensors").items()}
    (name,) = (n for n in tensors if n.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name][3, 5] = 1e6
    safetensors.save_file(tensors, source / "model.safetensors")
    for precision in ("fp16", "int8", "int4"):
        with pytest.raises(CheckpointError, match=rf"down_proj\.weight must be finite in {precision}, got inf at \["):
            build(tmp_path / "e", model=str(source), precision=precision, backend="ort", calibration="none")


def test_fp8_for_a_gpu_without_it_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    if not available("tensorrt_rtx"):
        pytest.skip("needs the rtx extra (tensorrt-rtx-cu13)")
    with pytest.raises(EngineError, match=r"one of fp16, bf16, int8, int4 on sm80, got 'fp8'"):
        build(tmp_path / "e", precision="fp8", backend="rtx", compute_capabilities=("sm80",))
    with pytest.raises(ConfigError, match="calibration must be given for precision fp8"):
        build(tmp_path / "e", precision="fp8", backend="rtx", random=True)
    assert list(tmp_path.iterdir()) == []


def test_another_checkpoints_calibration_is_refused(tmp_path: Path) -> None:
    source = shutil.copytree(ASSETS / "llava-tiny", tmp_path / "other")
    tensors = safetensors.load_file(source / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] * np.float16(0.5)
    safetensors.save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"must be made for this checkpoint, whose sha256 is .{12}, got one for .{12}"
    ):
        build(tmp_path / "e", model=str(source), precision="int4", backend="ort")
    built = build(tmp_path / "e", model=str(source), precision="int4", backend="ort", calibration="none")
    assert built.manifest.calibration == {}
    assert {p.name for p in (tmp_path / "e").iterdir()} == {*built.manifest.files, MANIFEST}


@needs_rtx
@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_an_engine_of_a_7b_layer_holds_its_weights_once(precision: Precision, tmp_path: Path) -> None:
    """Layers are 0.2 to 0.8 GB here, so a second copy of them would be beyond what is allowed."""
    model = resolve("llava-1.5-7b", random=True, decoder_layers=2)
    contract = language_contract(model.config, 64, precision, WIDE)
    path = tmp_path / "language.onnx"
    with Progress(disable=True) as progress:
        save_graph(language_model(model.weights, contract, precision, {}), path, progress)
        report = build_engine(path, tmp_path / "language.engine", contract, "rtx", (), progress)
    shapes = expected_tensors(model.config)
    linear = sum(
        a * b for name, (a, *rest) in shapes.items() if ".layers." in name and "language" in name for b in rest
    )
    assert report.weight_bytes < path.with_suffix(".onnx.data").stat().st_size * 1.001
    assert report.engine_bytes <= report.weight_bytes * 1.05 + 60e6 < report.weight_bytes + linear * 0.5
