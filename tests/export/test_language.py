"""The language graph: well-formed, lean, and on ONNX Runtime equal to the torch decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.builder import save
from export.language import language_model
from flowcut.checkpoint import Weights, random_weights
from flowcut.config import LlavaConfig, Precision, TextConfig, VisionConfig
from flowcut.contract import GraphContract, Limits, language_contract, past_names, present_names
from flowcut.language import KVCache, LanguageModel

Arrays = dict[str, np.ndarray]
Export = Callable[[str, Precision], Path]

TOKENS, LIMITS = 5, Limits(max_batch=4, max_images=4, max_prompt=24, max_new_tokens=8)
VARIANTS = {
    "plain": TextConfig(64, 128, 3, 4, 4, 512, 4096, 1e-5),
    "gqa": TextConfig(64, 128, 3, 4, 2, 512, 4096, 1e-5),
    "tied": TextConfig(64, 128, 3, 4, 4, 512, 4096, 1e-5, tie_word_embeddings=True),
    "deeper": TextConfig(64, 128, 4, 4, 4, 512, 4096, 1e-5),
}
LENGTHS = np.array([9, 24, 1])


def weights_of(variant: str) -> Weights:
    return random_weights(LlavaConfig(VisionConfig(), VARIANTS[variant], image_token_id=448), dtype="float32")


def contract_of(variant: str, precision: Precision) -> GraphContract:
    return language_contract(weights_of(variant).config, TOKENS, precision, LIMITS)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Path of the saved graph of a variant; each is exported once."""
    directory = tmp_path_factory.mktemp("language")

    def path_of(variant: str, precision: Precision) -> Path:
        path = directory / f"{variant}-{precision}.onnx"
        if not path.exists():
            model = language_model(weights_of(variant), contract_of(variant, precision), precision, {"source": variant})
            save(model, path)
        return path

    return path_of


@pytest.fixture(scope="module")
def session(export: Export) -> Callable[[str, Precision], ort.InferenceSession]:
    def open_session(variant: str, precision: Precision) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 2  # warnings, whatever other tests set: one test reads them
        return ort.InferenceSession(export(variant, precision), options, providers=["CPUExecutionProvider"])

    return open_session


def prompts() -> Arrays:
    """Three right-padded prompts; the first two hold pictures 0 and 1."""
    rng = np.random.default_rng(0)
    shape = (3, int(LENGTHS.max()))
    rows = np.full(shape, -1)
    rows[0, 2:7], rows[1, 15:20] = np.arange(5), np.arange(5, 10)
    return {
        "input_ids": rng.integers(3, 448, shape),
        "position_ids": np.tile(np.arange(shape[1]), (3, 1)),
        "image_rows": rows,
        "last_token": LENGTHS - 1,
        "image_embeds": rng.standard_normal((2, TOKENS, 64)).astype(np.float32),
    }


def decode_step(step: int) -> Arrays:
    """One text token per sequence, behind its own prompt and the `step` tokens before it."""
    return {
        "input_ids": np.random.default_rng(step).integers(3, 448, (3, 1)),
        "position_ids": (LENGTHS + step)[:, None],
        "image_rows": np.full((3, 1), -1),
        "last_token": np.zeros(3, np.int64),
        "image_embeds": np.zeros((1, TOKENS, 64), np.float32),
    }


def run_torch(variant: str, steps: list[Arrays]) -> tuple[list[np.ndarray], KVCache]:
    """Float32 logits of every step, and the cache after the last."""
    model = LanguageModel.from_weights(weights_of(variant))
    cache = KVCache.allocate(model.config, 3, LIMITS.cache_rows)
    logits = []
    for step in steps:
        t = {name: torch.from_numpy(array) for name, array in step.items()}
        hidden = model(t["input_ids"], t["position_ids"], t["image_rows"], t["image_embeds"], cache)
        logits.append(model.logits(hidden, t["last_token"]).numpy())
    return logits, cache


