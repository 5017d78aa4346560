"""transformers' own LLaVA as a peer: unpruned, with its scaled_dot_product_attention and its KV cache.

Its modules are built without weights, from the geometry alone, and then given the tensors of this project's, by name;
what they have besides, the tower's last layer, is read from the checkpoint. No processor takes part: pixels and token
ids come from the engine's reader. Needs transformers 5.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.bench.peers_eager import Modules
from engines.bench.peers_run import Answering, Seen, nothing_dropped, pixels_of
from engines.runtime.reading import Opened
from flowcut.checkpoint import Weights, expected_tensors
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.deps import require
from flowcut.errors import FlowCutError
from flowcut.loading import load_module
from flowcut.prompt import Encoded
from flowcut.tensors import canonical_name

ATTENTION = "sdpa"
_TOWER = "vision_tower.vision_model."
_EMBEDDINGS, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


class TransformersModel:
    """A TorchModel (engines.bench.peers_run).

    Raises:
        FlowCutError: not installed, or a version whose LLaVA has other tensors.
    """

    def __init__(self, modules: Modules, weights: Weights) -> None:
        self.model, self._config, self._device = build(modules, weights), weights.config, modules.device

    def see(self, pictures: Sequence[Opened]) -> list[Seen]:
        """See TorchModel."""
        dtype = self.model.model.multi_modal_projector.linear_1.weight.dtype
        sizes = [picture.size[::-1] for picture in pictures]  # height, width
        more = {"image_sizes": sizes} if self._config.anyres else {}
        found = self.model.model.get_image_features(pixel_values=pixels_of(pictures, dtype, self._device), **more)
        return [Seen(tokens) for tokens in getattr(found, "pooler_output", found)]

    def read(self, prompts: Sequence[Encoded], seen: Sequence[Seen], room: int) -> Answering:
        """See TorchModel. Its cache grows by itself."""
        return _Answering(self.model, self._config, prompts, [one.tokens for one in seen])


class _Answering:
    """Prompts in one batch, left-padded, as transformers' generate has them."""

    def __init__(self, model: Any, config: LlavaConfig, prompts: Sequence[Encoded], pictures: Sequence[Tensor]) -> None:
        self._model, device = model, model.device
        self.lengths: Sequence[int] = [len(prompt.input_ids) for prompt in prompts]
        self.pruned_lengths: Sequence[int] = self.lengths
        self.chosen = nothing_dropped(prompts)
        arrays = left_padded(prompts, pad=int(config.image_token_id == 0))
        ids, self._mask = (torch.from_numpy(array).to(device) for array in arrays)
        self._cache = cache_argument(model)
        embeds = model.get_input_embeddings()(ids)
        features = torch.cat(list(pictures)).to(embeds.dtype)
        places = model.model.get_placeholder_mask(ids, inputs_embeds=embeds, image_features=features)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._next = positions[:, -1:] + 1
        self.logits = self._run(positions, inputs_embeds=embeds.masked_scatter(places, features))

    def step(self, tokens: Tensor) -> Tensor:
        """See engines.bench.peers_run.Answering."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._next)], 1)
        logits = self._run(self._next, input_ids=tokens[:, None])
        self._next = self._next + 1
        return logits

    def _run(self, positions: Tensor, **inputs: Tensor) -> Tensor:
        """Float32 logits of the last token [B, vocab]."""
        shared = {"attention_mask": self._mask, "position_ids": positions, "use_cache": True, **self._cache}
        hidden = self._model.model.language_model(**inputs, **shared).last_hidden_state
        logits: Tensor = self._model.lm_head(hidden[:, -1]).float()
        return logits


def left_padded(prompts: Sequence[Encoded], pad: int) -> tuple[Any, Any]:
    """Token ids [B, S], and where they are tokens, 1, and not padding, 0."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    ids, mask = np.full((len(prompts), longest), pad, np.int64), np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.input_ids) :] = prompt.input_ids
        mask[row, longest - len(prompt.input_ids) :] = 1
    return ids, mask


