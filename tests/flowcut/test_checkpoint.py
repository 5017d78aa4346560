"""Checkpoints on disk in every accepted form, everything that can be wrong with one, and random weights."""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import recipe
from safetensors.numpy import load_file, save_file

from flowcut.checkpoint import INDEX, SINGLE, expected_tensors, open_checkpoint, random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.errors import CheckpointError, ConfigError

TINY = recipe.PRESETS["tiny"]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
HEAD = "language_model.lm_head.weight"
NORM = "vision_tower.vision_model.post_layernorm.weight"
Tensors = dict[str, np.ndarray]


def _transformers_5(name: str) -> str:
    name = re.sub(r"^vision_tower\.vision_model\.", "model.vision_tower.", name)
    name = re.sub(r"^multi_modal_projector\.", "model.multi_modal_projector.", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    return re.sub(r"^language_model\.lm_head\.", "lm_head.", name)


def _transformers_5_nested(name: str) -> str:
    return re.sub(r"^vision_tower\.", "model.vision_tower.", name) if "vision" in name else _transformers_5(name)


SPELLINGS = {"hub": str, "transformers-5": _transformers_5, "transformers-5-nested-tower": _transformers_5_nested}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    recipe.write(tmp_path, *TINY)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [2 << 30, 300_000], ids=["single", "sharded"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_reads_every_spelling_layout_and_dtype(tmp_path: Path, spelling: str, shard_bytes: int, dtype: str) -> None:
    recipe.write(tmp_path, *TINY, seed=3, dtype=dtype, shard_bytes=shard_bytes)
    _respell(tmp_path, SPELLINGS[spelling])
    weights = open_checkpoint(tmp_path)
    assert not weights.random
    reference = list(recipe.tensors(*TINY, 3))
    assert {name for name, _, _ in reference} == expected_tensors(weights.config).keys()
    for name, shape, kind in reference:
        got = weights.load(name)
        assert got.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(got, recipe.sample(name, shape, kind, 3).astype(DTYPES[dtype]))


@pytest.mark.parametrize("original", [True, False], ids=["saved-as-loaded", "saved-anew"])
def test_reads_what_transformers_saves(tiny: Path, tmp_path: Path, original: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tiny)
    saved = tmp_path / "saved"
    model.save_pretrained(saved, save_original_format=original, max_shard_size="500KB")
    ours, theirs = open_checkpoint(tiny), open_checkpoint(saved)
    assert ours.config == theirs.config
    for name in expected_tensors(ours.config):
        np.testing.assert_array_equal(ours.load(name), theirs.load(name))


def test_loaded_array_may_be_written_without_touching_the_file(tiny: Path) -> None:
    weights = open_checkpoint(tiny)
    before = (tiny / SINGLE).read_bytes()
    weights.load(NORM)[:] = 0
    assert weights.load(NORM).any()
    assert (tiny / SINGLE).read_bytes() == before


def test_grouped_query_attention_has_smaller_keys_and_values() -> None:
    text = TextConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, vocab_size=512)
    shapes = expected_tensors(LlavaConfig(VisionConfig(), text, image_token_id=5))
    attention = "language_model.model.layers.0.self_attn."
    assert shapes[f"{attention}q_proj.weight"] == (64, 64)
    assert shapes[f"{attention}k_proj.weight"] == shapes[f"{attention}v_proj.weight"] == (16, 64)


def test_tied_embeddings_have_no_head(tiny: Path) -> None:
    _edit_config(tiny, tie_word_embeddings=True)
    _edit(tiny, lambda t: t.pop(HEAD))
    assert HEAD not in expected_tensors(open_checkpoint(tiny).config)


def test_harmless_buffers_are_ignored(tiny: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(65)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float64)

    _edit(tiny, add)
    open_checkpoint(tiny)


def test_all_tensor_problems_are_said_at_once(tiny: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        del tensors[HEAD]
        tensors[NORM] = np.ones(65, np.float32)
        tensors["multi_modal_projector.linear_1.bias"] = np.ones(64, np.float64)
        tensors["model.image_newline"] = np.ones(64, np.float32)
        tensors["model.language_model.norm.weight"] = np.ones(64, np.float32)

    _edit(tiny, spoil)
    message = _refusal(tiny)
    for part in (
        f"missing tensors: {HEAD}",
        f"misshaped tensors: {NORM} [65] instead of [64]",
        "neither float32, float16 nor bfloat16: multi_modal_projector.linear_1.bias F64",
        "extra tensors: model.image_newline",
        "stored twice: language_model.model.norm.weight",
    ):
        assert part in message


def test_long_lists_are_counted(tiny: Path) -> None:
    _edit(tiny, lambda t: [t.pop(name) for name in list(t) if name.startswith("language_model.model.layers.")])
    message = _refusal(tiny)
    assert "(+28 more)" in message  # 4 layers of 9 tensors, 8 named
    assert message.count("language_model.model.layers.") == 8


def test_layers_beyond_the_config_are_extra(tiny: Path) -> None:
    _edit_config(tiny, "text_config", num_hidden_layers=3)
    assert "extra tensors: language_model.model.layers.3.input_layernorm.weight" in _refusal(tiny)


def test_fewer_layers_may_be_asked_for(tiny: Path) -> None:
    config = LlavaConfig.from_file(tiny / "config.json")
    fewer = replace(config, text=replace(config.text, num_hidden_layers=1))
    weights = open_checkpoint(tiny, fewer)
    assert weights.config == fewer
    with pytest.raises(KeyError):
        weights.load("language_model.model.layers.1.input_layernorm.weight")


def test_missing_shards_are_named_instead_of_their_tensors(tmp_path: Path) -> None:
    recipe.write(tmp_path, *TINY, shard_bytes=300_000)
    (tmp_path / "model-00002.safetensors").unlink()
    (tmp_path / "model-00004.safetensors").unlink()
    message = _refusal(tmp_path)
    assert "missing files: model-00002.safetensors, model-00004.safetensors" in message
    assert "missing tensors" not in message


@pytest.mark.parametrize("left", [0, 4, 100, 30_000, -1])
def test_truncated_shard_is_named_beside_other_problems(tmp_path: Path, left: int) -> None:
    recipe.write(tmp_path, *TINY, shard_bytes=300_000)
    shard = tmp_path / "model-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    (tmp_path / "model-00001.safetensors").unlink()
    message = _refusal(tmp_path)
    assert "damaged files: model-00002.safetensors (" in message
    assert "missing files: model-00001.safetensors" in message


def test_truncated_single_file_is_one_problem(tiny: Path) -> None:
    (tiny / SINGLE).write_bytes((tiny / SINGLE).read_bytes()[:-1])
    message = _refusal(tiny)
    assert "damaged files: model.safetensors (" in message
    assert "missing" not in message


def test_tensor_that_the_index_promises_and_no_file_holds_is_missing(tmp_path: Path) -> None:
    recipe.write(tmp_path, *TINY, shard_bytes=300_000)
    shard = tmp_path / json.loads((tmp_path / INDEX).read_text())["weight_map"][NORM]
    tensors = load_file(shard)
    del tensors[NORM]
    save_file(tensors, shard)
    assert f"missing tensors: {NORM}" in _refusal(tmp_path)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}', '{"weight_map": {"a": "../x"}}']
)
def test_unusable_index_is_refused(tiny: Path, index: str) -> None:
    (tiny / SINGLE).unlink()
    (tiny / INDEX).write_text(index)
    assert "must hold a weight_map" in _refusal(tiny)


