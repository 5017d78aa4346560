"""The vision graph: well-formed in every form, and on ONNX Runtime equal to the torch tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import recipe
import references
import torch
from conftest import WriteCheckpoint
from references import relative_error

from export.builder import save
from export.vision import vision_model
from flowcut.checkpoint import Weights, open_checkpoint
from flowcut.config import Precision
from flowcut.contract import GraphContract, Limits, vision_contract
from flowcut.errors import ConfigError
from flowcut.schedule import Schedule
from flowcut.vision import VisionModel, VisionOutput

Arrays = dict[str, np.ndarray]
PATCHES, TOKENS, IMAGES, LAYERS = 64, 9, 3, 12
PIXELS = recipe.pixels(56, IMAGES, 5)
TIGHT = (62, 50, 50, 20, 9)
SCHEDULES = {
    "off": Schedule("off", PATCHES, PATCHES),
    "static": Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, 9)),
    "skips-points": Schedule("static", PATCHES, TOKENS, (64, 40, 40, 40, 9)),
    "early": Schedule("static", PATCHES, TOKENS, (64, 30, 9, 9, 9)),
    "masked": Schedule("masked", PATCHES, TOKENS, (64, 64, 64, 64, 9)),
    "masked-tight": Schedule("masked", PATCHES, TOKENS, TIGHT),
    "masked-early": Schedule("masked", PATCHES, TOKENS, (62, 50, 9, 9, 9)),
}
SELECTED = {
    "no-history": Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, 9), "no-history"),
    "no-semantic": Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, 9), "no-semantic"),
    "no-strength": Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, 9), "no-strength"),
    "masked-no-history": Schedule("masked", PATCHES, TOKENS, TIGHT, "no-history"),
    "masked-no-semantic": Schedule("masked", PATCHES, TOKENS, TIGHT, "no-semantic"),
    "cls": Schedule("static", PATCHES, TOKENS, (TOKENS,), "cls"),
    "grid": Schedule("static", PATCHES, TOKENS, (TOKENS,), "grid"),
    "random": Schedule("static", PATCHES, TOKENS, (TOKENS,), "random-2"),
}
CONSTANT = ("grid", "random")
FLOWCUT = list(SCHEDULES)
SCHEDULES |= SELECTED
PRUNED = [name for name in SCHEDULES if name != "off"]
# Their shapes or their control flow follow the data, or (Slice, Range) importers surround them with shape arithmetic.
FORBIDDEN = {"NonZero", "Loop", "If", "Scan", "Slice", "Range", "Compress", "Unique", "NonMaxSuppression"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(checkpoint: WriteCheckpoint) -> Weights:
    return open_checkpoint(checkpoint("tiny", seed=4))


@pytest.fixture(scope="module")
def export(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """export(name of a schedule, precision="fp32", trace=True) -> path; each is written once."""
    directory = tmp_path_factory.mktemp("vision")

    def path_of(name: str, precision: Precision = "fp32", trace: bool = True) -> Path:
        path = directory / f"{name}-{precision}-{trace}.onnx"
        if not path.exists():
            contract = contract_of(weights, name, precision)
            save(vision_model(weights, contract, SCHEDULES[name], precision, {"schedule": name}, trace), path)
        return path

    return path_of


def contract_of(weights: Weights, name: str, precision: Precision) -> GraphContract:
    return vision_contract(weights.config, SCHEDULES[name].tokens, precision, Limits())


def run_ort(path: Path, pixels: np.ndarray = PIXELS) -> Arrays:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    return dict(zip(names, session.run(None, {"pixel_values": pixels.astype(dtype)}), strict=True))


def run_torch(weights: Weights, name: str) -> tuple[VisionOutput, torch.Tensor]:
    """The tower's output and image_embeds."""
    model, pixels = VisionModel.from_weights(weights), torch.from_numpy(PIXELS)
    with torch.inference_mode():
        return model.features(pixels, SCHEDULES[name]), model(pixels, SCHEDULES[name])[0]


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


