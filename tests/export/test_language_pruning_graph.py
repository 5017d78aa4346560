"""The language graph that drops visual tokens: on ONNX Runtime equal to a decoder whose rows are physically gone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import GOLDEN, WriteCheckpoint
from pruned_prompts import Arrays, Decoder, Picture, Prompt, feeds
from references import relative_error

from engines.flow_score.launch import LOGITS
from engines.flow_score.nodes import plugin_model, plugin_variants
from export.builder import save
from export.language import language_model
from flowcut.checkpoint import Weights, open_checkpoint, random_weights
from flowcut.config import LlavaConfig, Precision, TextConfig, VisionConfig
from flowcut.contract import Limits, language_contract, language_contracts, past_names
from flowcut.errors import ConfigError
from flowcut.language import KVCache, LanguageModel
from flowcut.language_pruning import read, step

LIMITS = Limits(max_batch=4, max_images=4, max_prompt=64, max_new_tokens=36)
VISION = VisionConfig(64, 128, 12, 4, 56, 7)  # 8 x 8 patches
PINPOINTS = ((56, 112), (112, 112))
PLAIN, GROUPED = TextConfig(64, 128, 4, 4, 4, 512, 4096, 1e-5), TextConfig(64, 128, 4, 4, 2, 512, 4096, 1e-5)
STEPS, TOLERANCE = 32, 2e-5

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Model:
    """A geometry and its budget; `tokens` of each image that the tower sees."""

    text: TextConfig
    tokens: int
    llm_tokens: int
    anyres: bool = True

    @property
    def config(self) -> LlavaConfig:
        return LlavaConfig(VISION, self.text, 448, grid_pinpoints=PINPOINTS if self.anyres else None)

    @property
    def slots(self) -> int:
        return 5 * self.tokens + 1 if self.anyres else self.tokens


MODELS = {
    "next": Model(PLAIN, 4, 8),
    "next-gqa": Model(GROUPED, 4, 8),
    "next-odd": Model(PLAIN, 3, 7),  # as a lone tile's 3 + 1 tokens, below the budget
    "1.5": Model(PLAIN, 12, 5, anyres=False),
    "1.5-gqa": Model(GROUPED, 12, 1, anyres=False),
}


@cache
def weights_of(model: Model) -> Weights:
    return random_weights(model.config, dtype="float32")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """export(name, stages=1, precision="fp32") -> the graphs' paths; each is written once."""
    directory = tmp_path_factory.mktemp("pruned")

    @cache
    def paths_of(name: str, stages: int = 1, precision: Precision = "fp32") -> list[Path]:
        model = MODELS[name]
        contracts = language_contracts(model.config, model.tokens, precision, LIMITS, stages, model.llm_tokens)
        paths = [directory / f"{name}-{stages}-{precision}.{contract.name}.onnx" for contract in contracts]
        for path, contract in zip(paths, contracts, strict=True):
            save(language_model(weights_of(model), contract, precision, {}), path)
        return paths

    return paths_of


def prompts_of(model: Model, seed: int = 0) -> list[Prompt]:
    """No picture, one, and two next to each other, among texts of different lengths."""
    rng = np.random.default_rng(seed)

    def text(count: int) -> list[int]:
        return [int(token) for token in rng.integers(6, 448, count)]

    def picture(count: int, capacity: int) -> Picture:
        return Picture(0.5 * rng.standard_normal((count, 64)).astype(np.float32), capacity)

    if not model.anyres:
        full = model.tokens
        return [
            text(20),
            [*text(3), picture(full, full), *text(9)],
            [picture(full, full), picture(full, full), *text(5)],
        ]
    lone, most = model.tokens + 1, 5 * model.tokens
    return [
        [*text(4), picture(most - 7, most), *text(6)],
        text(11),
        [*text(2), picture(lone, lone), picture(most - 3, most), *text(3)],
    ]


@dataclass(frozen=True)
class Physical:
    """What flowcut.language_pruning makes of one prompt and STEPS greedy tokens behind it."""

    lengths: tuple[int, int]
    kept: list[np.ndarray]
    cache: KVCache
    logits: list[np.ndarray]


@cache
def physically(name: str) -> list[Physical]:
    """Each prompt of that model, by itself."""
    model = MODELS[name]
    decoder = LanguageModel.from_weights(weights_of(model))
    return [_read(decoder, prompt, model.llm_tokens) for prompt in prompts_of(model)]


