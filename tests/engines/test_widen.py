"""bf16 graphs in float32: the same numbers as torch with bf16 weights, and nothing left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from tiny_engine import LIMITS, TinyEngine, write_engine

from engines import widen as module
from engines.options import Options
from engines.sessions.ort_session import OrtSession
from engines.widen import widened, widened_contract
from flowcut.config import Precision
from flowcut.contract import GraphContract, language_contract, vision_contract
from flowcut.errors import EngineError, FlowCutError
from flowcut.language import KVCache, LanguageModel
from flowcut.tensors import numpy_dtype
from flowcut.vision import VisionModel

NUMPY_HAS = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("widen") / "engine", precision="bf16")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def open_graph(tiny: TinyEngine, contract: GraphContract) -> OrtSession:
    with widened(tiny.directory / f"{contract.name}.onnx") as path:
        return OrtSession(path, widened_contract(contract), Options(threads=1))


def narrowed(model: torch.nn.Module) -> torch.nn.Module:
    """With the weights that bf16 leaves, by torch's rounding rather than numpy's."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@torch.inference_mode()
def test_vision_is_torchs_with_bf16_weights(tiny: TinyEngine) -> None:
    weights = tiny.model.weights
    session = open_graph(tiny, vision_contract(weights.config, 16, "bf16", LIMITS))
    pixels = np.random.default_rng(0).standard_normal((2, 3, 168, 168)).astype(np.float32)
    got = session.run({"pixel_values": pixels}).arrays
    exact = VisionModel.from_weights(weights)
    embeds, kept = (t.numpy() for t in narrowed(VisionModel.from_weights(weights))(torch.tensor(pixels), tiny.schedule))
    np.testing.assert_array_equal(got["kept"], kept)
    # Class embedding and positions are rounded as one here, and quick_gelu's factor is bf16 too.
    assert error(got["image_embeds"], embeds) < 1e-2
    assert error(embeds, exact(torch.tensor(pixels), tiny.schedule)[0].numpy()) > 1e-2  # what bf16 itself costs


@torch.inference_mode()
def test_language_is_torchs_with_bf16_weights(tiny: TinyEngine) -> None:
    weights = tiny.model.weights
    session = open_graph(tiny, language_contract(weights.config, 16, "bf16", LIMITS))
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(3, 448, (2, 24)),
        "position_ids": np.tile(np.arange(24), (2, 1)),
        "image_rows": np.full((2, 24), -1),
        "last_token": np.array([23, 20]),
        "image_embeds": np.zeros((1, 16, 192), np.float32),
    }
    got = session.run(feeds, session.allocate_state(2)).arrays["logits"]
    model = narrowed(LanguageModel.from_weights(weights))
    cache = KVCache.allocate(weights.config.text, 2, LIMITS.cache_rows)
    hidden = model(*(torch.tensor(feeds[n]) for n in ("input_ids", "position_ids", "image_rows")), None, cache)
    expected = model.logits(hidden, torch.tensor(feeds["last_token"])).numpy()
    assert error(got, expected) < 1e-2  # rotary tables are bf16 too


def test_every_bf16_tensor_is_the_same_in_float32(tiny: TinyEngine) -> None:
    for graph in ("vision", "language"):
        before = onnx.load(tiny.directory / f"{graph}.onnx")
        with widened(tiny.directory / f"{graph}.onnx") as path:
            after = onnx.load(path)
        onnx.checker.check_model(after)
        declared = (*after.graph.input, *after.graph.output, *after.graph.value_info)
        assert {v.type.tensor_type.elem_type for v in declared} <= {*NUMPY_HAS}
        casts = [a.i for f in (after.graph, *after.functions) for n in f.node for a in n.attribute if a.name == "to"]
        assert casts
        assert {*casts} <= {*NUMPY_HAS}
        stored = {t.name: t for t in after.graph.initializer}
        assert len(stored) == len(before.graph.initializer)
        for tensor in before.graph.initializer:
            wide, narrow = onnx.numpy_helper.to_array(stored[tensor.name]), onnx.numpy_helper.to_array(tensor)
            expected = TensorProto.FLOAT if tensor.data_type == TensorProto.BFLOAT16 else tensor.data_type
            assert stored[tensor.name].data_type == expected
            np.testing.assert_array_equal(wide, narrow.astype(wide.dtype))
        assert [p.key for p in after.metadata_props] == [p.key for p in before.metadata_props]