@pytest.mark.parametrize("trace", [False, True], ids=["plain", "trace"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_form_passes_the_full_check(
    name: str, precision: Precision, trace: bool, export: Callable[..., Path]
) -> None:
    onnx.checker.check_model(export(name, precision, trace), full_check=True)


@pytest.mark.parametrize("trace", [False, True], ids=["plain", "trace"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_op_whose_shape_or_flow_follows_the_data(name: str, trace: bool, export: Callable[..., Path]) -> None:
    model = ir.load(export(name, "fp16", trace))
    used = {node.op_type for node in all_nodes(model)}
    assert not used & FORBIDDEN
    constant_k = {node.inputs[1] for node in model.graph if node.op_type == "TopK"}
    assert all(k is not None and k.const_value is not None for k in constant_k)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", FLOWCUT)
def test_inferred_shapes_are_the_contracts(
    name: str, precision: Precision, weights: Weights, export: Callable[..., Path]
) -> None:
    """Inference starts from inputs alone: the outputs' declared types are taken away first."""
    proto = onnx.load(export(name, precision, trace=False), load_external_data=False)
    contract = contract_of(weights, name, precision)
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    for value, spec in zip(inferred.graph.output, contract.outputs, strict=True):
        dims = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        assert value.name == spec.name
        assert value.type.tensor_type.elem_type == onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        assert dims[1:] == list(spec.dims[1:])
        assert isinstance(dims[0], str), "the number of images must stay open"


@pytest.mark.parametrize("name", SCHEDULES)
def test_onnx_runtime_equals_torch(name: str, weights: Weights, export: Callable[..., Path]) -> None:
    got, (expected, embeds) = run_ort(export(name)), run_torch(weights, name)
    np.testing.assert_array_equal(got["kept"], expected.kept)
    np.testing.assert_array_equal(got["counts"], expected.counts)
    assert relative_error(got["features"], expected.features.numpy()) <= 1e-4
    assert relative_error(got["image_embeds"], embeds.numpy()) <= 1e-4


@pytest.mark.parametrize("name", ["masked-tight", "masked-early"])
def test_masked_with_capacities_that_clamp_equals_the_float64_tower(
    name: str, weights: Weights, export: Callable[..., Path]
) -> None:
    got = run_ort(export(name))
    rule = references.capped_rule(LAYERS, TOKENS, SCHEDULES[name].counts)
    for b, pixels in enumerate(PIXELS):
        expected = references.tower(weights, pixels, (LAYERS, 4, 7), TOKENS, rule)
        assert got["counts"][b].tolist() == expected.counts
        assert got["kept"][b].tolist() == expected.kept.tolist()
        assert relative_error(got["features"][b], expected.features) <= 1e-4


@pytest.mark.parametrize("name", PRUNED)
def test_trace_tells_what_each_pruning_point_kept(name: str, weights: Weights, export: Callable[..., Path]) -> None:
    got, (expected, _) = run_ort(export(name)), run_torch(weights, name)
    layers = [int(output.removeprefix("kept.")) for output in got if output.startswith("kept.")]
    assert layers == [layer for layer, _ in expected.trace]
    for layer, kept in expected.trace:
        for b in range(IMAGES):
            assert got[f"kept.{layer}"][b, : len(kept[b])].tolist() == kept[b].tolist()


@pytest.mark.parametrize("name", FLOWCUT)
def test_an_image_comes_out_the_same_alone_and_in_any_batch(name: str, export: Callable[..., Path]) -> None:
    batch, reversed_batch = run_ort(export(name)), run_ort(export(name), PIXELS[::-1].copy())
    for b in range(IMAGES):
        alone = run_ort(export(name), PIXELS[b : b + 1])
        for output, at in ((batch, b), (reversed_batch, IMAGES - 1 - b)):
            np.testing.assert_array_equal(output["kept"][at], alone["kept"][0])
            np.testing.assert_array_equal(output["counts"][at], alone["counts"][0])
            assert relative_error(output["image_embeds"][at], alone["image_embeds"][0]) <= 1e-5


@pytest.mark.parametrize("name", FLOWCUT)
def test_tracing_changes_no_result(name: str, export: Callable[..., Path]) -> None:
    plain, traced = run_ort(export(name, trace=False)), run_ort(export(name))
    assert list(plain) == ["image_embeds", "kept"]
    np.testing.assert_array_equal(plain["kept"], traced["kept"])
    np.testing.assert_allclose(plain["image_embeds"], traced["image_embeds"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_float16_runs_and_nearly_agrees(name: str, export: Callable[..., Path]) -> None:
    low, full = run_ort(export(name, "fp16")), run_ort(export(name))
    assert low["image_embeds"].dtype == np.float16
    assert np.isfinite(low["image_embeds"]).all()
    pairs = [(set(a), set(b)) for a, b in zip(low["kept"].tolist(), full["kept"].tolist(), strict=True)]
    assert np.mean([len(a & b) / len(a | b) for a, b in pairs]) >= 0.9


@pytest.mark.parametrize("name", [name for name in PRUNED if name not in CONSTANT])
def test_equal_scores_keep_the_lower_patch_numbers(name: str, weights: Weights, tmp_path: Path) -> None:
    """With every weight zero all patches are the same, and all scores exactly 0."""
    path = tmp_path / "vision.onnx"
    contract = contract_of(weights, name, "fp32")
    save(vision_model(_AllAlike(weights), contract, SCHEDULES[name], "fp32", {}, trace=True), path)
    assert run_ort(path)["kept"].tolist() == [list(range(TOKENS))] * IMAGES


class _AllAlike:
    """A checkpoint whose patches cannot differ."""

    def __init__(self, weights: Weights) -> None:
        self.config, self.random, self.sha256, self._weights = weights.config, True, "0", weights

    def load(self, name: str) -> np.ndarray:
        return np.zeros_like(self._weights.load(name))


@pytest.mark.parametrize("name", ["static", "masked"])
def test_every_scored_layer_is_one_custom_node_with_its_function(name: str, export: Callable[..., Path]) -> None:
    model = ir.load(export(name, trace=False))
    op = "FlowScoreMasked" if name == "masked" else "FlowScore"
    scored = [node for node in model.graph if node.domain == "flowcut"]
    assert [node.op_type for node in scored] == [op] * 10  # layers 0..9 of 12
    assert [node.name for node in scored] == [f"layers.{i}/flow/{op}" for i in range(10)]
    assert list(model.functions) == [("flowcut", op, "")]
    history = [node.attributes["history"].as_float() for node in scored]
    assert history == [0.0] + [0.5] * 9
    assert {node.attributes["logit_scale"].as_float() for node in scored} == {0.25}
    assert {node.attributes["semantic_scale"].as_float() for node in scored} == {1.0}


@pytest.mark.parametrize(
    ("name", "op", "layers"),
    [
        ("no-history", "FlowScore", [1, 3, 5, 7, 9]),
        ("masked-no-history", "FlowScoreMasked", [1, 3, 5, 7, 9]),
        ("no-semantic", "FlowScoreNoSemantic", list(range(10))),
        ("masked-no-semantic", "FlowScoreNoSemanticMasked", list(range(10))),
        ("no-strength", "FlowScoreNoStrength", list(range(10))),
        ("cls", "FlowScoreNoSemanticNoStrength", [10]),
        ("grid", "", []),
        ("random", "", []),
    ],
)
def test_only_the_layers_that_a_selector_reads_are_scored(
    name: str, op: str, layers: list[int], export: Callable[..., Path]
) -> None:
    model = ir.load(export(name, trace=False))
    scored = [node for node in model.graph if node.domain == "flowcut"]
    assert [node.name for node in scored] == [f"layers.{i}/flow/{op}" for i in layers]
    assert list(model.functions) == ([("flowcut", op, "")] if layers else [])
    forgets = name in ("cls", "no-history", "masked-no-history")
    history = [node.attributes["history"].as_float() for node in scored]
    assert history == [0.0 if forgets or i == 0 else 0.5 for i in layers]


@pytest.mark.parametrize("name", PRUNED)
def test_every_node_is_used(name: str, export: Callable[..., Path]) -> None:
    model = ir.load(export(name, trace=False))
    outputs = set(model.graph.outputs)
    idle = [n.name for n in model.graph if not any(o.uses() or o in outputs for o in n.outputs)]
    assert idle == []


def test_nothing_of_flowcut_is_left_with_pruning_off(export: Callable[..., Path]) -> None:
    model = ir.load(export("off", trace=False))
    assert not model.functions
    assert all(node.domain == "" for node in model.graph)
    assert set(model.graph.opset_imports) == {""}


def test_metadata_travels_with_the_file(export: Callable[..., Path]) -> None:
    session = ort.InferenceSession(export("static"), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"schedule": "static"}


def test_adaptive_is_refused(weights: Weights) -> None:
    contract = vision_contract(weights.config, TOKENS, "fp32", Limits())
    with pytest.raises(
        ConfigError, match=r"must be static, masked or a \.json file where a graph is exported, got 'adaptive'"
    ):
        vision_model(weights, contract, Schedule("adaptive", PATCHES, TOKENS), "fp32", {})
