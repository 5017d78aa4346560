"""The torch decoder against transformers' LlamaForCausalLM, and against itself without a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import recipe
import torch
from torch import Tensor

from flowcut.checkpoint import Weights, expected_tensors, random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.errors import InputError
from flowcut.language import KVCache, LanguageModel

TEXT = TextConfig(64, 128, 3, 4, 4, 512, 4096, 1e-5)
VARIANTS = {
    "plain": TEXT,
    "gqa": TextConfig(64, 128, 3, 4, 2, 512, 4096, 1e-5),
    "tied": TextConfig(64, 128, 3, 4, 4, 512, 4096, 1e-5, tie_word_embeddings=True),
    "theta": TextConfig(64, 128, 3, 4, 4, 512, 4096, 1e-6, rope_theta=500000.0),
}


def weights_of(text: TextConfig) -> Weights:
    return random_weights(LlavaConfig(VisionConfig(), text, image_token_id=448), dtype="float32")


def transformers_model(weights: Weights) -> Any:
    transformers = pytest.importorskip("transformers")
    text = weights.config.text
    config = transformers.LlamaConfig(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        tie_word_embeddings=text.tie_word_embeddings,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    names = [name for name in expected_tensors(weights.config) if name.startswith("language_model.")]
    state = {name.removeprefix("language_model."): torch.from_numpy(weights.load(name)) for name in names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if text.tie_word_embeddings else [])
    return model.eval()


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 448, shape))


def positions(batch: int, length: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + length).expand(batch, length)


def run(model: LanguageModel, tokens: Tensor, cache: KVCache, start: int = 0) -> Tensor:
    """Logits of every token of a text-only step."""
    text = torch.full_like(tokens, -1)
    return model.logits(model(tokens, positions(*tokens.shape, start), text, None, cache))


def greedy(model: LanguageModel, tokens: Tensor, new_tokens: int) -> list[int]:
    """Greedy continuation of one prompt, every step through the cache."""
    cache = KVCache.allocate(model.config, 1, tokens.shape[1] + new_tokens)
    out = [int(run(model, tokens, cache)[0, -1].argmax())]
    while len(out) < new_tokens:
        step = torch.tensor([[out[-1]]])
        out.append(int(run(model, step, cache, tokens.shape[1] + len(out) - 1)[0, -1].argmax()))
    return out


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.from_weights(weights_of(TEXT))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str) -> None:
    weights = weights_of(VARIANTS[variant])
    tokens = ids(2, 37)
    ours = run(LanguageModel.from_weights(weights), tokens, KVCache.allocate(weights.config.text, 2, 37))
    with torch.no_grad():
        theirs = transformers_model(weights)(tokens).logits
    assert error(ours, theirs) < 1e-5


def test_greedy_equals_transformers_generate(model: LanguageModel) -> None:
    tokens = ids(1, 9)
    theirs = transformers_model(weights_of(TEXT)).generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=32, min_new_tokens=32, do_sample=False
    )
    assert greedy(model, tokens, 32) == theirs[0, 9:].tolist()


@pytest.mark.parametrize("variant", ["plain", "gqa"])
def test_decoding_with_the_cache_equals_recomputing(variant: str) -> None:
    model = LanguageModel.from_weights(weights_of(VARIANTS[variant]))
    tokens = ids(2, 15)
    whole = run(model, tokens, KVCache.allocate(model.config, 2, 15))
    cache = KVCache.allocate(model.config, 2, 20)
    parts = [run(model, tokens[:, :10], cache)]
    parts += [run(model, tokens[:, i : i + 1], cache, i) for i in range(10, 15)]
    assert error(torch.cat(parts, 1), whole) < 1e-5


def test_right_padded_sequence_equals_alone_in_prefill_and_decode(model: LanguageModel) -> None:
    lengths, tokens = torch.tensor([5, 12]), ids(2, 12)
    tokens[0, 5:] = 77  # pads
    cache = KVCache.allocate(model.config, 2, 20)
    hidden = model(tokens, positions(2, 12), torch.full((2, 12), -1), None, cache)
    padded = [model.logits(hidden, lengths - 1)]
    decoded = ids(2, 3, seed=1)
    for i in range(3):
        step = model(decoded[:, i : i + 1], (lengths + i)[:, None], torch.full((2, 1), -1), None, cache)
        padded.append(model.logits(step, torch.zeros(2, dtype=torch.int64)))
    for b, length in enumerate(lengths.tolist()):
        sequence = torch.cat([tokens[b, :length], decoded[b]])[None]
        alone = run(model, sequence, KVCache.allocate(model.config, 1, 20))
        assert error(torch.stack([p[b] for p in padded]), alone[0, length - 1 :]) < 1e-5


def test_image_rows_replace_token_embeddings(model: LanguageModel) -> None:
    tokens, images = ids(2, 10), torch.from_numpy(recipe.sample("images", (2, 3, 64), "unit", 5))
    rows = torch.full((2, 10), -1)
    rows[0, 2:5], rows[1, 4:7] = torch.arange(3), torch.arange(3, 6)
    hidden = model(tokens, positions(2, 10), rows, images, KVCache.allocate(model.config, 2, 10))
    theirs = transformers_model(weights_of(TEXT))
    embeds = theirs.get_input_embeddings()(tokens).detach().clone()
    embeds[0, 2:5], embeds[1, 4:7] = images[0], images[1]
    with torch.no_grad():
        assert error(model.logits(hidden), theirs(inputs_embeds=embeds).logits) < 1e-5


def test_logits_of_last_tokens_equal_those_of_all(model: LanguageModel) -> None:
    tokens, last = ids(3, 8), torch.tensor([7, 0, 3])
    hidden = model(tokens, positions(3, 8), torch.full((3, 8), -1), None, KVCache.allocate(model.config, 3, 8))
    assert error(model.logits(hidden, last), model.logits(hidden)[torch.arange(3), last]) < 1e-6


def test_step_leaves_other_cache_rows_alone(model: LanguageModel) -> None:
    cache = KVCache.allocate(model.config, 1, 12)
    run(model, ids(1, 4), cache, start=3)
    used = torch.stack(cache.keys).abs().amax(dim=(0, 1, 2, 4)) > 0
    assert used.tolist() == [False] * 3 + [True] * 4 + [False] * 5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_lower_precision_is_close_and_logits_stay_float32(
    model: LanguageModel, dtype: torch.dtype, tolerance: float
) -> None:
    tokens = ids(1, 20)
    lower = LanguageModel.from_weights(weights_of(TEXT), dtype)
    assert {p.dtype for p in lower.parameters()} == {dtype}
    logits = run(lower, tokens, KVCache.allocate(TEXT, 1, 20, dtype))
    assert logits.dtype == torch.float32
    assert error(logits, run(model, tokens, KVCache.allocate(TEXT, 1, 20))) < tolerance


def test_position_beyond_the_cache_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"position_ids must be below the cache's 5 rows, got 5\."):
        run(model, ids(1, 6), KVCache.allocate(TEXT, 1, 5))
