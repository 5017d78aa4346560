"""ONNX file -> engine file with TensorRT-RTX, on small graphs made here; no GPU."""

import ctypes
import logging
import signal
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from rich.progress import Progress

from engines.backends import gpu_present
from engines.build import build_engine
from engines.compiler import BuildRequest, compile_engine
from engines.flow_score.launch import COMBINE, LOGITS, Variant
from export.builder import save as save_model
from export.vision import vision_model
from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.contract import GraphContract, Limits, Range, TensorSpec, vision_contract
from flowcut.deps import available
from flowcut.errors import EngineError
from flowcut.schedule import Schedule

needs_rtx = pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")

RANGES = {"batch": Range(1, 1, 2), "sequence": Range(1, 8, 16)}
ONNX_TYPE = {name: helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in ("float16", "float32", "int64", "bool")}


def save(path: Path, contract: GraphContract, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> None:
    """Write the graph, every weight in one external file of its own (none where there are no weights)."""

    def values(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(s.name, ONNX_TYPE[s.dtype], s.dims) for s in specs]

    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, contract.name, values(contract.inputs), values(contract.outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.save_model(model, path, save_as_external_data=bool(weights), location=f"{path.name}.data", size_threshold=0)


def dense_graph(path: Path, width: int = 64, layers: int = 2) -> GraphContract:
    """Matrix products with softmax between them, then the four largest values."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((width, width)).astype(np.float16) for i in range(layers)}
    nodes, x = [], "x"
    for i, weight in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [x, weight], [f"h{i}"], name=f"matmul{i}"))
        nodes.append(helper.make_node("Softmax", [f"h{i}"], [f"s{i}"]))
        x = f"s{i}"
    nodes.append(helper.make_node("TopK", [x, "k"], ["values", "kept"]))
    outputs = (
        TensorSpec("values", "float16", ("batch", "sequence", 4)),
        TensorSpec("kept", "int64", ("batch", "sequence", 4)),
    )
    contract = GraphContract("dense", (TensorSpec("x", "float16", ("batch", "sequence", width)),), outputs, RANGES)
    save(path, contract, nodes, weights | {"k": np.array([4], np.int64)})
    return contract


def cache_graph(path: Path, dtype: str = "float16", mask: bool = True) -> GraphContract:
    """Attention over a cache written in place; valid rows by a boolean mask or by nonpad_kv_seqlen."""
    rows, heads, size = 32, 2, 64
    step, cache = ("batch", heads, "sequence", size), ("batch", heads, rows, size)
    valid = TensorSpec("mask", "bool", ("batch", 1, "sequence", rows)) if mask else TensorSpec("n", "int64", ("batch",))
    inputs = (
        *(TensorSpec(n, dtype, step) for n in ("q", "k", "v")),
        *(TensorSpec(n, dtype, cache) for n in ("past.key", "past.value")),
        TensorSpec("at", "int64", ("batch",)),
        valid,
    )
    outputs = (TensorSpec("y", dtype, step), *(TensorSpec(n, dtype, cache) for n in ("present.key", "present.value")))
    contract = GraphContract("language", inputs, outputs, RANGES)
    operands = ["q", "present.key", "present.value", *(["mask"] if mask else ["", "", "", "n"])]
    nodes = [
        helper.make_node("TensorScatter", ["past.key", "k", "at"], ["present.key"], axis=2),
        helper.make_node("TensorScatter", ["past.value", "v", "at"], ["present.value"], axis=2),
        helper.make_node("Attention", operands, ["y"], name="attention"),
    ]
    save(path, contract, nodes, {})
    return contract


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "graph.onnx", tmp_path / "graph.engine"


@needs_rtx
def test_weights_by_pointer_give_the_engine_that_the_parsers_own_loader_gives(paths: tuple[Path, Path]) -> None:
    contract = dense_graph(paths[0])
    report = build_engine(*paths, contract, "rtx")
    code = """
import sys, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger); network = builder.create_network(); parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
config = builder.create_builder_config(); profile = builder.create_optimization_profile()
config.clear_flag(trt.BuilderFlag.TF32)
profile.set_shape("x", (1, 1, 64), (1, 8, 64), (2, 16, 64)); config.add_optimization_profile(profile)
open(sys.argv[2], "wb").write(builder.build_serialized_network(network, config))
"""
    reference = paths[1].with_name("reference.engine")
    subprocess.run([sys.executable, "-c", code, paths[0], reference], check=True)
    own, theirs = paths[1].read_bytes(), reference.read_bytes()
    assert len(own) == len(theirs)
    # A byte of the plan's head differs now and then on a busy machine; other weights would be thousands.
    assert sum(a != b for a, b in zip(own, theirs, strict=True)) <= 4
    assert report.engine_bytes == paths[1].stat().st_size
    assert report.weight_bytes == 2 * 64 * 64 * 2 + 8
    assert report.layers >= 5
    assert report.peak_rss_bytes > report.engine_bytes
    assert report.warnings == ()


@needs_rtx
def test_attention_over_a_cache_compiles_for_named_gpus(paths: tuple[Path, Path]) -> None:
    report = build_engine(*paths, cache_graph(paths[0]), "rtx", ["sm86", "SM120"])
    assert paths[1].stat().st_size == report.engine_bytes > 0


@needs_rtx
def test_float32_attention_over_a_cache_fails_in_tensorrts_words(paths: tuple[Path, Path]) -> None:
    with pytest.raises(EngineError, match=r"graph\.onnx could not be built by TensorRT: .*dedicated kernel"):
        build_engine(*paths, cache_graph(paths[0], "float32"), "rtx", ["sm86"])
    assert not paths[1].exists()


@needs_rtx
def test_an_input_that_the_importer_drops_fails_the_build(paths: tuple[Path, Path]) -> None:
    with pytest.raises(EngineError, match="language: TensorRT ignores the graph's input n,"):
        build_engine(*paths, cache_graph(paths[0], mask=False), "rtx")
    assert not paths[1].exists()


@needs_rtx
def test_a_graph_of_another_contract_is_refused(paths: tuple[Path, Path]) -> None:
    dense = dense_graph(paths[0])
    other = GraphContract("dense", (TensorSpec("y", "float32", ("batch", 64)),), dense.outputs, RANGES)
    with pytest.raises(EngineError, match="missing y; unexpected x"):
        build_engine(*paths, other, "rtx")


@needs_rtx
def test_an_operator_that_tensorrt_lacks_is_named(paths: tuple[Path, Path]) -> None:
    contract = GraphContract("g", (TensorSpec("x", "float16", (4,)),), (TensorSpec("y", "float16", (4,)),))
    save(paths[0], contract, [helper.make_node("NoSuchOp", ["x"], ["y"], name="culprit")], {})
    with pytest.raises(EngineError, match=r"graph\.onnx could not be parsed.*node culprit \(NoSuchOp\)"):
        build_engine(*paths, contract, "rtx")


@needs_rtx
@pytest.mark.parametrize("size", [100, 0, None], ids=["truncated", "empty", "missing"])
def test_weights_that_are_not_there_are_refused(paths: tuple[Path, Path], size: int | None) -> None:
    contract = dense_graph(paths[0])
    data = paths[0].with_name("graph.onnx.data")
    data.unlink() if size is None else data.write_bytes(data.read_bytes()[:size])
    with pytest.raises(EngineError, match=r"graph\.onnx\.data must hold .* Export the graph again\."):
        build_engine(*paths, contract, "rtx")


@needs_rtx
@pytest.mark.parametrize("content", [b"not onnx", b"", None], ids=["text", "empty", "missing"])
def test_a_file_that_is_not_onnx_is_refused(paths: tuple[Path, Path], content: bytes | None) -> None:
    if content is not None:
        paths[0].write_bytes(content)
    with pytest.raises(EngineError, match=r"graph\.onnx (must be an ONNX file|could not be parsed)"):
        build_engine(*paths, GraphContract("g", (), ()), "rtx")


@needs_rtx
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_and_the_file_removed(paths: tuple[Path, Path]) -> None:
    paths[1].symlink_to("/dev/full")
    with pytest.raises(EngineError, match=r"could not write .*graph\.engine: No space left on device\."):
        build_engine(*paths, dense_graph(paths[0]), "rtx")
    assert not paths[1].is_symlink()


@needs_rtx
def test_an_engine_path_that_cannot_be_opened_is_reported(paths: tuple[Path, Path]) -> None:
    contract = dense_graph(paths[0])
    with pytest.raises(EngineError, match=r"could not write .*: No such file or directory\."):
        build_engine(paths[0], paths[1].parent / "absent" / "graph.engine", contract, "rtx")


@needs_rtx
def test_an_unknown_gpu_is_refused_with_the_known_ones(paths: tuple[Path, Path]) -> None:
    with pytest.raises(EngineError, match=r"compute_capability must be one of sm75, .*sm120.*, got sm99\."):
        build_engine(*paths, dense_graph(paths[0]), "rtx", ["sm86", "sm99"])


@needs_rtx
def test_phases_are_drawn_and_all_gone_at_the_end(paths: tuple[Path, Path]) -> None:
    drawn: list[str] = []

    class Recorder(Progress):
        def add_task(self, description: str, **options: object) -> object:  # type: ignore[override]
            drawn.append(description)
            return super().add_task(description, **options)  # type: ignore[arg-type]

    progress = Recorder()
    build_engine(*paths, dense_graph(paths[0]), "rtx", progress=progress)
    assert drawn[0].startswith("dense: ")
    assert drawn[1].startswith("  ")
    assert progress.tasks == []


@needs_rtx
def test_without_a_progress_every_phase_is_logged_once(
    paths: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    build_engine(*paths, dense_graph(paths[0]), "rtx")
    lines = [r.message for r in caplog.records if r.name == "flowcut.engines"]
    assert len(lines) > 3
    assert len(lines) == len(set(lines))
    assert not [r for r in caplog.records if "Int64 binding" in r.message]


@needs_rtx
def test_interrupt_stops_the_build_at_once_and_leaves_nothing(paths: tuple[Path, Path]) -> None:
    contract = dense_graph(paths[0], layers=40)
    code = f"""
import logging, sys
from pathlib import Path
from engines.build import build_engine
from flowcut.contract import GraphContract, Range, TensorSpec
logging.basicConfig(level=logging.INFO)
build_engine(Path(sys.argv[1]), Path(sys.argv[2]), {contract!r}, "rtx")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *paths], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stderr is not None
    assert any("Building engine" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=300) != 0  # of what it would have built there is nothing below
    assert rest.rstrip().endswith("KeyboardInterrupt")
    assert not paths[1].exists()


