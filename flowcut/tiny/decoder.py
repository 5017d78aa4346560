"""Stage 2: projector and decoder learn to answer, from the features of a tower that no longer changes.

The questions of one picture share its prefix: the visual tokens are computed once, and each question sees them and
itself. What a picture shows to the decoder is shortened at random, never below one patch of every thing, so that a
pruned sequence is not the first short one it meets.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from flowcut.config import LlavaConfig
from flowcut.language import DecoderLayer, LanguageModel, rotary, rotate
from flowcut.tiny.drawing import Labels
from flowcut.vision import Projector

LENGTHS = {144: 0.4, 64: 0.2, 28: 0.25, 12: 0.15}
"""How many visual tokens a batch shows, and how often."""


class Student(nn.Module):
    """Projector and decoder under the checkpoint's names."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config.text
        self.multi_modal_projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)
        _initialise(self)

    def forward(self, features: Tensor, before: Tensor, ids: Tensor, answers: Tensor) -> Tensor:
        """Logits of every question's answer tokens.

        Args:
            features: [B, V, vision hidden], the visual tokens that are shown.
            before: [P] ids ahead of them, the same for all.
            ids: [B, Q, S] ids of all that follows them, answers included, padded on the right.
            answers: [B, Q, A] places in S whose next token is wanted.

        Returns:
            [B, Q, A, vocab] float32.
        """
        language = self.language_model
        seen = self.multi_modal_projector(features)
        told = language.model.embed_tokens(before).expand(len(seen), -1, -1)
        prefix, own = torch.cat([told.to(seen.dtype), seen], 1), language.model.embed_tokens(ids).to(seen.dtype)
        angles = rotary(torch.arange(prefix.shape[1] + own.shape[2]), self.config)
        for layer in language.model.layers:
            assert isinstance(layer, DecoderLayer)
            prefix, own = _through(layer, prefix, own, angles)
        wanted = own.gather(2, answers[..., None].expand(-1, -1, -1, own.shape[-1]))
        assert language.lm_head is not None
        logits: Tensor = language.lm_head(language.model.norm(wanted))
        return logits.float()


def _through(layer: DecoderLayer, prefix: Tensor, own: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """prefix [B, P, D] sees itself up to each token; own [B, Q, S, D] the prefix and, up to each token, itself."""
    length = prefix.shape[1]
    q, k, v = _project(layer, prefix[:, None], angles, 0)  # [B, 1, H, P, d]
    qo, ko, vo = _project(layer, own, angles, length)  # [B, Q, H, S, d]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = (q @ k.transpose(-1, -2)).masked_fill(~causal, -1e4).softmax(-1)
    prefix = _rest(layer, prefix, (weights @ v).squeeze(1))
    size = own.shape[2]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    shared = _fold(qo) @ k.squeeze(1).transpose(-1, -2)  # [B, H, Q * S, P]
    shared = _unfold(shared, size)
    alone = (qo @ ko.transpose(-1, -2)).masked_fill(~causal, -1e4)  # [B, Q, H, S, S]
    weights = torch.cat([shared, alone], -1).softmax(-1)
    attended = _unfold(_fold(weights[..., :length]) @ v.squeeze(1), size) + weights[..., length:] @ vo
    return prefix, _rest(layer, own, attended)


def _fold(x: Tensor) -> Tensor:
    """[B, Q, H, S, n] -> [B, H, Q * S, n]: all questions of a picture as one sequence."""
    return x.transpose(1, 2).flatten(2, 3)


def _unfold(x: Tensor, size: int) -> Tensor:
    batch, heads, _, last = x.shape
    return x.view(batch, heads, -1, size, last).transpose(1, 2)


def _project(layer: DecoderLayer, x: Tensor, angles: tuple[Tensor, Tensor], start: int) -> tuple[Tensor, ...]:
    """q (scaled), k, v [B, Q, H, S, d] of x [B, Q, S, D], whose first position is `start`."""
    attention, size = layer.self_attn, x.shape[2]
    h = layer.input_layernorm(x)
    q, k, v = (
        p(h).unflatten(-1, (-1, attention.head_size)).transpose(2, 3)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = (a[start : start + size].to(q.dtype) for a in angles)
    return rotate(q, cos, sin) * attention.head_size**-0.5, rotate(k, cos, sin), v


def _rest(layer: DecoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """The layer after its attention [..., H, S, d]."""
    x = x + layer.self_attn.o_proj(attended.transpose(-2, -3).flatten(-2))
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


def _initialise(student: Student) -> None:
    for name, parameter in student.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif "embed" in name:
            nn.init.normal_(parameter, std=0.05)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 0.5)


def shown_patches(rng: np.random.Generator, labels: Labels, rows: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """[B, length] patch numbers, ascending: each thing's middle for certain, the others by chance.

    In half of the pictures patches that show something come before the ground.
    """
    owner, centre = labels.owner[rows], labels.centre[rows]
    rank = rng.random(owner.shape) + (owner < 0) * (rng.random(len(rows)) < 0.5)[:, None]
    scene, thing = np.nonzero(centre >= 0)
    rank[scene, centre[scene, thing]] = -1
    best: NDArray[np.int64] = np.sort(np.argsort(rank, 1)[:, :length], 1)
    return best


def loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross entropy over answer tokens; wanted [B, Q, A], -100 where there is none."""
    return F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), ignore_index=-100)
