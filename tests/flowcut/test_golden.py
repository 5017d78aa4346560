"""The authors' own outputs (tests/golden, or the directory in FLOWCUT_GOLDEN), and what must equal them.

`adaptive` must reproduce every file. `masked` with full capacity must do the same on torch and on ONNX Runtime, and
`static` must be one thing on both. Features are compared as max|a-b| / max|b|. The files of kind `text` are a decoder
that drops visual tokens after its second layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import recipe
import torch
from conftest import GOLDEN, Golden, WriteCheckpoint
from references import relative_error

from export.builder import save
from export.vision import vision_model
from flowcut.checkpoint import open_checkpoint
from flowcut.contract import Limits, vision_contract
from flowcut.language import LanguageModel
from flowcut.language_pruning import read
from flowcut.schedule import make_schedule
from flowcut.vision import VisionModel

FEATURES = 1e-4


class Outcome(NamedTuple):
    """kept [1, T], counts [L+1], features [1, T, hidden]."""

    kept: np.ndarray
    counts: np.ndarray
    features: np.ndarray


class Case:
    """The checkpoint and picture of one golden file; the model is read once, each outcome computed once."""

    def __init__(self, meta: Mapping[str, Any], checkpoint: WriteCheckpoint, directory: Path) -> None:
        self.directory, self.tokens = directory, meta["tokens"]
        self.weights = open_checkpoint(checkpoint(meta["preset"], meta["vision"], seed=meta["seed"]))
        self.pixels = recipe.pixels(meta["vision"]["image"], 1, meta["seed"])
        self.on_torch, self.on_ort = cache(self._on_torch), cache(self._on_ort)

    @cached_property
    def model(self) -> VisionModel:
        return VisionModel.from_weights(self.weights)

    def _on_torch(self, spec: str) -> Outcome:
        schedule = make_schedule(spec, self.weights.config.vision, self.tokens)
        with torch.inference_mode():
            output = self.model.features(torch.from_numpy(self.pixels), schedule)
        return Outcome(output.kept.numpy(), output.counts[0].numpy(), output.features.numpy())

    def _on_ort(self, spec: str) -> Outcome:
        config = self.weights.config
        contract = vision_contract(config, self.tokens, "fp32", Limits())
        schedule = make_schedule(spec, config.vision, self.tokens)
        path = self.directory / "vision.onnx"  # overwritten by the next case: CLIP-L's weights are 1.2 GB
        save(vision_model(self.weights, contract, schedule, "fp32", {}, trace=True), path)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        kept, counts, features = session.run(["kept", "counts", "features"], {"pixel_values": self.pixels})
        return Outcome(kept, counts[0], features)


def read_meta(path: Path) -> Mapping[str, Any]:
    with np.load(path) as data:
        meta: Mapping[str, Any] = json.loads(str(data["meta"]))
    return meta


def vision_files() -> list[Any]:
    """The golden files of vision towers; those of CLIP-L's size take a minute of tests each."""
    metas = {path: read_meta(path) for path in sorted(GOLDEN.glob("*.npz"))}
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] if meta["vision"]["hidden"] >= 1024 else [])
        for path, meta in metas.items()
        if meta["kind"] == "vision"
    ]


@pytest.fixture(scope="module")
def case_of(
    checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, Mapping[str, Any]], Case]]:
    directory, made = tmp_path_factory.mktemp("golden"), dict[str, Case]()

    def case(name: str, meta: Mapping[str, Any]) -> Case:
        if name not in made:
            made[name] = Case(meta, checkpoint, directory)
        return made[name]

    yield case
    made.clear()


@pytest.fixture(params=vision_files())
def case(request: pytest.FixtureRequest, case_of: Callable[[str, Mapping[str, Any]], Case]) -> Case:
    return case_of(request.param.stem, read_meta(request.param))


def assert_equal(outcome: Outcome, expected: Outcome) -> None:
    np.testing.assert_array_equal(outcome.counts, expected.counts)
    np.testing.assert_array_equal(outcome.kept, expected.kept)
    assert relative_error(outcome.features, expected.features) <= FEATURES


def assert_decoder_equal(golden: Golden, checkpoint: WriteCheckpoint) -> None:
    meta = golden.meta
    weights = open_checkpoint(checkpoint(meta["preset"], text=meta["text"], seed=meta["seed"]))
    model, span = LanguageModel.from_weights(weights), (meta["visual_start"], meta["visual_len"])
    shape = (1, meta["length"], meta["text"]["hidden"])
    rng = np.random.Generator(np.random.PCG64([meta["seed"], 104729]))
    embeds = torch.from_numpy(0.5 * rng.standard_normal(shape, np.float32))  # as meta["inputs_embeds"] says
    reading = read(model, embeds, [span], meta["tokens"])
    np.testing.assert_array_equal(torch.stack(reading.kept), golden.arrays["kept"])
    assert [keys.shape[2] for keys in reading.cache.keys] == golden.arrays["kv_lengths"].tolist()
    with torch.inference_mode():
        assert relative_error(model.model.norm(reading.hidden), golden.arrays["hidden"]) <= FEATURES


def test_torch_reproduces_the_authors_outputs(
    golden: Golden, case_of: Callable[[str, Mapping[str, Any]], Case], checkpoint: WriteCheckpoint
) -> None:
    if golden.meta["kind"] == "text":
        assert_decoder_equal(golden, checkpoint)
    else:
        assert_equal(case_of(golden.name, golden.meta).on_torch("adaptive"), Outcome(**golden.arrays))


def test_masked_equals_adaptive_on_torch(case: Case) -> None:
    assert_equal(case.on_torch("masked"), case.on_torch("adaptive"))


def test_masked_on_onnx_runtime_equals_adaptive(case: Case) -> None:
    assert_equal(case.on_ort("masked"), case.on_torch("adaptive"))


def test_static_on_onnx_runtime_equals_static_on_torch(case: Case) -> None:
    assert_equal(case.on_ort("static"), case.on_torch("static"))
