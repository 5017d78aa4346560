"""One ONNX file -> one engine file, in this process: use `engines.build`, which runs this once per child process.

The same code drives tensorrt_rtx and tensorrt; `trt` is the module. Weights go to the parser as pointers into a
memory map of the external data file and the engine goes to disk in chunks, so neither is held a second time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends import target_capabilities, trt_module
from engines.flow_score.nodes import plugin_model, plugin_variants
from engines.flow_score.plugin import NAMESPACE, check_plugin, plugin_errors, register_plugin
from engines.listeners import BuildLog, Channel, Notify, make_logger, make_monitor, make_writer
from engines.profiles import add_profile
from flowcut.contract import GraphContract
from flowcut.deps import require
from flowcut.errors import EngineError


@dataclass(frozen=True)
class BuildRequest:
    """What to compile, for which GPUs.

    Attributes:
        log_level: the least level of TensorRT's messages worth forwarding.
        plugin: for backend "trt", whether FlowScore is a plugin or the standard operators of its function.
    """

    onnx_path: Path
    engine_path: Path
    contract: GraphContract
    backend: str
    compute_capabilities: tuple[str, ...] = ()
    log_level: int = 0
    plugin: bool = True


@dataclass(frozen=True)
class BuildReport:
    """Result of one build. `layers` are the network's after parsing; `peak_rss_bytes` include mapped file pages."""

    layers: int
    seconds: float
    engine_bytes: int
    weight_bytes: int
    peak_rss_bytes: int
    warnings: tuple[str, ...] = ()


@dataclass
class _Session:
    """TensorRT objects of one build. The logger and the weights must outlive the rest."""

    trt: Any
    plugins: bool
    log: BuildLog
    logger: Any
    builder: Any
    network: Any
    parser: Any
    weights: dict[Path, np.memmap[Any, Any]]


def compile_engine(request: BuildRequest, notify: Notify) -> BuildReport:
    """Compile and write `request.engine_path`. A failed build may leave a part of it behind.

    Raises:
        EngineError: the graph, the profile, the target or the disk; with TensorRT's own words where it has any.
    """
    begin = time.perf_counter()
    notify = Channel(notify)
    session = _open(request, notify)
    weight_bytes = _parse(session, request.onnx_path)
    config = _configure(session, request, notify)
    engine_bytes = _write(session, config, request)
    return BuildReport(
        layers=session.network.num_layers,
        seconds=time.perf_counter() - begin,
        engine_bytes=engine_bytes,
        weight_bytes=weight_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        # An error that did not stop the build still has to be seen.
        warnings=(*session.log.warnings, *session.log.errors),
    )


def _open(request: BuildRequest, notify: Notify) -> _Session:
    trt, log = trt_module(request.backend), BuildLog()
    plugins = request.plugin and request.backend == "trt"
    logger = make_logger(trt, log, notify, request.log_level)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt.NetworkDefinitionCreationFlag, plugins))
    return _Session(trt, plugins, log, logger, builder, network, trt.OnnxParser(network, logger), {})


def _network_flags(known: Any, plugins: bool) -> int:
    # Precision is what the ONNX file says: the default since TensorRT 11, a flag before.
    flags = 1 << int(known.STRONGLY_TYPED)
    if plugins and hasattr(known, "PREFER_AOT_PYTHON_PLUGINS"):
        flags |= 1 << int(known.PREFER_AOT_PYTHON_PLUGINS)
    return flags


def _parse(session: _Session, path: Path) -> int:
    """Give the parser the graph, then every external weight by pointer. Returns the bytes of all weights."""
    onnx = require("onnx", extra="export")
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, require("google.protobuf.message", extra="export").DecodeError) as error:
        raise EngineError(f"{path} must be an ONNX file, got: {error}.") from None
    if session.plugins:
        model = _with_plugins(session.trt, model, path)
    if not session.parser.load_model_proto(model.SerializeToString()):
        raise _refused(session, path, "read")
    total = sum(_feed(session, path, tensor, onnx.TensorProto.EXTERNAL) for tensor in model.graph.initializer)
    if not session.parser.parse_model_proto():
        raise _refused(session, path, "parsed")
    return total


def _with_plugins(trt: Any, model: Any, path: Path) -> Any:
    """The graph with FlowScore's plugins, which TensorRT then knows. A graph without that op stays as it is."""
    if all(node.domain != NAMESPACE for node in model.graph.node):
        return model
    check_plugin(trt, plugin_variants(model))
    register_plugin(trt)
    return plugin_model(model, path.parent)


