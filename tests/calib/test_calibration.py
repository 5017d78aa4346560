"""The calibration file, what it is refused for, and that folding its scales in changes no result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from calib.calibration import Calibration, load_calibration, smoothed, write_calibration
from calib.groups import groups, linear_layers
from flowcut.checkpoint import Weights, random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.errors import ConfigError, EngineError
from flowcut.language import KVCache, LanguageModel
from flowcut.schedule import make_schedule
from flowcut.vision import VisionModel

pytestmark = pytest.mark.usefixtures("one_thread")

VISION = VisionConfig(64, 128, 6, 4, 56, 7)
TEXT = TextConfig(64, 128, 3, 4, 4, 512, 4096, 1e-5)
BOTH = ("vision", "language")
Forward = tuple[np.ndarray, np.ndarray, np.ndarray]


def weights_of(text: TextConfig = TEXT, seed: int = 0, dtype: str = "float32") -> Weights:
    return random_weights(LlavaConfig(VISION, text, image_token_id=448), seed, dtype)


def scales_for(weights: Weights, powers_of_two: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    exponents = {group.name: rng.normal(0, 1.5, group.inputs) for group in groups(weights.config)}
    return {n: 2.0 ** (np.rint(e) if powers_of_two else e).astype(np.float32) for n, e in exponents.items()}


def ranges_for(weights: Weights) -> dict[str, float]:
    return {name: 1.5 + i for i, name in enumerate(linear_layers(weights.config))}


def written(path: Path, weights: Weights, powers_of_two: bool = False) -> Calibration:
    scales = scales_for(weights, powers_of_two)
    return write_calibration(path, weights, ranges_for(weights), scales, {"pictures": [1, 2], "note": "é"})


def test_file_holds_what_was_written(tmp_path: Path) -> None:
    weights = weights_of()
    told = written(tmp_path / "c.safetensors", weights)
    read = load_calibration(tmp_path / "c.safetensors", weights)
    assert read.scales.keys() == told.scales.keys()
    assert all(np.array_equal(read.scales[name], scale) for name, scale in told.scales.items())
    assert replace(read, scales={}) == replace(told, scales={})
    assert read.source_sha256 == weights.sha256
    assert read.info == {"pictures": [1, 2], "note": "é"}


def test_same_content_same_bytes(tmp_path: Path) -> None:
    weights = weights_of()
    first = written(tmp_path / "a.safetensors", weights)
    backwards = dict(reversed(scales_for(weights).items())), dict(reversed(ranges_for(weights).items()))
    info = {"note": "é", "pictures": [1, 2]}
    second = write_calibration(tmp_path / "b.safetensors", weights, backwards[1], backwards[0], info)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert first.sha256 == second.sha256


def test_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="must be a directory to write"):
        written(tmp_path / "absent" / "c.safetensors", weights_of())
    assert list(tmp_path.iterdir()) == []


def changed(path: Path, tensors: Mapping[str, np.ndarray] | None = None, **header: Any) -> None:
    """Rewrite a file with other tensors, or with other entries in its JSON; None takes one out."""
    with safe_open(path, "np") as opened:
        metadata = json.loads(opened.metadata()["flowcut"])
    metadata = {k: v for k, v in (metadata | header).items() if v is not None}
    save_file(dict(load_file(path) if tensors is None else tensors), path, {"flowcut": json.dumps(metadata)})


def refusal(path: Path, weights: Weights) -> str:
    with pytest.raises(ConfigError) as caught:
        load_calibration(path, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    assert "must be a readable safetensors file" in refusal(path, weights_of())
    path.write_bytes(b"no such thing")
    assert "must be a readable safetensors file" in refusal(path, weights_of())
    written(path, weights_of())
    path.write_bytes(path.read_bytes()[:-1])
    assert "must be a readable safetensors file" in refusal(path, weights_of())
    save_file({"x": np.zeros(3, np.float32)}, path)
    assert "must be a file of `flowcut calibrate quantize`, got another kind." in refusal(path, weights_of())


def test_other_checkpoints_and_geometries_are_refused(tmp_path: Path) -> None:
    path, weights, other = tmp_path / "c.safetensors", weights_of(), weights_of(seed=1)
    written(path, weights)
    message = refusal(path, other)
    assert f"whose sha256 is {other.sha256[:12]}, got one for {weights.sha256[:12]}." in message
    message = refusal(path, weights_of(replace(TEXT, num_hidden_layers=2)))
    assert "must be made for {'text.num_hidden_layers': 2}, got {'text.num_hidden_layers': 3}." in message


Q, DOWN = (f"scales.language_model.model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.down_proj"))
V_RANGE = "language_model.model.layers.0.self_attn.v_proj"
ONES = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": 2}, r"must have format 1, got 2\."),
        ({"color": "red"}, r"must have the keys \['format', .*, got \['color', 'format'"),
        ({"ranges": None}, r"must have the keys .* got \['format', 'geometry', 'info', 'source_sha256'\]"),
        ({"info": []}, r"info must be a dict, got \[\]\."),
        ({"ranges": {V_RANGE: 1.0}}, r"must have ranges of all \d+ layers that take one, got no .* more\)"),
        ({"tensors": {"scales.lm_head": ONES}}, r"must have scales of all \d+ layers that take one, got "),
        (
            {"tensors": {Q: ONES * 0}},
            r"q_proj must be 64 positive float32 numbers, got float32\[64\], some ",
        ),
        ({"tensors": {Q: ONES * np.nan}}, r"q_proj must be 64 positive float32 numbers"),
        ({"tensors": {Q: ONES[:8]}}, r"q_proj must be 64 positive float32 numbers, got float32\[8\]\."),
        ({"tensors": {DOWN: np.ones(128)}}, r"down_proj must be 128 positive float32 numbers, got float64\[128\]\."),
    ],
    ids=lambda value: re.sub(r"\W+", " ", str(value))[:24],
)
def test_contents_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "c.safetensors"
    written(path, weights_of())
    tensors = change.get("tensors")
    if tensors is not None and tensors.keys() <= load_file(path).keys():
        change = {"tensors": load_file(path) | tensors}
    changed(path, **change)
    assert re.search(expected, refusal(path, weights_of()))


@pytest.mark.parametrize("value", [-1.0, "1", True, float("inf"), None])
def test_ranges_that_are_none_are_refused(tmp_path: Path, value: object) -> None:
    path, weights = tmp_path / "c.safetensors", weights_of()
    written(path, weights)
    changed(path, ranges=ranges_for(weights) | {V_RANGE: value})
    assert f"the range of {V_RANGE} must be 0 or more, got {value!r}." in refusal(path, weights)


def test_only_ranges_or_only_scales_will_do(tmp_path: Path) -> None:
    path, weights = tmp_path / "c.safetensors", weights_of()
    write_calibration(path, weights, ranges_for(weights), {}, {})
    assert load_calibration(path, weights).scales == {}
    write_calibration(path, weights, {}, scales_for(weights), {})
    assert load_calibration(path, weights).ranges == {}


def forward(weights: Weights, dtype: torch.dtype) -> Forward:
    """kept, image embeddings and logits of two pictures, of which 11 patches are kept."""
    vision, language = VisionModel.from_weights(weights, dtype), LanguageModel.from_weights(weights, dtype)
    schedule = make_schedule("static", VISION, 11)
    pixels = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 3, 56, 56))).to(dtype)
    ids = torch.arange(2, 2 + 2 * 20).view(2, 20)
    rows = torch.full((2, 20), -1)
    rows[:, 3:14] = torch.arange(22).view(2, 11)
    with torch.inference_mode():
        embeds, kept = vision(pixels, schedule)
        cache = KVCache.allocate(weights.config.text, 2, 20, dtype)
        positions = torch.arange(20).repeat(2, 1)
        hidden = language(ids, positions, rows, embeds, cache)
        return kept.numpy(), embeds.numpy(), language.logits(hidden).numpy()


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped-query"])
def test_scales_that_are_powers_of_two_change_no_bit(tmp_path: Path, grouped: bool) -> None:
    weights = weights_of(replace(TEXT, num_key_value_heads=2 if grouped else 4))
    calibration = written(tmp_path / "c.safetensors", weights, powers_of_two=True)
    before = forward(weights, torch.float32)
    after = forward(smoothed(weights, calibration, BOTH), torch.float32)
    for plain, scaled in zip(before, after, strict=True):
        assert np.array_equal(plain, scaled)


def test_any_scales_change_rounding_only(tmp_path: Path) -> None:
    weights = weights_of()
    calibration = written(tmp_path / "c.safetensors", weights)
    kept, *before = forward(weights, torch.float64)
    kept_after, *after = forward(smoothed(weights, calibration, BOTH), torch.float64)
    assert np.array_equal(kept, kept_after)
    for plain, scaled in zip(before, after, strict=True):
        assert np.abs(plain - scaled).max() < 2e-5 * np.abs(plain).max()


def test_every_grouped_layer_has_other_weights(tmp_path: Path) -> None:
    weights = weights_of()
    scaled = smoothed(weights, written(tmp_path / "c.safetensors", weights), BOTH)
    for group in groups(weights.config):
        for layer in group.layers:
            assert not np.array_equal(scaled.load(f"{layer}.weight"), weights.load(f"{layer}.weight"))


def test_what_flow_score_reads_keeps_its_rows(tmp_path: Path) -> None:
    """v_proj may be scaled by columns, as its input is divided, never by rows."""
    weights = weights_of()
    scaled = smoothed(weights, written(tmp_path / "c.safetensors", weights), BOTH)
    for i in range(VISION.num_hidden_layers - 1):
        name = f"vision_tower.vision_model.encoder.layers.{i}.self_attn."
        factors = scaled.load(f"{name}v_proj.weight") / weights.load(f"{name}v_proj.weight")
        assert np.ptp(factors, axis=0).max() < 1e-5
        assert np.array_equal(scaled.load(f"{name}v_proj.bias"), weights.load(f"{name}v_proj.bias"))


@pytest.mark.parametrize("part", BOTH)
def test_one_part_alone(tmp_path: Path, part: str) -> None:
    weights = weights_of()
    scaled = smoothed(weights, written(tmp_path / "c.safetensors", weights), {part})
    tower = "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight"
    decoder = "language_model.model.layers.0.input_layernorm.weight"
    same = [np.array_equal(scaled.load(name), weights.load(name)) for name in (tower, decoder)]
    assert same == ([False, True] if part == "vision" else [True, False])


def test_untouched_tensors_are_as_stored_and_others_do_not_overflow(tmp_path: Path) -> None:
    weights = weights_of(dtype="float16")
    calibration = written(tmp_path / "c.safetensors", weights)
    huge = {name: np.full_like(scale, 1e7) for name, scale in calibration.scales.items()}
    scaled = smoothed(weights, replace(calibration, scales=huge), BOTH)
    assert scaled.load("language_model.model.norm.weight").dtype == np.float16
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert scaled.load(name) == pytest.approx(weights.load(name).astype(np.float32) * np.float32(1e7))


def test_identity_follows_from_checkpoint_scales_and_parts(tmp_path: Path) -> None:
    weights = weights_of()
    calibration = written(tmp_path / "c.safetensors", weights)
    other = write_calibration(tmp_path / "d.safetensors", weights, {}, scales_for(weights), {})
    asked = [(calibration, BOTH), (calibration, ("vision",)), (other, BOTH)]
    hashes = {weights.sha256, *(smoothed(weights, given, parts).sha256 for given, parts in asked)}
    assert len(hashes) == 4
    assert smoothed(weights, calibration, ("language", "vision")).sha256 in hashes
    assert smoothed(weights, calibration, BOTH).random
    assert smoothed(weights, calibration, BOTH).config == weights.config
