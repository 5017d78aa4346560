"""Precisions, calibration and stages: what is chosen, and what is refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from calib.calibration import load_calibration, write_calibration
from engines import numerics as module
from engines.numerics import Numerics, build_targets, check_precision, choose_numerics, weight_bytes
from engines.pipeline import BuildSettings, build_directory
from engines.progress import terminal_progress
from flowcut.aliases import Model, resolve
from flowcut.config import Precision
from flowcut.errors import ConfigError, EngineError
from flowcut.tensors import expected_tensors


@pytest.fixture
def random_tiny() -> Model:
    """llava-tiny's geometry; a random checkpoint has no calibration of its own."""
    return resolve("llava-tiny", random=True)


def test_only_onnx_runtime_takes_fp32() -> None:
    with pytest.raises(
        EngineError,
        match=r"one of fp16, bf16, int8, int4, fp8 for backend rtx.*fp32.*not decomposable",
    ):
        check_precision("rtx", {"fp32"})
    with pytest.raises(EngineError, match="backend trt, of both graphs, got"):
        check_precision("trt", {"fp16", "fp32"})
    check_precision("rtx", {"fp16"})
    check_precision("ort", {"fp32"})


def test_a_gpu_without_fp8_is_refused_with_the_precisions_that_it_has() -> None:
    with pytest.raises(EngineError, match=r"one of fp16, bf16, int8, int4 on sm80, sm86, got 'fp8'.*from sm89 on"):
        check_precision("rtx", {"fp8"}, ("sm80", "SM86", "sm89"))
    with pytest.raises(EngineError, match=r"one of fp16, int8, int4 on sm75, got 'bf16'.*from sm80 on"):
        check_precision("rtx", {"bf16"}, ("sm75",))
    check_precision("rtx", {"fp8"}, ("sm89", "sm120"))
    check_precision("rtx", {"int4", "int8", "bf16"}, ("sm80",))
    check_precision("ort", {"fp8"})


def test_for_tensorrt_the_gpu_present_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpu_sm", lambda: 80)
    with pytest.raises(EngineError, match="on sm80, got 'fp8'"):
        check_precision("trt", {"fp8"})
    monkeypatch.setattr(module, "gpu_sm", lambda: 90)
    check_precision("trt", {"fp8"})


def test_fp8_is_compiled_for_the_gpus_that_have_it_where_none_is_named() -> None:
    targets = build_targets("rtx", {"fp8"}, ())
    assert "sm89" in targets
    assert all(int(name.removeprefix("sm")) >= 89 for name in targets)
    assert build_targets("rtx", {"fp8"}, ("sm120",)) == ("sm120",)
    assert build_targets("rtx", {"fp16", "int4"}, ()) == build_targets("ort", {"fp8"}, ()) == ()


@pytest.mark.parametrize(
    ("precision", "given", "backend", "vision"),
    [
        ("int4", None, "rtx", "int8"),
        ("int4", None, "ort", "int8"),
        ("int4", None, "trt", "fp16"),
        ("int4", "int4", "rtx", "int4"),
        ("int8", None, "rtx", "int8"),
        ("fp16", "int8", "rtx", "int8"),
    ],
)
def test_the_vision_tower_has_the_decoders_precision_but_for_int4(
    precision: Precision, given: Precision | None, backend: module.Backend, vision: Precision, random_tiny: Model
) -> None:
    chosen, path = choose_numerics(random_tiny, backend, precision, given, 1, None)
    assert (chosen.precision, chosen.vision, chosen.calibration, path) == (precision, vision, None, None)


def test_a_calibration_that_nothing_uses_is_refused(random_tiny: Model) -> None:
    for precision in ("fp16", "int8", "bf16"):
        with pytest.raises(
            ConfigError, match=rf"left out for precisions {precision} and {precision}.*got 'c.safetensors'"
        ):
            choose_numerics(random_tiny, "ort", precision, None, 1, "c.safetensors")  # type: ignore[arg-type]


@pytest.mark.parametrize(("made_for", "asked", "remedy"), [("fp8", "int4", "--calibration none"), ("int4", "fp8", "")])
def test_a_calibration_made_for_another_precision_is_refused(
    made_for: str, asked: Precision, remedy: str, tmp_path: Path
) -> None:
    tiny = resolve("llava-tiny")
    own = load_calibration(tiny.files / "calibration.safetensors", tiny.weights)
    ranges, scales = (own.ranges, {}) if made_for == "fp8" else ({}, own.scales)
    path = tmp_path / "c.safetensors"
    write_calibration(path, tiny.weights, ranges, scales, {"pictures": []})
    with pytest.raises(ConfigError, match=rf"made with --precision {asked} or all.*got one without.*{remedy}"):
        choose_numerics(tiny, "ort", asked, asked, 1, str(path))
    assert choose_numerics(tiny, "ort", made_for, made_for, 1, str(path))[1] == path  # type: ignore[arg-type]


def test_fp8_without_a_calibration_says_how_to_make_one(random_tiny: Model) -> None:
    for vision in (None, "fp16"):
        with pytest.raises(ConfigError, match=r"must be given.*quantize llava-tiny --weights random --images"):
            choose_numerics(random_tiny, "rtx", "fp8", vision, 1, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("stages", [0, 5])
def test_stages_are_at_most_the_layers(stages: int, random_tiny: Model) -> None:
    with pytest.raises(ConfigError, match=rf"stages must be in 1\.\.4 \(layers\), got {stages}"):
        choose_numerics(random_tiny, "ort", "fp16", None, stages, None)


def test_int4_is_refused_for_layers_that_no_block_divides(random_tiny: Model) -> None:
    odd = replace(random_tiny.config, text=replace(random_tiny.config.text, intermediate_size=200))
    with pytest.raises(ConfigError, match=r"must be a multiple of 64, got 200"):
        choose_numerics(replace(random_tiny, config=odd), "ort", "int4", None, 1, None)


def test_a_build_beyond_the_memory_is_announced_with_what_takes_less(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """LLaVA-1.5-13B's 26 GB of float16 weights, and a machine of 24 GB with 22 GB free."""
    config = resolve("llava-1.5-13b", random=True).config
    monkeypatch.setattr(module, "free_memory", lambda: 22_000_000_000)
    module.warn_of_memory(config, Numerics("fp16", "fp16"))
    assert "Compiling takes about 29 GB of memory, and 22 GB are free. --stages 2" in caplog.text
    caplog.clear()
    for fits in (Numerics("fp16", "fp16", stages=2), Numerics("int4", "int8")):
        module.warn_of_memory(config, fits)
    module.warn_of_memory(resolve("llava-1.5-7b", random=True).config, Numerics("fp16", "fp16"))
    assert caplog.text == ""


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_predicted_bytes_are_those_that_are_written_but_for_the_towers_unused_layer(
    precision: Precision, tmp_path: Path
) -> None:
    settings = BuildSettings("llava-tiny", random=True, precision=precision, backend="ort", out=tmp_path / "e")
    with terminal_progress() as progress:
        manifest = build_directory(settings, progress).manifest
    written = sum(r.bytes for name, r in manifest.files.items() if name.endswith(".data"))
    predicted = weight_bytes(manifest.geometry, Numerics(precision, manifest.vision_precision))
    shapes = expected_tensors(manifest.geometry)
    unused = sum(prod(shape) for name, shape in shapes.items() if ".layers.11." in name or "post_layernorm" in name)
    assert written <= predicted <= written * 1.05 + 4 * unused
