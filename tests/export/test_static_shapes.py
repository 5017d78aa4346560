"""No exported graph has a shape or a control flow that follows its data: its inputs' sizes say every other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import onnx
import onnx.inliner
import pytest

from calib.groups import linear_layers
from export.builder import save
from export.language import language_model
from export.vision import vision_model
from flowcut.checkpoint import Weights, random_weights
from flowcut.config import LlavaConfig, Precision, TextConfig, VisionConfig
from flowcut.contract import Limits, language_contracts, vision_contract
from flowcut.schedule import Schedule

LIMITS = Limits(max_batch=3, max_images=3, max_prompt=64, max_new_tokens=8)
VISION, PATCHES, TOKENS = VisionConfig(64, 128, 12, 4, 56, 7), 64, 6
FAMILIES = {"llava-1.5": None, "llava-next": ((56, 112), (112, 112))}
SCHEDULES = {
    "off": Schedule("off", PATCHES, PATCHES),
    "static": Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, TOKENS)),
    "masked": Schedule("masked", PATCHES, TOKENS, (62, 50, 50, 20, TOKENS)),
    "no-semantic": Schedule("static", PATCHES, TOKENS, (50, 41, 30, 20, TOKENS), "no-semantic"),
    "masked-no-history": Schedule("masked", PATCHES, TOKENS, (62, 50, 50, 20, TOKENS), "no-history"),
    "cls": Schedule("static", PATCHES, TOKENS, (TOKENS,), "cls"),
    "grid": Schedule("static", PATCHES, TOKENS, (TOKENS,), "grid"),
}
SIZES = {"batch": 3, "images": 2, "tiles": 7, "sequence": 41, "pruned_sequence": 29}
DECODE = SIZES | {"images": 1, "sequence": 1, "pruned_sequence": 1}
FORBIDDEN = {
    *("NonZero", "Unique", "Compress", "NonMaxSuppression"),  # return as many values as they find
    *("Loop", "If", "Scan"),  # repeat and branch as the data says
    *("Scatter", "ScatterElements", "ScatterND"),  # write where the data says
    *("Slice", "Range", "Split"),  # take their bounds and sizes as values, which might be computed from the data
}
PRECISIONS = ("fp32", "bf16", "int8", "int4", "fp8")  # beside fp16, which has every case
Graphs = Callable[..., list[Path]]


def ones(weights: Weights) -> dict[str, float]:
    """Ranges of activations, which fp8 asks for."""
    return dict.fromkeys(linear_layers(weights.config), 1.0)


def weights_of(family: str, key_heads: int = 4) -> Weights:
    text = TextConfig(64, 128, 4, 4, key_heads, 512, 4096, 1e-5)
    return random_weights(LlavaConfig(VISION, text, 448, grid_pinpoints=FAMILIES[family]), dtype="float32")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """vision(family, schedule, trace, precision) -> path."""
    directory = tmp_path_factory.mktemp("vision")

    @cache
    def path_of(family: str, name: str, trace: bool, precision: str = "fp16") -> Path:
        weights, path = weights_of(family), directory / f"{family}-{name}-{trace}-{precision}.onnx"
        contract = vision_contract(weights.config, SCHEDULES[name].tokens, precision, LIMITS)
        save(vision_model(weights, contract, SCHEDULES[name], precision, {}, trace, ones(weights)), path)
        return path

    return path_of


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """language(family, stages, llm_tokens, key heads, precision) -> paths."""
    directory = tmp_path_factory.mktemp("language")

    @cache
    def paths_of(
        family: str, stages: int, llm_tokens: int | None, key_heads: int, precision: Precision = "fp16"
    ) -> list[Path]:
        weights, name = weights_of(family, key_heads), f"{family}-{stages}-{llm_tokens}-{key_heads}-{precision}"
        contracts = language_contracts(weights.config, TOKENS, precision, LIMITS, stages, llm_tokens)
        paths = [directory / f"{name}.{each.name}.onnx" for each in contracts]
        for path, contract in zip(paths, contracts, strict=True):
            save(language_model(weights, contract, precision, {}, ones(weights)), path)
        return paths

    return paths_of


def every_node(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for function in model.functions:
        yield from function.node
    yield from model.graph.node


def check_ops(path: Path) -> None:
    nodes = list(every_node(onnx.load(path, load_external_data=False)))
    assert not {node.op_type for node in nodes} & FORBIDDEN
    assert all(len(node.input) == 3 for node in nodes if node.op_type == "Where")  # of one input it is NonZero
    assert not [node.name for node in nodes for a in node.attribute if a.HasField("g")]  # no graph within


def unknown_shapes(path: Path, sizes: dict[str, int]) -> list[str]:
    """Values with a dimension that ONNX's inference does not know once the named dimensions have these sizes."""
    model = onnx.inliner.inline_local_functions(onnx.load(path))
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    for value in model.graph.output:  # what is declared of them would be believed
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    known = {
        value.name
        for value in (*inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
        and all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    }
    return sorted({name for node in inferred.node for name in node.output if name} - known)


@pytest.mark.parametrize("trace", [False, True], ids=["plain", "trace"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_vision(family: str, name: str, trace: bool, vision: Callable[..., Path]) -> None:
    path = vision(family, name, trace)
    check_ops(path)
    assert unknown_shapes(path, SIZES) == []


@pytest.mark.parametrize("sizes", [SIZES, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("key_heads", [4, 2], ids=["plain", "gqa"])
@pytest.mark.parametrize("llm_tokens", [None, 4])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_language(
    family: str, stages: int, llm_tokens: int | None, key_heads: int, sizes: dict[str, int], language: Graphs
) -> None:
    for path in language(family, stages, llm_tokens, key_heads):
        check_ops(path)
        assert unknown_shapes(path, sizes) == []


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_precisions(family: str, precision: Precision, vision: Callable[..., Path], language: Graphs) -> None:
    """One schedule and one graph of the decoder, with the pruning inside."""
    for path in (vision(family, "masked", False, precision), *language(family, 1, 4, 4, precision)):
        check_ops(path)
        for sizes in (SIZES, DECODE):
            assert unknown_shapes(path, sizes) == []


def test_this_would_find_a_shape_that_follows_the_data(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("NonZero", ["x"], ["found"]), onnx.helper.make_node("Shape", ["found"], ["y"])]
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, ["batch"]) for n in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)]), tmp_path / "g.onnx")
    assert unknown_shapes(tmp_path / "g.onnx", SIZES) == ["found"]
    with pytest.raises(AssertionError):
        check_ops(tmp_path / "g.onnx")