def _feed(session: _Session, path: Path, tensor: Any, external: int) -> int:
    """Point the parser at one initializer's bytes in the memory map. Returns their number."""
    if tensor.data_location != external:
        return int(tensor.ByteSize())
    entry = {e.key: e.value for e in tensor.external_data}
    data_path = path.parent / entry["location"]
    weights = _mapped(session, data_path)
    offset = int(entry.get("offset", 0))
    length = int(entry.get("length", weights.size - offset))
    if offset + length > weights.size:
        raise EngineError(
            f"{data_path} must hold {tensor.name} at bytes {offset}..{offset + length}, "
            f"got a file of {weights.size} bytes. Export the graph again."
        )
    if not session.parser.load_initializer(tensor.name, weights.ctypes.data + offset, length):
        raise _refused(session, path, f"given its weight {tensor.name} ({length} bytes)")
    return length


def _mapped(session: _Session, path: Path) -> np.memmap[Any, Any]:
    """The memory map of an external data file, kept until the engine is built."""
    if path not in session.weights:
        try:
            session.weights[path] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} must hold the graph's weights, got: {error}. Export the graph again.") from None
    return session.weights[path]


def _refused(session: _Session, path: Path, verb: str) -> EngineError:
    """The parser's own errors: node, op, message."""
    errors = [session.parser.get_error(i) for i in range(session.parser.num_errors)]
    text = "; ".join(
        f"node {e.node_name() or '?'} ({e.node_operator() or '?'}): {' '.join(e.desc().split())} "
        f"[{Path(e.file()).name}:{e.line()}]"
        for e in errors
    )
    return EngineError(f"{path} could not be {verb} by TensorRT: {_reasons(session, text)}.")


def _reasons(session: _Session, said: str = "") -> str:
    """What the plugins raised, which TensorRT does not repeat, then its own words."""
    return "; ".join([*(error.rstrip(".") for error in plugin_errors()), said or session.log.reasons()])


def _configure(session: _Session, request: BuildRequest, notify: Notify) -> Any:
    trt, contract = session.trt, request.contract
    config = session.builder.create_builder_config()
    add_profile(trt, session.builder, config, session.network, contract)
    # TF32 rounds float32 products to 10 bits, and near-equal flow scores would rank differently.
    config.clear_flag(trt.BuilderFlag.TF32)
    _target(trt, config, request.compute_capabilities)
    inputs = {spec.name for spec in contract.inputs}
    config.progress_monitor = make_monitor(trt, notify, lambda: bool(session.log.unused_inputs & inputs))
    return config


def _target(trt: Any, config: Any, names: Sequence[str]) -> None:
    """Name the GPUs to build for; none means TensorRT's default (RTX: Ampere and later; full: the present one)."""
    if not names:
        return
    known = target_capabilities(trt)
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        if not config.set_compute_capability(known[name.lower()], index):
            raise EngineError(f"compute_capability must be supported together, got {', '.join(names)}.")


def _write(session: _Session, config: Any, request: BuildRequest) -> int:
    """Build, streaming to disk. Returns the bytes written."""
    name, path, log = request.contract.name, request.engine_path, session.log
    with _opened(path) as file:
        writer = make_writer(session.trt, file)
        built = session.builder.build_serialized_network_to_stream(session.network, config, writer)
    if unused := sorted(log.unused_inputs & {spec.name for spec in request.contract.inputs}):
        raise EngineError(
            f"{name}: TensorRT ignores the graph's input {', '.join(unused)}, so its results would be wrong. "
            "An operator of the graph uses it in a way that this importer drops: export it in other operators."
        )
    if writer.failure is not None:
        raise EngineError(f"could not write {path}: {writer.failure.strerror}.")
    if not built or not writer.written:
        raise EngineError(f"{request.onnx_path} could not be built by TensorRT: {_reasons(session)}.")
    return int(writer.written)


def _opened(path: Path) -> AbstractContextManager[Any]:
    try:
        return path.open("wb", buffering=0)
    except OSError as error:
        raise EngineError(f"could not write {path}: {error.strerror}.") from None


def peak_rss_bytes() -> int:
    """Largest resident size of this process, 0 where /proc does not tell. getrusage would inherit the parent's."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