def _read(decoder: LanguageModel, prompt: Prompt, llm_tokens: int) -> Physical:
    table = decoder.model.embed_tokens.weight.detach()
    parts = [torch.from_numpy(x.tokens) if isinstance(x, Picture) else table[[x]] for x in prompt]
    starts = np.cumsum([0, *map(len, parts)])
    spans = [(int(at), len(x.tokens)) for at, x in zip(starts, prompt, strict=False) if isinstance(x, Picture)]
    reading = read(decoder, torch.cat(parts)[None], spans, llm_tokens, room=STEPS)
    lengths, logits = reading.lengths, [decoder.logits(reading.hidden)[0, -1].numpy()]
    for _ in range(STEPS):
        hidden = step(decoder, int(logits[-1].argmax()), reading)
        logits.append(decoder.logits(hidden)[0, -1].numpy())
    return Physical(lengths, [numbers.numpy() for numbers in reading.kept], reading.cache, logits)


def prefill_of(model: Model, prompts: Sequence[Prompt]) -> Arrays:
    return feeds(prompts, model.slots, model.llm_tokens, 64, model.anyres)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_32_decode_steps_equal_rows_physically_dropped(
    export: Callable[..., list[Path]], name: str, stages: int
) -> None:
    model, expected = MODELS[name], physically(name)
    prompts = prompts_of(model)
    decoder = Decoder(export(name, stages), len(prompts))
    found, tokens, logits = decoder.generate(prefill_of(model, prompts), STEPS)
    assert [(a, b) for a, b in zip(found["lengths"], found["pruned_lengths"], strict=True)] == [
        each.lengths for each in expected
    ]
    kept = [numbers for each in expected for numbers in each.kept]
    for row, numbers in zip(found["kept_tokens"], kept, strict=True):
        np.testing.assert_array_equal(row[: len(numbers)], numbers)
    for b, each in enumerate(expected):
        assert tokens[b].tolist() == [int(row.argmax()) for row in each.logits]
        assert max(relative_error(got[b], row) for got, row in zip(logits, each.logits, strict=True)) < TOLERANCE
        for layer in range(model.text.num_hidden_layers):
            rows = each.lengths[layer > 1] + STEPS
            for past, caches in zip(past_names(layer), (each.cache.keys, each.cache.values), strict=True):
                assert relative_error(decoder.cache[past][b, :, :rows], caches[layer][0, :, :rows]) < TOLERANCE


def test_something_is_dropped_and_something_is_not() -> None:
    """What the test above is worth."""
    for name, model in MODELS.items():
        kept = [len(numbers) for each in physically(name) for numbers in each.kept]
        assert model.llm_tokens in kept
        assert not model.anyres or min(kept) == model.tokens + 1 < model.llm_tokens
        assert len({row.argmax() for each in physically(name) for row in each.logits}) > 5


def test_a_sequence_is_the_same_alone_and_in_a_batch(export: Callable[..., list[Path]]) -> None:
    model = MODELS["next"]
    prompts = prompts_of(model)
    together, tokens, _ = Decoder(export("next"), 3).generate(prefill_of(model, prompts), 4)
    for b, prompt in enumerate(prompts):
        alone, alone_tokens, _ = Decoder(export("next"), 1).generate(prefill_of(model, [prompt]), 4)
        assert relative_error(together["logits"][b], alone["logits"][0]) < TOLERANCE
        np.testing.assert_array_equal(tokens[b], alone_tokens[0])


def test_float16_drops_as_many_and_is_close(export: Callable[..., list[Path]]) -> None:
    model = MODELS["next"]
    prompts = prompts_of(model)
    found, _, _ = Decoder(export("next", precision="fp16"), len(prompts)).generate(prefill_of(model, prompts), 0)
    for b, each in enumerate(physically("next")):
        assert found["pruned_lengths"][b] == each.lengths[1]
        assert relative_error(found["logits"][b], each.logits[0]) < 2e-2


def text_files() -> list[Any]:
    paths = [path for path in sorted(GOLDEN.glob("*.npz")) if path.stem.startswith("text")]
    return [pytest.param(path, id=path.stem) for path in paths]