def cache_argument(model: Any) -> dict[str, Any]:
    """An empty KV cache under the name that the decoder has for it: transformers 5 changed it on the way."""
    known = inspect.signature(type(model.model.language_model).forward).parameters
    empty = require("transformers", extra="peers").DynamicCache(config=model.config.text_config)
    return {"cache" if "cache" in known else "past_key_values": empty}


def build(modules: Modules, weights: Weights) -> Any:
    """LlavaForConditionalGeneration or LlavaNextForConditionalGeneration, whose parameters are those of `modules`.

    Raises:
        FlowCutError: not installed, or a version whose LLaVA has other tensors.
    """
    transformers = require("transformers", extra="peers")
    with torch.device("meta"):
        auto = transformers.AutoModelForImageTextToText
        model = auto.from_config(make_config(weights.config), attn_implementation=ATTENTION)
    _give_tensors(model, modules, weights)
    _give_buffers(model, modules.device)
    return model.eval().requires_grad_(False)


def make_config(config: LlavaConfig) -> Any:
    """transformers' config of this geometry."""
    transformers = require("transformers", extra="peers")
    parts = {"vision_config": _vision(config.vision), "text_config": _text(config.text)}
    settings = {
        "image_token_index": config.image_token_id,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }
    if config.grid_pinpoints is None:
        return transformers.LlavaConfig(**parts, **settings, image_seq_length=config.vision.patches)
    return transformers.LlavaNextConfig(**parts, **settings, image_grid_pinpoints=[*map(list, config.grid_pinpoints)])


def _vision(config: VisionConfig) -> Any:
    return require("transformers", extra="peers").CLIPVisionConfig(**asdict(config), hidden_act="quick_gelu")


def _text(config: TextConfig) -> Any:
    known = asdict(config)
    rope = {"rope_type": "default", "rope_theta": known.pop("rope_theta")}
    ends: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return require("transformers", extra="peers").LlamaConfig(**known, **ends, rope_parameters=rope, hidden_act="silu")


def _give_tensors(model: Any, modules: Modules, weights: Weights) -> None:
    """Ours by name; and the tower's layer and norm behind hidden state -2, which we have not, from the checkpoint."""
    ours: dict[str, Tensor] = dict(modules.vision.named_parameters())
    ours |= {f"language_model.{name}": each for name, each in modules.language.named_parameters()}
    if weights.config.text.tie_word_embeddings:
        ours[_HEAD] = ours[_EMBEDDINGS]
    names = {name: canonical_name(name) for name in model.state_dict()}
    _check_names(set(names.values()), {*expected_tensors(weights.config), *ours})
    model.load_state_dict({n: ours[known] for n, known in names.items() if known in ours}, strict=False, assign=True)
    dtype, tower = modules.vision.multi_modal_projector.linear_1.weight.dtype, _tower(model)
    last = weights.config.vision.num_hidden_layers - 1
    load_module(tower.encoder.layers[last], weights, f"{_TOWER}encoder.layers.{last}.", dtype, modules.device)
    load_module(tower.post_layernorm, weights, f"{_TOWER}post_layernorm.", dtype, modules.device)


def _give_buffers(model: Any, device: str) -> None:
    """What transformers computes when it builds a model, and no checkpoint holds.

    Raises:
        FlowCutError: it has others than those that are known here, or has parameters that were given nothing.
    """
    embeddings, decoder = _tower(model).embeddings, model.model.language_model
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config.text_config).to(device)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise _other_version(f"also {', '.join(empty)}")


def _tower(model: Any) -> Any:
    """Its parts, which some versions have in an inner module."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def _check_names(theirs: set[str], ours: set[str]) -> None:
    if theirs != ours:
        raise _other_version(f"without {sorted(ours - theirs)} and with {sorted(theirs - ours)}")


def _other_version(got: str) -> FlowCutError:
    version = require("transformers", extra="peers").__version__
    return FlowCutError(
        f"transformers must have LLaVA's tensors as its release 5.24 has them, got {version} {got}. "
        "Install that release."
    )
