"""Reading config.json: what it may leave out, and what is refused, with the field's name."""

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe

from flowcut.config import LlavaConfig, TextConfig, VisionConfig, is_number
from flowcut.errors import ConfigError


def _tiny() -> dict[str, Any]:
    return recipe.config(*recipe.PRESETS["tiny"], "float32")


@pytest.mark.parametrize("value", [0, -1.5, np.float32(0.5), np.int64(3), np.float64(1e300), Fraction(1, 3)])
def test_what_is_a_number(value: object) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, [1], float("nan"), np.float32("inf"), 10**400])
def test_what_is_none(value: object) -> None:
    assert not is_number(value)


def test_reads_geometry_and_special_tokens() -> None:
    config = LlavaConfig.from_dict(_tiny())
    assert config.image_token_id == 448
    assert config.eos_token_ids == (2,)
    assert (config.vision.grid, config.vision.patches, config.vision.head_size, config.vision.select) == (8, 64, 16, 10)
    assert (config.text.head_size, config.text.rms_norm_eps, config.text.rope_theta) == (16, 1e-5, 10000.0)
    assert not config.text.tie_word_embeddings


@pytest.mark.parametrize("name", ["image_token_index", "image_token_id"])
def test_image_token_has_two_spellings(name: str) -> None:
    data = _tiny()
    del data["image_token_index"]
    data[name] = 7
    assert LlavaConfig.from_dict(data).image_token_id == 7


def test_absent_fields_mean_what_they_mean_to_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sparse = {
        "model_type": "llava",
        "image_token_index": 5,
        "vision_config": {"model_type": "clip_vision_model"},
        "text_config": {"model_type": "llama", "hidden_size": 1024, "num_attention_heads": 8},
    }
    theirs = transformers.LlavaConfig(**json.loads(json.dumps(sparse))).to_dict()
    assert theirs["vision_config"]["hidden_size"] == 768
    assert theirs["text_config"]["num_key_value_heads"] == 8
    assert LlavaConfig.from_dict(sparse) == LlavaConfig.from_dict(theirs)


@pytest.mark.parametrize("section", [None, "text_config"])
def test_embeddings_are_tied_from_either_place(section: str | None) -> None:
    data = _tiny()
    (data[section] if section else data)["tie_word_embeddings"] = True
    assert LlavaConfig.from_dict(data).text.tie_word_embeddings


@pytest.mark.parametrize(("value", "ids"), [(None, (2,)), (3, (3,)), ([2, 7], (2, 7))])
def test_end_tokens_are_one_several_or_the_default(value: object, ids: tuple[int, ...]) -> None:
    data = _tiny()
    data["text_config"]["eos_token_id"] = value
    assert LlavaConfig.from_dict(data).eos_token_ids == ids