@pytest.mark.parametrize(
    ("script", "says"),
    [("echo boom; exit 3", "exit status 3: boom"), ("kill -9 $$", r"SIGKILL \(out of memory\? STAGES=2")],
    ids=["exit", "killed"],
)
def test_a_compiler_that_dies_is_an_error(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    interpreter = paths[0].with_name("python")
    interpreter.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(EngineError, match=says):
        build_engine(*paths, GraphContract("g", (), ()), "rtx")


@pytest.mark.skipif(gpu_present(), reason="needs a machine without a GPU")
def test_full_tensorrt_without_a_gpu_names_the_other_backends(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.backends.trt_module", lambda backend: SimpleNamespace())  # is it installed or not
    with pytest.raises(EngineError, match=r"GPU.*BACKEND=rtx.*BACKEND=ort"):
        build_engine(*paths, GraphContract("g", (), ()), "trt")


class FakeTensorRT:
    """As much of the module as a build needs up to its parser, which takes everything and then fails."""

    __name__, __version__ = "tensorrt", "11.4.0"
    Flag = IntEnum("Flag", {"STRONGLY_TYPED": 1, "PREFER_JIT_PYTHON_PLUGINS": 2, "PREFER_AOT_PYTHON_PLUGINS": 3})

    class ILogger:
        Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.NetworkDefinitionCreationFlag: Any = self.Flag
        self.events: list[Any] = []
        self.flags, self.model, self.weights, self.plugin_errors = 0, onnx.ModelProto(), {}, ["FlowScoreLogits: so."]
        self.num_errors = 0
        monkeypatch.setattr("engines.compiler.trt_module", lambda backend: self)
        for name in ("check_plugin", "register_plugin"):
            monkeypatch.setattr(
                f"engines.compiler.{name}", lambda *given, name=name: self.events.append((name, *given))
            )
        monkeypatch.setattr("engines.compiler.plugin_errors", lambda: self.plugin_errors)

    def Builder(self, logger: Any) -> Any:
        def create_network(flags: int) -> None:
            self.flags = flags

        return SimpleNamespace(create_network=create_network)

    def OnnxParser(self, network: None, logger: Any) -> Any:
        return self

    def load_model_proto(self, content: bytes) -> bool:
        self.content = content
        self.model.ParseFromString(content)
        self.events.append("load")
        return True

    def load_initializer(self, name: str, pointer: int, size: int) -> bool:
        self.weights[name] = ctypes.string_at(pointer, size)
        return True

    def parse_model_proto(self) -> bool:
        return False

    def compile(self, path: Path, contract: GraphContract, backend: str, plugin: bool = True) -> str:
        """Returns the error."""
        request = BuildRequest(path, path.with_suffix(".engine"), contract, backend, plugin=plugin)
        with pytest.raises(EngineError) as error:
            compile_engine(request, lambda *event: None)
        return str(error.value)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return FakeTensorRT(monkeypatch)


def pruned_graph(path: Path, heads: int = 2) -> GraphContract:
    """Four layers of 16 patches, three of them scored."""
    config = LlavaConfig(VisionConfig(64, 128, 5, heads, 28, 7), TextConfig(16, 32, 1, 2, 2, 512), image_token_id=448)
    contract = vision_contract(config, 4, "fp16", Limits())
    save_model(vision_model(random_weights(config), contract, Schedule("static", 16, 4, (9, 4)), "fp16", {}), path)
    return contract


def test_full_tensorrt_is_given_plugins_and_every_weight(fake: FakeTensorRT, paths: tuple[Path, Path]) -> None:
    message = fake.compile(paths[0], pruned_graph(paths[0]), "trt")
    assert message.endswith("graph.onnx could not be parsed by TensorRT: FlowScoreLogits: so; no reason was logged.")
    variants = {Variant(LOGITS, "fp16", 32), Variant(COMBINE)}
    assert fake.events == [("check_plugin", fake, variants), ("register_plugin", fake), "load"]
    assert fake.flags == 1 << 1 | 1 << 3
    assert not fake.model.functions
    nodes = [node for node in fake.model.graph.node if node.domain]
    assert {(node.domain, node.op_type) for node in nodes} == {
        ("flowcut", "FlowScoreLogits"),
        ("flowcut", "FlowScoreCombine"),
    }
    for node in nodes:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert (given["plugin_namespace"], given["plugin_version"], given["aot"]) == (b"flowcut", b"1", 1)
    whole = onnx.load(paths[0])
    values = {t.name: numpy_helper.to_array(t).tobytes() for t in whole.graph.initializer}
    outside = {t.name for t in fake.model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert len(outside) > 20
    assert fake.weights == {name: values[name] for name in outside}


def test_tensorrt_rtx_is_given_the_file_as_it_is(fake: FakeTensorRT, paths: tuple[Path, Path]) -> None:
    fake.plugin_errors.clear()
    message = fake.compile(paths[0], pruned_graph(paths[0]), "rtx")
    assert message.endswith("graph.onnx could not be parsed by TensorRT: no reason was logged.")
    assert (fake.events, fake.flags) == (["load"], 1 << 1)
    assert fake.content == onnx.load(paths[0], load_external_data=False).SerializeToString()
    assert [function.name for function in fake.model.functions] == ["FlowScore"]
    assert "FlowScore" in {node.op_type for node in fake.model.graph.node}


def test_full_tensorrt_without_plugins_is_given_the_file_as_it_is(fake: FakeTensorRT, paths: tuple[Path, Path]) -> None:
    fake.compile(paths[0], pruned_graph(paths[0]), "trt", plugin=False)
    assert (fake.events, fake.flags) == (["load"], 1 << 1)
    assert fake.content == onnx.load(paths[0], load_external_data=False).SerializeToString()


def test_a_graph_without_scoring_needs_no_plugin(fake: FakeTensorRT, paths: tuple[Path, Path]) -> None:
    fake.compile(paths[0], dense_graph(paths[0]), "trt")
    assert fake.events == ["load"]
    assert fake.content == onnx.load(paths[0], load_external_data=False).SerializeToString()


def test_a_tensorrt_without_the_flag_is_not_asked_for_it(fake: FakeTensorRT, paths: tuple[Path, Path]) -> None:
    fake.NetworkDefinitionCreationFlag = IntEnum("Flag", {"STRONGLY_TYPED": 1})
    fake.compile(paths[0], pruned_graph(paths[0]), "trt")
    assert fake.flags == 1 << 1


def test_what_the_plugins_cannot_compute_never_reaches_tensorrt(fake: FakeTensorRT, paths: tuple[Path, Path]) -> None:
    message = fake.compile(paths[0], pruned_graph(paths[0], heads=4), "trt")
    assert "head_size must be a multiple of 8 from 32 to 128" in message
    assert fake.events == []
