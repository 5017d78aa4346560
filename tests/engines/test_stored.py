"""Names of the weights in a file, and which of the differences is shown."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir
import pytest
from tiny_engine import write_engine

from calib.groups import linear_layers
from engines.reference import ExportedWeights, product_of
from engines.stored import Difference, parts_of, stored_weights, worst
from flowcut.aliases import resolve
from flowcut.errors import EngineError
from flowcut.tensors import expected_tensors


def test_every_tensor_of_the_checkpoint_is_found_once(tmp_path: Path) -> None:
    """But for those that LLaVA never runs, the tower's last layer and norm, and the class embedding."""
    engine = write_engine(tmp_path / "engine", precision="int8")
    weights = ExportedWeights(engine.model.weights, "int8")
    found = [d for graph in ("vision", "language") for d in stored_weights(engine.directory / f"{graph}.onnx", weights)]
    assert {d.error for d in found} == {0.0}
    names = [part for difference in found for part in parts_of(difference.name)]
    config = engine.model.config
    last = f"encoder.layers.{config.vision.num_hidden_layers - 1}."
    unused = {n for n in expected_tensors(config) if last in n or "post_layernorm" in n or "class_embedding" in n}
    assert sorted(names) == sorted(expected_tensors(config).keys() - unused)


def test_layers_of_one_product_are_those_of_the_file(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", precision="fp16")
    for graph in ("vision", "language"):
        initializers = ir.load(engine.directory / f"{graph}.onnx").graph.initializers
        linear = set(linear_layers(engine.model.config))
        for name in initializers:
            layers = [part.removesuffix(".weight") for part in parts_of(name)]
            for layer in linear.intersection(layers):
                assert list(product_of(layer)) == layers


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", precision="fp16")
    other = ExportedWeights(resolve("llava-1.5-7b", random=True, decoder_layers=1).weights, "fp16")
    with pytest.raises(EngineError, match=r"language\.onnx must hold the checkpoint's tensors, got"):
        stored_weights(engine.directory / "language.onnx", other)


def test_what_is_not_finite_is_worst() -> None:
    some = [Difference("a", 0.1), Difference("b", math.nan), Difference("c", 5.0)]
    assert worst(some).name == "b"
    assert worst(some[::2]).name == "c"