def test_rotary_base_is_read_from_both_places() -> None:
    data = _tiny()
    data["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert LlavaConfig.from_dict(data).text.rope_theta == 5e5
    data = _tiny()
    data["text_config"]["rope_theta"] = 1e6
    assert LlavaConfig.from_dict(data).text.rope_theta == 1e6


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "llava_onevision", "model_type must be 'llava' or 'llava_next', got 'llava_onevision'"),
        ("vision_feature_layer", -1, "vision_feature_layer must be -2, got -1"),
        ("vision_feature_layer", [-2, -5], "vision_feature_layer must be -2"),
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy must be 'default'"),
        ("projector_hidden_act", "relu", "projector_hidden_act must be 'gelu'"),
        ("image_token_index", 512, r"image_token_index must be in 0\.\.511"),
        ("image_token_index", "5", "image_token_index must be an integer, got '5'"),
        ("tie_word_embeddings", "no", "tie_word_embeddings must be true or false, got 'no'"),
        ("vision_config", None, "vision_config must be an object, got None"),
        ("text_config", [], r"text_config must be an object, got \[\]"),
        ("vision_config.model_type", "siglip_vision_model", "vision_config.model_type must be 'clip_vision_model'"),
        ("vision_config.hidden_act", "gelu", "vision_config.hidden_act must be 'quick_gelu', got 'gelu'"),
        ("vision_config.num_channels", 1, "vision_config.num_channels must be 3, got 1"),
        ("vision_config.hidden_size", 64.5, "vision_config.hidden_size must be an integer, got 64.5"),
        ("vision_config.hidden_size", True, "vision_config.hidden_size must be an integer, got True"),
        ("vision_config.hidden_size", 66, r"vision_config.hidden_size must be a multiple of num_attention_heads \(4\)"),
        ("vision_config.num_hidden_layers", 2, "vision_config.num_hidden_layers must be at least 3"),
        ("vision_config.image_size", 6, "vision_config.image_size must be at least patch_size"),
        ("vision_config.patch_size", 0, "vision_config.patch_size must be positive, got 0"),
        ("vision_config.layer_norm_eps", "tiny", "vision_config.layer_norm_eps must be a number, got 'tiny'"),
        ("text_config.model_type", "mistral", "text_config.model_type must be 'llama', got 'mistral'"),
        ("text_config.hidden_act", "gelu", "text_config.hidden_act must be 'silu'"),
        ("text_config.attention_bias", True, "text_config.attention_bias must be False"),
        ("text_config.num_key_value_heads", 3, "text_config.num_attention_heads must be a multiple of num_key_value"),
        ("text_config.head_dim", 32, "text_config.head_dim must be 16, got 32"),
        ("text_config.rms_norm_eps", 10**400, "text_config.rms_norm_eps must be a number, got 1000"),
        ("text_config.rms_norm_eps", float("nan"), "text_config.rms_norm_eps must be a number, got nan"),
        ("text_config.vocab_size", -1, "text_config.vocab_size must be positive, got -1"),
        ("text_config.num_attention_heads", 64, "text_config head size must be even for rotary embeddings, got 1"),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type must be 'default', got 'linear'"),
        ("text_config.rope_parameters", {"rope_type": "llama3"}, "rope_type must be 'default', got 'llama3'"),
        ("text_config.rope_parameters", "yarn", "text_config.rope_parameters must be an object, got 'yarn'"),
        ("text_config.rope_parameters", {"rope_theta": "big"}, "text_config.rope_theta must be a number, got 'big'"),
        ("text_config.eos_token_id", "</s>", "text_config.eos_token_id must be an integer, got '</s>'"),
        ("text_config.eos_token_id", [2, None], "text_config.eos_token_id must be an integer, got None"),
    ],
)
def test_unsupported_field_is_named_with_its_value(path: str, value: object, message: str) -> None:
    data = _tiny()
    *sections, name = path.split(".")
    target = data[sections[0]] if sections else data
    target[name] = value
    if name == "num_attention_heads":
        target["num_key_value_heads"] = value
    with pytest.raises(ConfigError, match=message) as error:
        LlavaConfig.from_dict(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["anyres", [7], [["a", 14]], [[14, 14.0]], [[14, True]]])
def test_pinpoints_are_pairs_of_whole_numbers(value: object) -> None:
    rule = f"image_grid_pinpoints must be a list of [height, width] in whole pixels, got {value!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(rule)}"):
        LlavaConfig.from_dict(_tiny() | {"model_type": "llava_next", "image_grid_pinpoints": value})


@pytest.mark.parametrize("name", ["vision_config", "text_config"])
def test_missing_section_is_named(name: str) -> None:
    data = _tiny()
    del data[name]
    with pytest.raises(ConfigError, match=f"{name} must be an object"):
        LlavaConfig.from_dict(data)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
def test_file_that_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json must be a JSON object, got"):
        LlavaConfig.from_file(tmp_path / "config.json")


def test_missing_file_says_what_a_checkpoint_holds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist.*config\.json, \*\.safetensors and tokenizer\.json"):
        LlavaConfig.from_file(tmp_path / "config.json")


def test_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a JSON object"):
        LlavaConfig.from_file(tmp_path)


def test_defaults_are_llava_1_5_7b() -> None:
    config = LlavaConfig(VisionConfig(), TextConfig(vocab_size=32064))
    assert (config.vision.patches, config.vision.select, config.text.head_size) == (576, 22, 128)


def test_generation_config_names_the_end_tokens_as_in_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_tiny()))
    assert LlavaConfig.from_file(tmp_path / "config.json").eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 464]}')
    assert LlavaConfig.from_file(tmp_path / "config.json").eos_token_ids == (2, 464)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ConfigError, match="eos_token_id must be an integer"):
        LlavaConfig.from_file(tmp_path / "config.json")