@pytest.mark.parametrize("path", text_files())
def test_exported_graph_reproduces_the_authors_decoder(path: Path, checkpoint: WriteCheckpoint, tmp_path: Path) -> None:
    with np.load(path) as data:
        meta, golden = json.loads(str(data["meta"])), {name: data[name] for name in ("kept", "hidden", "kv_lengths")}
    weights = open_checkpoint(checkpoint(meta["preset"], text=meta["text"], seed=meta["seed"]))
    limits = Limits(1, 4, meta["length"], 1)
    contract = language_contract(weights.config, meta["visual_len"], "fp32", limits, meta["tokens"])
    save(language_model(weights, contract, "fp32", {}), tmp_path / "language.onnx")
    hidden_name = with_last_hidden(tmp_path / "language.onnx")
    decoder = Decoder([tmp_path / "language.onnx"], 1)
    found = decoder.run(golden_feeds(meta))
    gain = weights.load("language_model.model.norm.weight")
    hidden = found[hidden_name]
    hidden = hidden / np.sqrt(np.square(hidden).mean(-1, keepdims=True) + weights.config.text.rms_norm_eps) * gain
    np.testing.assert_array_equal(found["kept_tokens"][:1], golden["kept"])
    assert relative_error(hidden, golden["hidden"]) <= 1e-4
    lengths = [found["lengths"][0]] * 2 + [found["pruned_lengths"][0]] * (weights.config.text.num_hidden_layers - 2)
    assert lengths == golden["kv_lengths"].tolist()
    for layer, length in enumerate(lengths):
        written = [np.abs(decoder.cache[name][0]).max((0, 2)) > 0 for name in past_names(layer)]
        assert [rows.sum() for rows in written] == [length, length]


def golden_feeds(meta: Mapping[str, Any]) -> Arrays:
    """The prompt's embeddings are given, so every row is a picture's: those of text of pictures that have no span."""
    rng = np.random.Generator(np.random.PCG64([meta["seed"], 104729]))
    length, start, count = meta["length"], meta["visual_start"], meta["visual_len"]
    embeds = 0.5 * rng.standard_normal((1, length, meta["text"]["hidden"]), dtype=np.float32)[0]
    visual = np.arange(start, start + count)
    order = np.concatenate([visual, np.setdiff1d(np.arange(length), visual)])  # rows of image_embeds
    table = np.zeros((-(-length // count) * count, embeds.shape[1]), np.float32)
    table[:length] = embeds[order]
    pictures = table.reshape(-1, count, embeds.shape[1])
    spans = np.zeros((len(pictures), 3), np.int64)
    spans[0] = 0, start, count
    return {
        "input_ids": np.zeros((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "image_rows": np.argsort(order)[None],
        "last_token": np.array([length - 1]),
        "image_embeds": pictures,
        "image_spans": spans,
        "pruned_position_ids": np.arange(length - count + meta["tokens"])[None],
    }


def with_last_hidden(path: Path) -> str:
    """Make what leaves the last layer an output of the file; returns its name."""
    model = onnx.load(path)
    producers = {name: node for node in model.graph.node for name in node.output}
    (norm,) = (node for node in model.graph.node if "language_model.model.norm.weight" in node.input)
    name = producers[norm.input[0]].input[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", "s", "d"]))
    onnx.save(model, path)
    return str(name)


@pytest.mark.parametrize("name", ["next", "next-gqa", "1.5"])
def test_full_tensorrt_gets_plugin_nodes_in_place_of_the_score(name: str, tmp_path: Path) -> None:
    model = replace(MODELS[name], text=replace(MODELS[name].text, hidden_size=128))  # heads of 32, the kernels' least
    contract = language_contract(model.config, model.tokens, "fp16", LIMITS, model.llm_tokens)
    path = tmp_path / "language.onnx"
    save(language_model(weights_of(model), contract, "fp16", {}), path)
    proto = onnx.load(path, load_external_data=False)
    (logits,) = (variant for variant in plugin_variants(proto) if variant.kernel == LOGITS)
    assert (logits.dtype, logits.head_size) == ("fp16", 32)
    rewritten = plugin_model(proto, path.parent)
    own = {node.op_type: node for node in rewritten.graph.node if node.domain}
    combine = "FlowScoreCombineMasked" if model.anyres else "FlowScoreCombine"
    assert own.keys() == {"FlowScoreLogits", combine}
    options = {a.name: onnx.helper.get_attribute_value(a) for a in own["FlowScoreLogits"].attribute}
    group = model.text.num_attention_heads // model.text.num_key_value_heads
    assert (options["group"], options["token_major"]) == (group, int(group == 1))
    assert options["logit_scale"] == options["semantic_scale"] == pytest.approx(32**-0.5)
    assert not rewritten.functions


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_file_passes_the_checker_with_full_shape_inference(
    export: Callable[..., list[Path]], name: str, precision: Precision
) -> None:
    for stages in (1, 3):
        for path in export(name, stages, precision):
            onnx.checker.check_model(path, full_check=True)


def test_a_head_that_the_grouped_score_cannot_split_is_refused() -> None:
    text = TextConfig(24, 32, 3, 4, 2, 512)  # 6 a head
    config = LlavaConfig(VISION, text, 448)
    contract = language_contract(config, 12, "fp32", LIMITS, 4)
    with pytest.raises(ConfigError, match="head size must be a multiple of 4 where grouped queries are scored, got 6"):
        language_model(random_weights(config), contract, "fp32", {})
