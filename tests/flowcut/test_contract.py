"""Contracts of a decoder in stages, and of mixed precisions."""

from __future__ import annotations

import pytest

from flowcut.aliases import resolve
from flowcut.contract import (
    Limits,
    cached_layers,
    language_contract,
    language_contracts,
    pruned_limit,
    stage_names,
    vision_contract,
)
from flowcut.errors import ConfigError

CONFIG = resolve("llava-1.5-7b", random=True).config
LIMITS = Limits(2, 3, 100, 20)


def names(specs: tuple) -> list[str]:
    return [s.name for s in specs if not s.name.startswith(("past.", "present."))]


def test_one_stage_is_the_whole_decoder() -> None:
    assert language_contracts(CONFIG, 64, "fp16", LIMITS, 1) == (language_contract(CONFIG, 64, "fp16", LIMITS),)
    assert stage_names(1) == ("language",)


@pytest.mark.parametrize("stages", [2, 3, 5, 32])
def test_stages_share_the_layers_evenly_and_in_order(stages: int) -> None:
    contracts = language_contracts(CONFIG, 64, "fp16", LIMITS, stages)
    layers = [cached_layers(c) for c in contracts]
    assert [i for part in layers for i in part] == list(range(32))
    assert max(map(len, layers)) - min(map(len, layers)) <= 1
    assert [c.name for c in contracts] == [f"language.{i}" for i in range(stages)] == list(stage_names(stages))


def test_stages_hand_on_hidden_states_and_only_the_last_knows_the_last_token() -> None:
    first, middle, last = language_contracts(CONFIG, 64, "fp16", LIMITS, 3)
    assert names(first.inputs) == ["input_ids", "position_ids", "image_rows", "image_embeds"]
    assert names(middle.inputs) == ["position_ids", "hidden.11"]
    assert names(last.inputs) == ["position_ids", "last_token", "hidden.21"]
    assert [names(c.outputs) for c in (first, middle, last)] == [["hidden.11"], ["hidden.21"], ["logits"]]
    assert first.ranges.keys() == {"batch", "images", "sequence"}
    assert middle.ranges.keys() == last.ranges.keys() == {"batch", "sequence"}


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stages must be in 1\.\.32 \(the decoder's layers\), got 33"):
        language_contracts(CONFIG, 64, "fp16", LIMITS, 33)


def test_bf16_is_exchanged_in_float32_and_cached_as_it_is() -> None:
    contract = language_contract(CONFIG, 64, "bf16", LIMITS)
    dtypes = {s.name: s.dtype for s in (*contract.inputs, *contract.outputs)}
    assert dtypes["image_embeds"] == "float32"
    assert {dtype for name, dtype in dtypes.items() if name.startswith(("past", "present"))} == {"bfloat16"}


@pytest.mark.parametrize(("vision", "language", "pixels", "embeds"), [
    ("int8", "int4", "float16", "float16"),
    ("fp32", "fp16", "float32", "float16"),
    ("fp16", "bf16", "float16", "float32"),
])  # fmt: skip
def test_image_embeddings_have_the_decoders_type(vision: str, language: str, pixels: str, embeds: str) -> None:
    contract = vision_contract(CONFIG, 64, vision, LIMITS, language)
    assert (contract.inputs[0].dtype, contract.outputs[0].dtype) == (pixels, embeds)


def test_a_prompt_has_room_for_a_picture_and_a_token_behind_the_pruning() -> None:
    """A picture of LLaVA-NeXT that keeps 80 patches of each tile has 401 rows; 241 go."""
    config = resolve("llava-v1.6-vicuna-7b", random=True).config
    assert pruned_limit(config, 80, 160, Limits(max_prompt=242)) == 1
    message = r"^max_prompt must be at least 242 where up to 241 visual tokens .* inside the language model, got 200\."
    with pytest.raises(ConfigError, match=message):
        language_contracts(config, 80, "fp16", Limits(max_prompt=200), 2, 160)
    with pytest.raises(ConfigError, match=message):
        language_contract(config, 80, "fp16", Limits(max_prompt=200), 160)
