"""TensorRT-RTX takes LLaVA-NeXT's graphs and those that drop visual tokens in the decoder; no GPU.

Structure only: the weights are seeded-random.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.build import BuildReport, build_engine
from export.builder import save
from export.language import language_model
from export.vision import vision_model
from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, Precision, TextConfig, VisionConfig
from flowcut.contract import GraphContract, Limits, language_contract, language_contracts, vision_contract
from flowcut.deps import available
from flowcut.schedule import make_schedule

TINY, SIDE = VisionConfig(64, 128, 12, 4, 56, 7), 56
NEXT = ((SIDE, 2 * SIDE), (2 * SIDE, 2 * SIDE))
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
VICUNA_7B = LlavaConfig(
    VisionConfig(), TextConfig(num_hidden_layers=4, vocab_size=32064, rms_norm_eps=1e-5), grid_pinpoints=PINPOINTS
)
MOST_LAYERS = 235  # that closing the gaps, scoring and pruning add to a decoder's network, however deep it is

pytestmark = pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")


def tiny(key_heads: int, pinpoints: tuple[tuple[int, int], ...] | None) -> LlavaConfig:
    return LlavaConfig(TINY, TextConfig(64, 128, 4, 4, key_heads, 512, 4096, 1e-5), 448, grid_pinpoints=pinpoints)


def exported(
    config: LlavaConfig, tokens: int, llm_tokens: int | None, directory: Path, precision: Precision = "fp16"
) -> tuple[Path, GraphContract]:
    """The whole decoder as one graph."""
    limits = Limits(max_batch=2, max_images=3, max_prompt=600, max_new_tokens=16)
    contract = language_contract(config, tokens, precision, limits, llm_tokens)
    path = directory / f"language-{llm_tokens}.onnx"
    save(language_model(random_weights(config), contract, precision, {}), path)
    return path, contract


def compiled(path: Path, contract: GraphContract) -> BuildReport:
    return build_engine(path, path.with_suffix(".engine"), contract, "rtx")


def network_layers(path: Path) -> int:
    """What TensorRT's parser makes of a file."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path))
    return int(network.num_layers)


@pytest.mark.parametrize(
    ("key_heads", "pinpoints"), [(4, NEXT), (2, NEXT), (4, None)], ids=["next", "next-gqa", "llava-1.5"]
)
def test_the_decoder_that_prunes_compiles_to_few_more_layers(
    key_heads: int, pinpoints: tuple[tuple[int, int], ...] | None, tmp_path: Path
) -> None:
    config = tiny(key_heads, pinpoints)
    plain, _ = exported(config, 16, None, tmp_path)
    pruned = compiled(*exported(config, 16, 8, tmp_path))
    assert not pruned.warnings
    assert 0 < pruned.layers - network_layers(plain) <= MOST_LAYERS


def test_stages_of_a_decoder_that_prunes_compile(tmp_path: Path) -> None:
    config = tiny(4, NEXT)
    for contract in language_contracts(config, 16, "fp16", Limits(2, 3, 96, 16), 2, 8):
        path = tmp_path / f"{contract.name}.onnx"
        save(language_model(random_weights(config), contract, "fp16", {}), path)
        assert not compiled(path, contract).warnings


@pytest.mark.parametrize("tokens", [8, 64], ids=["pruned", "all"])
def test_the_tower_and_its_packing_compile(tokens: int, tmp_path: Path) -> None:
    config, path = tiny(4, NEXT), tmp_path / "vision.onnx"
    contract = vision_contract(config, tokens, "fp16", Limits(2, 3))
    save(vision_model(random_weights(config), contract, make_schedule("static", TINY, tokens), "fp16", {}), path)
    assert not compiled(path, contract).warnings


@pytest.mark.long
def test_four_layers_of_7b_width_in_int4_compile_with_pruning(tmp_path: Path) -> None:
    report = compiled(*exported(VICUNA_7B, 80, 160, tmp_path, "int4"))
    assert not report.warnings
    assert report.weight_bytes < report.engine_bytes < 1.05 * report.weight_bytes
    assert 0 < report.peak_rss_bytes < 4e9
    assert report.seconds < 120
