"""Directories of every kind, opened as `flowcut run` does: stages, mixed precisions, bf16."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from PIL import Image
from tiny_engine import TinyEngine, write_engine

from engines import load_engine, loading
from engines.options import Options
from engines.runtime.engine import Sampling
from engines.sessions.ort_session import OrtSession
from engines.sessions.stages import Chain
from flowcut.artifacts import read_manifest, write_manifest
from flowcut.errors import EngineError
from flowcut.prompt import question_prompt

PROMPTS = [question_prompt("What is this?"), question_prompt("Which of the two apples on the table is red?")]
Write = Callable[..., TinyEngine]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """write(..) -> a directory of the same random weights, written once: do not change it."""
    made: dict[str, TinyEngine] = {}

    def make(**settings: Any) -> TinyEngine:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = write_engine(tmp_path_factory.mktemp("loading") / "engine", random=True, **settings)
        return made[key]

    return make


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((210, 190), Image.Resampling.BICUBIC) for each in noise]


def answer(directory: Path, backend: str = "ort") -> tuple[np.ndarray, list[list[int]]]:
    """Logits of a prefill of two prompts, and what follows."""
    engine = load_engine(directory, backend, threads=1)
    logits = engine.prefill(pictures(), PROMPTS).logits
    return logits, engine.generate(pictures(), PROMPTS, Sampling(12)).token_ids


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_answer_as_one_graph_does(write: Write, stages: int) -> None:
    logits, tokens = answer(write(stages=stages).directory)
    expected = answer(write().directory)
    assert error(logits, expected[0]) < 1e-5
    assert tokens == expected[1]


@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_stages_answer_the_same_on_a_gpu(write: Write, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(write().directory)
    fake_gpu.install(monkeypatch)
    logits, tokens = answer(write(stages=3, backend=backend).directory, backend)
    assert error(logits, expected[0]) < 1e-5
    assert tokens == expected[1]


def test_every_stage_has_the_one_device(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu.install(monkeypatch)
    language = loading.open_directory(write(stages=2, backend="rtx").directory, "rtx", Options()).language
    assert isinstance(language, Chain)
    assert len({id(stage.device) for stage in language.stages}) == 1  # type: ignore[attr-defined]
    assert len({stage.device.compute for stage in language.stages}) == 1  # type: ignore[attr-defined]
    assert gpu.streams  # of copies there are more


@pytest.mark.parametrize(("graph", "backend"), [("language.1.onnx", "ort"), ("language.0.onnx.data", "ort")])
def test_a_directory_without_a_stage_is_refused(tmp_path: Path, graph: str, backend: str) -> None:
    directory = write_engine(tmp_path / "engine", stages=2).directory
    (directory / graph).unlink()
    with pytest.raises(EngineError, match=rf"{graph}: missing"):
        load_engine(directory, backend)


def test_a_changed_plan_of_a_stage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch)
    directory = write_engine(tmp_path / "engine", stages=2, backend="rtx").directory
    plan = directory / "language.1.engine"
    plan.write_bytes(plan.read_bytes()[::-1])
    with pytest.raises(EngineError, match=r"language\.1\.engine: expected sha256"):
        load_engine(directory, "rtx")


def test_a_stage_that_no_manifest_names_is_refused(tmp_path: Path) -> None:
    directory = write_engine(tmp_path / "engine", stages=2).directory
    write_manifest(directory, replace(read_manifest(directory), stages=3))
    with pytest.raises(EngineError, match=r"language\.2\.onnx: neither in the manifest nor there"):
        load_engine(directory)


def test_a_directory_that_is_replaced_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest is of the old one, what was opened of the new one, and nobody hashed that."""
    directory, newer = (write_engine(tmp_path / name).directory for name in ("engine", "newer"))
    really = loading._sessions

    def replaced_before(*arguments: Any) -> Any:
        directory.rename(tmp_path / "older")
        newer.rename(directory)
        return really(*arguments)

    monkeypatch.setattr(loading, "_sessions", replaced_before)
    with pytest.raises(EngineError) as caught:
        load_engine(directory)
    assert str(caught.value) == f"{directory} was replaced while it was being loaded. Load it again."
    monkeypatch.setattr(loading, "_sessions", really)
    assert load_engine(directory, threads=1).generate([], "hello", Sampling(2)).token_ids


@pytest.mark.parametrize("stages", [1, 2])
def test_bf16_answers_in_float32_and_says_so(write: Write, stages: int, caplog: pytest.LogCaptureFixture) -> None:
    logits, _ = answer(write(precision="bf16", stages=stages).directory)
    named = "vision, language" if stages == 1 else "vision, language.0, language.1"
    assert set(caplog.messages) == {
        f"{named}: bf16 weights, computed in float32: ONNX Runtime's CPU provider has no bf16 kernels."
    }
    exact, _ = answer(write().directory)
    assert 1e-4 < error(logits, exact) < 0.2  # what bf16 weights change, in a model that was never trained


@pytest.mark.parametrize(
    ("vision", "language"), [("bf16", "fp16"), ("fp16", "bf16"), ("int8", "fp32"), ("fp32", "int4")]
)
def test_vision_may_have_another_precision(write: Write, vision: str, language: str) -> None:
    logits, _ = answer(write(precision=language, vision_precision=vision).directory)
    exact, _ = answer(write().directory)
    assert np.isfinite(logits).all()
    assert error(logits, exact) > 1e-4


def test_bf16_on_a_gpu_keeps_its_type(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = answer(write(precision="bf16").directory)
    fake_gpu.install(monkeypatch)
    logits, tokens = answer(write(precision="bf16", backend="rtx", stages=2).directory, "rtx")
    assert error(logits, expected) < 1e-5
    assert all(tokens)


def test_on_cuda_a_bf16_file_is_tried_as_it_is(
    write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And widened where its provider refuses, as the CPU's does here."""
    caplog.set_level(logging.INFO, "flowcut")
    directory, tried = write(precision="bf16").directory, []

    class Watched(OrtSession):
        def __init__(self, path: Path, *arguments: Any) -> None:
            tried.append(path.is_relative_to(directory))
            super().__init__(path, *arguments)

    monkeypatch.setattr(loading, "OrtSession", Watched)
    monkeypatch.setattr(loading, "on_cuda", lambda: True)
    load_engine(directory, "ort")
    assert tried == [True, False] * 2
    assert "vision: not as it is: " in caplog.text
    assert "computed in float32" in caplog.text
