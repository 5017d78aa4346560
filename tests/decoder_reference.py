"""A decoder that drops visual tokens after its second layer, computed a second time: float64, one sequence, no cache.

Slow and plain on purpose: every token is read again at every step, and what is dropped is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import references
from references import Array, Tensors

from flowcut.config import TextConfig


class Outcome(NamedTuple):
    """hidden [S', D] before the final norm, logits [V] of the last token, kept per span."""

    hidden: Array
    logits: Array
    kept: list[list[int]]


class NaiveDecoder:
    """Llama, layer by layer. Spans are (start, length) of each picture's visual tokens."""

    def __init__(self, weights: Tensors, config: TextConfig) -> None:
        self.weights, self.config = weights, config

    def load(self, name: str) -> Array:
        return self.weights.load(f"language_model.{name}.weight").astype(np.float64)

    def embed(self, token_ids: Sequence[int]) -> Array:
        return self.load("model.embed_tokens")[list(token_ids)]

    def read(self, embeds: Array, spans: Sequence[tuple[int, int]], source: int, tokens: int) -> Outcome:
        """embeds [S, D]; after layer index 1 the row `source` says which `tokens` rows of each span stay."""
        hidden, kept = embeds, list[list[int]]()
        for layer in range(self.config.num_hidden_layers):
            hidden, qkv = self._layer(hidden, layer)
            if layer == 1:
                kept = [self._best(qkv, span, source, tokens) for span in spans]
                dropped = {s + j for (s, n), best in zip(spans, kept, strict=True) for j in range(n) if j not in best}
                hidden = np.stack([row for i, row in enumerate(hidden) if i not in dropped])
        tied = self.config.tie_word_embeddings
        head = self.load("model.embed_tokens" if tied else "lm_head")
        return Outcome(hidden, head @ self._norm(hidden[-1], "model.norm"), kept)

    def greedy(
        self, embeds: Array, spans: Sequence[tuple[int, int]], tokens: int, new_tokens: int
    ) -> tuple[list[int], Array]:
        """Greedy continuation and the logits [new_tokens, V] that it was chosen by; the prompt's last token scores."""
        source, logits, ids = len(embeds) - 1, list[Array](), list[int]()
        while len(ids) < new_tokens:
            logits.append(self.read(embeds, spans, source, tokens).logits)
            ids.append(int(logits[-1].argmax()))
            embeds = np.concatenate([embeds, self.embed(ids[-1:])])
        return ids, np.stack(logits)

    def _best(self, qkv: tuple[Array, Array, Array], span: tuple[int, int], source: int, tokens: int) -> list[int]:
        q, k, v = qkv
        rows, scale = slice(span[0], sum(span)), self.config.head_size**-0.5
        score = references.key_scores(q[:, source], v[:, source], k[:, rows], v[:, rows], scale, scale, 0).score
        return sorted(sorted(range(span[1]), key=lambda j: (-score[j], j))[:tokens])

    def _layer(self, hidden: Array, layer: int) -> tuple[Array, tuple[Array, Array, Array]]:
        name, size = f"model.layers.{layer}.", self.config.head_size
        x = self._norm(hidden, f"{name}input_layernorm")
        q, k, v = (
            (x @ self.load(f"{name}self_attn.{p}_proj").T).reshape(len(x), -1, size).swapaxes(0, 1) for p in "qkv"
        )
        q, k = self._rotated(q), self._rotated(k)
        heads = [self._attend(q[h], k[h * len(k) // len(q)], v[h * len(k) // len(q)]) for h in range(len(q))]
        hidden = hidden + np.concatenate(heads, 1) @ self.load(f"{name}self_attn.o_proj").T
        x = self._norm(hidden, f"{name}post_attention_layernorm")
        gate, up = (x @ self.load(f"{name}mlp.{p}_proj").T for p in ("gate", "up"))
        return hidden + (gate / (1 + np.exp(-gate)) * up) @ self.load(f"{name}mlp.down_proj").T, (q, k, v)

    def _rotated(self, x: Array) -> Array:
        """[H, S, d], whose rows stand at 0, 1, 2, ..: pairs (j, j + d/2) as complex numbers, turned."""
        half = x.shape[-1] // 2
        angles = np.arange(x.shape[1])[:, None] * self.config.rope_theta ** (-np.arange(half) / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], -1)

    def _attend(self, q: Array, k: Array, v: Array) -> Array:
        logits = q @ k.T / np.sqrt(q.shape[-1])
        logits[np.triu_indices(len(q), 1)] = -np.inf
        share = np.exp(logits - logits.max(-1, keepdims=True))
        out: Array = share / share.sum(-1, keepdims=True) @ v
        return out

    def _norm(self, x: Array, name: str) -> Array:
        root = np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        out: Array = x / root * self.load(name)
        return out
