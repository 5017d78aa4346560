"""Llama decoder with an explicit KV cache, in eager PyTorch: the reference for the `language` graph.

Parameter names are the checkpoint's, without their `language_model.` prefix. Positions decide everything: a step
writes its keys to the cache rows `position_ids`, and a query at position p sees the rows 0..p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowcut.checkpoint import Weights
from flowcut.config import TextConfig
from flowcut.errors import InputError
from flowcut.loading import load_module


@dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, one pair of [B, Hkv, rows, d] per layer, written in place.

    Layers have rows of their own where visual tokens are dropped between them (flowcut.language_pruning).
    """

    keys: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def allocate(
        config: TextConfig,
        batch: int,
        rows: int | Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> KVCache:
        """An empty cache. Rows are zero, not uninitialised: a masked NaN would still spoil attention.

        rows: of every layer, or of each.
        """
        heads, size, layers = config.num_key_value_heads, config.head_size, config.num_hidden_layers
        each = [rows] * layers if isinstance(rows, int) else rows
        keys, values = (
            [torch.zeros((batch, heads, n, size), dtype=dtype, device=device) for n in each] for _ in range(2)
        )
        return KVCache(keys, values)

    @property
    def rows(self) -> int:
        """Tokens that fit in the first layer's cache of one sequence."""
        return self.keys[0].shape[2]


@dataclass(frozen=True)
class Step:
    """What a run of consecutive layers shares: where its tokens stand and what they may look at.

    Attributes:
        position_ids: [B, S], also the cache rows that the step writes.
        cos, sin: [B, 1, S, d], for rotate-half.
        mask: [B, 1, S, R] bool over the R cache rows in use; true where row <= position.
    """

    position_ids: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor

    @staticmethod
    def at(position_ids: Tensor, config: TextConfig, dtype: torch.dtype) -> Step:
        """The step for tokens at these positions; angles in float32 whatever the model's dtype."""
        cos, sin = rotary(position_ids[:, None], config)
        rows = torch.arange(int(position_ids.max()) + 1, device=position_ids.device)
        return Step(position_ids, cos.to(dtype), sin.to(dtype), rows <= position_ids[:, None, :, None])

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [B, H, S, d]."""
        return rotate(x, self.cos, self.sin)

    def store(self, cache: Tensor, x: Tensor) -> Tensor:
        """Write x [B, H, S, d] to its rows of the cache [B, H, rows, d]; returns the R rows in use."""
        batch = torch.arange(len(x), device=x.device)[:, None]
        cache[batch, :, self.position_ids] = x.transpose(1, 2)
        return cache[:, :, : self.mask.shape[-1]]


def rotary(positions: Tensor, config: TextConfig) -> tuple[Tensor, Tensor]:
    """Float32 cosines and sines [..., d] of the rotary embedding at positions [...]."""
    exponent = torch.arange(0, config.head_size, 2, device=positions.device).float() / config.head_size
    angles = positions[..., None].float() * (1.0 / config.rope_theta**exponent)  # [..., d/2]
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., S, d], its halves paired."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class LanguageModel(nn.Module):
    """Decoder and output head: token ids and image embeddings to logits."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @staticmethod
    def from_weights(weights: Weights, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LanguageModel:
        """Build from checkpoint tensors, one at a time."""
        with torch.device("meta"):
            model = LanguageModel(weights.config.text)
        return load_module(model, weights, "language_model.", dtype, device)

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, position_ids: Tensor, image_rows: Tensor, image_embeds: Tensor | None, cache: KVCache
    ) -> Tensor:
        """One prefill or decode step: hidden states [B, S, D] before the final norm; the cache grows by S rows.

        Sequences are right-padded; pads carry the positions that follow, so what they leave in the cache is
        overwritten before any later query can see it.

        Args:
            input_ids, position_ids: [B, S]; positions consecutive.
            image_rows: [B, S], row of image_embeds seen as [I*K, D], or -1 for a text token.
            image_embeds: [I, K, D], or None when no image_rows is set.

        Raises:
            InputError: a position does not fit in the cache.
        """
        hidden = self.embed(input_ids, image_rows, image_embeds)
        return self.through(range(self.config.num_hidden_layers), hidden, position_ids, cache)

    def through(self, layers: range, hidden: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        """hidden [B, S, D] as it enters the first of some consecutive layers, or of none -> as it leaves the last.

        Raises:
            InputError: a position does not fit in the cache.
        """
        last = int(position_ids.max())
        for rows in {cache.keys[i].shape[2] for i in layers}:
            if last >= rows:
                raise InputError(
                    f"position_ids must be below the cache's {rows} rows, got {last}. "
                    "Allocate prompt length + new tokens."
                )
        step = self.step(position_ids, hidden.dtype)
        for i in layers:
            hidden = self.model.layers[i](hidden, step, cache.keys[i], cache.values[i])
        return hidden

    def step(self, position_ids: Tensor, dtype: torch.dtype) -> Step:
        """What layers share that compute in `dtype`, for tokens at these positions."""
        return Step.at(position_ids, self.config, dtype)

    def embed(self, input_ids: Tensor, image_rows: Tensor, image_embeds: Tensor | None) -> Tensor:
        """Token embeddings [B, S, D] with image embeddings at their places."""
        text: Tensor = self.model.embed_tokens(input_ids)
        if image_embeds is None:
            return text
        images = image_embeds.to(text.dtype).flatten(0, 1)[image_rows.clamp(min=0)]
        return torch.where(image_rows[..., None] >= 0, images, text)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, last_token: Tensor | None = None) -> Tensor:
        """Float32 logits of every token [B, S, V], or of the tokens at last_token [B] alone [B, V]."""
        if last_token is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last_token]
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(self.model.norm(hidden), head.weight).float()


class Decoder(nn.Module):
    """Embeddings, layers and final norm, named as in the checkpoint; LanguageModel runs them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, step: Step, keys: Tensor, values: Tensor) -> Tensor:
        """hidden [B, S, D] -> [B, S, D]; keys and values are this layer's cache, written in place."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), step, keys, values)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Attention(nn.Module):
    """Grouped-query attention over the cache."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.grouped = config.num_attention_heads != config.num_key_value_heads
        size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, kv_size, bias=False)
        self.v_proj = nn.Linear(size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def project(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, H, S, d] and k, and v, both [B, Hkv, S, d]."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return step.rotate(q), step.rotate(k), v

    def forward(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = self.project(x, step)
        k, v = step.store(keys, k), step.store(values, v)  # [B, Hkv, R, d]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, enable_gqa=self.grouped)
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