def run_ort(session: ort.InferenceSession, layers: int, steps: list[Arrays]) -> tuple[list[np.ndarray], Arrays]:
    """Logits of every step, and the last present tensors; the cache goes out and in as arrays."""
    inputs = {i.name: i for i in session.get_inputs()}
    dtype = np.float16 if inputs["image_embeds"].type == "tensor(float16)" else np.float32
    cache = {n: np.zeros((3, *inputs[n].shape[1:]), dtype) for i in range(layers) for n in past_names(i)}
    logits = []
    for step in steps:
        out = session.run(None, step | {"image_embeds": step["image_embeds"].astype(dtype)} | cache)
        logits.append(out[0])
        cache = dict(zip(cache, out[1:], strict=True))
    return logits, cache


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_file_passes_the_checker_with_full_shape_inference(export: Export, variant: str, precision: Precision) -> None:
    onnx.checker.check_model(export(variant, precision), full_check=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_file_declares_the_contract_and_its_metadata(export: Export, precision: Precision) -> None:
    model = onnx.load(export("gqa", precision), load_external_data=False)
    contract = contract_of("gqa", precision)
    for specs, values in ((contract.inputs, model.graph.input), (contract.outputs, model.graph.output)):
        found = [_declared(value) for value in values]
        assert found == [(spec.name, spec.dtype, spec.dims) for spec in specs]
    assert {p.key: p.value for p in model.metadata_props} == {"source": "gqa"}


def _declared(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    kind = value.type.tensor_type
    dims = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    return value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, dims


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graph_is_lean(export: Export, precision: Precision) -> None:
    shallow, deep = (
        Counter(n.op_type for n in onnx.load(export(v, precision), load_external_data=False).graph.node)
        for v in ("plain", "deeper")
    )
    assert not deep.keys() & {"NonZero", "Shape", "Slice", "Expand", "Loop", "If", "Scan", "ConstantOfShape", "Range"}
    layer = deep - shallow
    assert layer["Attention"] == 1
    assert layer["TensorScatter"] == layer["RotaryEmbedding"] == 2
    assert layer.total() <= 27


def test_weights_are_stored_once(export: Export) -> None:
    for variant in ("plain", "tied"):
        model = onnx.load(export(variant, "fp16"), load_external_data=False)
        stored = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
        parameters = sum(p.numel() for p in LanguageModel.from_weights(weights_of(variant)).parameters())
        assert parameters <= stored <= 1.02 * parameters  # rotary tables and the mask's row numbers


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_decode_equal_torch(session: Callable[..., ort.InferenceSession], variant: str) -> None:
    steps = [prompts(), *(decode_step(i) for i in range(4))]
    layers = VARIANTS[variant].num_hidden_layers
    logits, cache = run_ort(session(variant, "fp32"), layers, steps)
    expected, expected_cache = run_torch(variant, steps)
    assert max(map(error, logits, expected)) < 1e-5
    for i in range(layers):
        key, value = past_names(i)
        assert error(cache[key], expected_cache.keys[i].numpy()) < 1e-5
        assert error(cache[value], expected_cache.values[i].numpy()) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_float16_file_is_close_to_float32_torch(session: Callable[..., ort.InferenceSession], variant: str) -> None:
    steps = [prompts(), *(decode_step(i) for i in range(4))]
    logits, _ = run_ort(session(variant, "fp16"), VARIANTS[variant].num_hidden_layers, steps)
    expected, _ = run_torch(variant, steps)
    assert all(step.dtype == np.float32 for step in logits)
    assert max(map(error, logits, expected)) < 1e-2


def test_sequence_is_the_same_alone_and_in_a_batch(session: Callable[..., ort.InferenceSession]) -> None:
    open_session, batch = session("plain", "fp32"), prompts()
    together, _ = run_ort(open_session, 3, [batch])
    cache = {n: np.zeros((1, 4, LIMITS.cache_rows, 16), np.float32) for i in range(3) for n in past_names(i)}
    for b, length in enumerate(LENGTHS):
        names = ("input_ids", "position_ids", "image_rows")
        alone = {n: batch[n][b : b + 1, :length] for n in names} | {"last_token": batch["last_token"][b : b + 1]}
        out = open_session.run(["logits"], alone | {"image_embeds": batch["image_embeds"]} | cache)
        assert error(together[0][b], out[0][0]) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_cache_updates_in_place_when_past_and_present_share_a_buffer(
    export: Export,
    session: Callable[..., ort.InferenceSession],
    precision: Precision,
    capfd: pytest.CaptureFixture[str],
) -> None:
    steps = [prompts(), *(decode_step(i) for i in range(3))]
    open_session = session("plain", precision)
    dtype = np.float16 if precision == "fp16" else np.float32
    shape = (3, 4, LIMITS.cache_rows, 16)
    buffers = {n: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype)) for i in range(3) for n in past_names(i)}
    addresses = {n: b.data_ptr() for n, b in buffers.items()}
    logits = []
    for step in steps:
        binding = open_session.io_binding()
        binding.bind_output("logits")
        for name, array in (step | {"image_embeds": step["image_embeds"].astype(dtype)}).items():
            binding.bind_cpu_input(name, array)
        for i in range(3):
            for past, present in zip(past_names(i), present_names(i), strict=True):
                binding.bind_ortvalue_input(past, buffers[past])
                binding.bind_ortvalue_output(present, buffers[past])
        open_session.run_with_iobinding(binding)
        logits.append(binding.copy_outputs_to_cpu()[0])
    assert "copying past_cache" not in capfd.readouterr().err
    expected, cache = run_ort(open_session, 3, steps)
    assert "copying past_cache" in capfd.readouterr().err  # so the absence above means something
    assert max(map(error, logits, expected)) == 0
    for name, buffer in buffers.items():
        assert buffer.data_ptr() == addresses[name]
        np.testing.assert_array_equal(buffer.numpy(), cache[name])


def test_tensorrt_imports_the_mask_and_few_layers(export: Export) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    counts = {}
    for variant in ("plain", "deeper"):
        logger = trt.Logger(trt.Logger.ERROR)
        network = trt.Builder(logger).create_network(0)
        parser = trt.OnnxParser(network, logger)
        path = export(variant, "fp16")
        assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        counts[variant] = len(layers)
        attention = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
        assert len(attention) == VARIANTS[variant].num_hidden_layers
        for layer in attention:
            assert layer.get_input(3) is not None
            assert layer.get_input(3).dtype == trt.bool
            assert tuple(layer.get_input(3).shape) == (-1, 1, -1, LIMITS.cache_rows)
        assert sum(layer.type == trt.LayerType.KV_CACHE_UPDATE for layer in layers) == 2 * len(attention)
        assert not any(layer.type in (trt.LayerType.SHAPE, trt.LayerType.SLICE) for layer in layers)
    assert counts["deeper"] - counts["plain"] <= 75