def test_other_formats_are_named(tiny: Path) -> None:
    (tiny / SINGLE).rename(tiny / "pytorch_model.bin")
    message = _refusal(tiny)
    assert "got pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_file_removed_after_opening_is_a_checkpoint_error(tiny: Path) -> None:
    weights = open_checkpoint(tiny)
    (tiny / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="must stay as it was"):
        weights.load(NORM)
    with pytest.raises(CheckpointError, match="must stay as it was"):
        _ = weights.sha256


def test_identity_follows_values_and_geometry(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe.write(tmp_path / name, *TINY, seed=seed)
    recipe.write(tmp_path / "d", *TINY)
    _edit_config(tmp_path / "d", "vision_config", num_attention_heads=8)  # same tensors, another model
    a, b, c, d = (open_checkpoint(tmp_path / name).sha256 for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
    assert re.fullmatch("[0-9a-f]{64}", a)


CONFIG = LlavaConfig(VisionConfig(), TextConfig(512, 1024, 2, 8, 8, vocab_size=2048), image_token_id=5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_weights_have_the_recipes_distributions(dtype: str) -> None:
    weights = random_weights(CONFIG, dtype=dtype)
    assert weights.random
    vision = {"hidden": 1024, "layers": 1, "mlp": 4096, "patch": 14, "image": 336}
    text = {"hidden": 512, "layers": 2, "mlp": 1024, "vocab": 2048}
    for name, shape, kind in recipe.tensors(vision, text, 0):
        got, reference = weights.load(name), recipe.sample(name, shape, kind, 0)
        assert got.dtype == DTYPES[dtype]
        assert got.shape == shape
        drawn, deviation, sigma = got.astype(np.float64), reference.std(), 1 / np.sqrt(got.size)
        assert abs(drawn.mean() - reference.mean()) < (9 * sigma + 1e-3) * deviation, name
        assert drawn.std() == pytest.approx(deviation, rel=6 * sigma + 4e-3), name


def test_random_tensor_depends_on_seed_and_name_alone() -> None:
    fewer = replace(CONFIG, text=replace(CONFIG.text, num_hidden_layers=1))
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    first = random_weights(CONFIG, seed=4).load(name)
    np.testing.assert_array_equal(first, random_weights(fewer, seed=4).load(name))
    assert (first != random_weights(CONFIG, seed=5).load(name)).mean() > 0.9
    other = random_weights(CONFIG, seed=4).load(name.replace("up_proj", "gate_proj"))
    assert (first != other).mean() > 0.9
    assert abs(np.corrcoef(first[::2].ravel(), first[1::2].ravel())[0, 1]) < 0.01  # chunks do not repeat


def test_random_weights_stay_the_same_across_releases() -> None:
    """Engines built from seeds must be comparable: the raw bit stream is one that numpy promises."""
    got = random_weights(CONFIG).load("vision_tower.vision_model.embeddings.class_embedding")
    np.testing.assert_allclose(got[:4], [0.05374, 0.985, 0.924, 0.3428], rtol=2e-3)


def test_no_two_tensors_share_a_stream() -> None:
    config = LlavaConfig(VisionConfig(), TextConfig(num_hidden_layers=40, vocab_size=32064))
    names = expected_tensors(config)
    assert len({zlib.crc32(name.encode()) for name in names}) == len(names)


def test_random_identity_follows_seed_dtype_and_geometry() -> None:
    fewer = replace(CONFIG, text=replace(CONFIG.text, num_hidden_layers=1))
    made = [
        random_weights(CONFIG),
        random_weights(CONFIG, 1),
        random_weights(CONFIG, 0, "float32"),
        random_weights(fewer),
    ]
    assert len({weights.sha256 for weights in made}) == 4
    assert random_weights(CONFIG).sha256 == made[0].sha256


def test_random_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="seed must be 0 or more, got -1"):
        random_weights(CONFIG, seed=-1)
    with pytest.raises(ConfigError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        random_weights(CONFIG, dtype="int8")


def _refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(directory)
    message = str(error.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


def _edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = {name: array.copy() for name, array in load_file(directory / SINGLE).items()}
    change(tensors)
    save_file(tensors, directory / SINGLE)


def _edit_config(directory: Path, section: str | None = None, **values: object) -> None:
    data = json.loads((directory / "config.json").read_text())
    (data[section] if section else data).update(values)
    (directory / "config.json").write_text(json.dumps(data))


def _respell(directory: Path, rename: Callable[[str], str]) -> None:
    for path in directory.glob("*.safetensors"):
        save_file({rename(name): array for name, array in load_file(path).items()}, path)
    index = directory / INDEX
    if index.exists():
        data = json.loads(index.read_text())
        data["weight_map"] = {rename(name): file for name, file in data["weight_map"].items()}
        index.write_text(json.dumps(data))