def test_the_copy_is_gone_while_the_session_runs_on(tiny: TinyEngine, temporary: Path) -> None:
    contract = vision_contract(tiny.model.config, 16, "bf16", LIMITS)
    with widened(tiny.directory / "vision.onnx") as path:
        assert path.is_relative_to(temporary)
        session = OrtSession(path, contract)
    assert list(temporary.iterdir()) == []
    assert np.isfinite(
        session.run({"pixel_values": np.zeros((1, 3, 168, 168), np.float32)}).arrays["image_embeds"]
    ).all()


def test_the_copy_is_gone_after_an_error(tiny: TinyEngine, temporary: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), widened(tiny.directory / "vision.onnx"):
        raise RuntimeError("stop")
    assert list(temporary.iterdir()) == []


def test_a_contract_is_widened_where_it_is_bf16(tiny: TinyEngine) -> None:
    built_for = (tiny.model.config, 16)
    for precision in ("fp32", "fp16"):
        contract = language_contract(*built_for, precision, LIMITS)
        assert widened_contract(contract) == contract
    wide = widened_contract(language_contract(*built_for, "bf16", LIMITS))
    assert wide == language_contract(*built_for, "fp32", LIMITS)


def test_too_little_disk_is_said_before_anything_is_written(
    tiny: TinyEngine, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(path: Path, needed: int) -> None:
        asked.append(needed)
        raise EngineError("free space for it must be more.")

    monkeypatch.setattr(module, "check_space", refuse)
    with pytest.raises(EngineError, match=r"must be more\. TMPDIR says .* another precision than bf16"):
        open_graph(tiny, vision_contract(tiny.model.config, 16, "bf16", LIMITS))
    data = (tiny.directory / "vision.onnx.data").stat().st_size
    assert 2 * data < asked[0] < 2 * data + (80 << 20)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("text", "fits"), [("MemAvailable:  1 kB\n", False), ("MemFree: 1 kB\n", True), (None, True)])
def test_too_little_memory_is_said(
    tiny: TinyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, fits: bool
) -> None:
    path = tmp_path / "meminfo"
    if text is not None:
        path.write_text(text, encoding="ascii")
    monkeypatch.setattr(module, "_MEMORY", path)
    if fits:
        with widened(tiny.directory / "vision.onnx"):
            return
    with (
        pytest.raises(
            EngineError, match=r"free memory must be at least 0\.0 GB to run bf16 weights in float32, got 0\.0"
        ),
        widened(tiny.directory / "vision.onnx"),
    ):
        pass


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_another_precisions_graph_is_refused(tmp_path: Path, precision: Precision) -> None:
    directory = write_engine(tmp_path / "engine", precision=precision).directory
    with pytest.raises(EngineError, match=r"vision\.onnx must be a bf16 graph"), widened(directory / "vision.onnx"):
        pass


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vision.onnx").write_bytes(b"no graph")
    with (
        pytest.raises(EngineError, match=r"vision\.onnx must be an ONNX file, got: "),
        widened(tmp_path / "vision.onnx"),
    ):
        pass


def test_without_onnx_ir_the_extra_is_named(tiny: TinyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, extra: str) -> Callable[..., None]:
        raise FlowCutError(f"{name} is not installed: {extra}")

    monkeypatch.setattr(module, "require", missing)
    with pytest.raises(FlowCutError, match="onnx_ir is not installed: export"), widened(tiny.directory / "vision.onnx"):
        pass


def test_bf16_rounds_as_torch_does() -> None:
    """What the exporter stores, so that the references above mean something."""
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    rounded = x.astype(numpy_dtype("bfloat16")).astype(np.float32)
    np.testing.assert_array_equal(rounded, torch.tensor(x).bfloat16().float().numpy())
