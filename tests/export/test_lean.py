"""What FlowCut costs in nodes, TensorRT layers and engine bytes, per scored encoder layer of CLIP-L/14-336.

Schedule `static`, dynamic batch, the graph that is compiled, less the unpruned vision graph of the same geometry.
Structure only: the weights are seeded-random.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
import pytest
from onnx_ir.passes import Sequential, common

from engines.build import BuildReport, build_engine
from export.builder import save
from export.vision import vision_model
from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.contract import Limits, vision_contract
from flowcut.deps import available
from flowcut.schedule import make_schedule

# The decoder plays no part, and the projector little: both are small.
CONFIG = LlavaConfig(VisionConfig(), TextConfig(64, 128, 1, 4, 4, 512), image_token_id=448)
SCORED = 22  # layers 0..21 of 24
NODES, LAYERS, ENGINE_BYTES = 40, 90, 1.3e6  # the most a scored layer may cost


class Graph(NamedTuple):
    """An exported graph and the nodes that are left of it after inlining and folding."""

    path: Path
    nodes: int


def count_nodes(model: ir.Model) -> int:
    """Inline the functions, make constants initializers, merge equal nodes, drop unused ones; count what remains."""
    Sequential(
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
    return sum(1 for _ in model.graph)


def export(directory: Path, tokens: int) -> Graph:
    contract = vision_contract(CONFIG, tokens, "fp16", Limits())
    schedule = make_schedule("static", CONFIG.vision, tokens)
    path = directory / f"vision-{tokens}.onnx"
    save(vision_model(random_weights(CONFIG), contract, schedule, "fp16", {}), path)
    return Graph(path, count_nodes(ir.load(path)))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Graph]:
    """Unpruned and static with 64 tokens."""
    directory = tmp_path_factory.mktemp("lean")
    return export(directory, 576), export(directory, 64)


@pytest.fixture(scope="module")
def reports(graphs: tuple[Graph, Graph]) -> tuple[BuildReport, BuildReport]:
    """The same two, compiled."""
    if not available("tensorrt_rtx"):
        pytest.skip("needs the rtx extra (tensorrt-rtx-cu13)")
    off, static = (
        build_engine(g.path, g.path.with_suffix(".engine"), vision_contract(CONFIG, t, "fp16", Limits()), "rtx")
        for g, t in zip(graphs, (576, 64), strict=True)
    )
    return off, static


def test_a_scored_layer_costs_at_most_40_nodes(graphs: tuple[Graph, Graph]) -> None:
    off, static = graphs
    assert 0 < (static.nodes - off.nodes) / SCORED <= NODES


def test_a_scored_layer_costs_at_most_90_network_layers(reports: tuple[BuildReport, BuildReport]) -> None:
    off, static = reports
    assert 0 < (static.layers - off.layers) / SCORED <= LAYERS


def test_a_scored_layer_costs_at_most_1300_kilobytes_of_engine(reports: tuple[BuildReport, BuildReport]) -> None:
    beyond_weights = [report.engine_bytes - report.weight_bytes for report in reports]
    assert 0 < (beyond_weights[1] - beyond_weights[0]) / SCORED <= ENGINE_BYTES


def test_the_engine_holds_its_weights_once(reports: tuple[BuildReport, BuildReport]) -> None:
    assert all(report.weight_bytes < report.engine_bytes < 1.1 * report.weight_bytes for report in reports)


def test_clip_l_compiles_within_a_minute_and_6_gigabytes(reports: tuple[BuildReport, BuildReport]) -> None:
    _, static = reports
    assert static.seconds < 60
    assert 0 < static.peak_rss_bytes < 6e9
