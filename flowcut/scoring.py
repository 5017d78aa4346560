"""Flow score of one layer (docs/algorithm.md 1), as pure functions of that layer's query, key and value.

Everything is float32 and per image. Only the source row (CLS in the tower, the instruction's last token in the language
model) is scored against the keys, so attention itself stays fused. Logits of `v[0] . v[j]` dwarf each other on real
checkpoints; therefore probabilities are kept as logarithms and the largest one is factored out before heads are summed:
a common factor cancels in `sem / sum(sem)`, and the result is finite for any |q|, |k|, |v| <= 65504.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowcut.schedule import Schedule
from flowcut.selector import HISTORY, selector


class FlowScore(NamedTuple):
    """Scores of one layer.

    Attributes:
        score: [B, N] float32, this layer's flow score, or the running score that it was made part of.
        entropy_ratio: [B] float32, entropy of the normalised CLS attention over ln N (1 = flat); 1 where N <= 1.
    """

    score: Tensor
    entropy_ratio: Tensor


def running_score(
    schedule: Schedule, running: Tensor | None, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None
) -> FlowScore:
    """The running score after one more scored layer, as the schedule's selector has it.

    Args:
        running: [B, N] before; None at the first scored layer.
        q, k, v, valid: see `flow_score`.
    """
    by = selector(schedule.selector)
    if by.constant is not None:
        constant = torch.from_numpy(by.constant(schedule.patches, schedule.tokens)).to(q.device)
        return FlowScore(constant.expand(len(q), -1), constant.new_ones(len(q)))
    scored = flow_score(q, k, v, valid, by.semantic, by.strength)
    return scored._replace(score=accumulate(running, scored.score, by.history))


def flow_score(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, semantic: bool = True, strength: bool = True
) -> FlowScore:
    """Score patches 1..N by what flows between them and CLS (row 0).

    Args:
        q, k, v: [B, H, N+1, d], any float dtype, after bias and before attention.
        valid: [B, N] bool; False patches take part in no sum and no softmax, and score 0.
        semantic, strength: leave out that part of the score.
    """
    q_row, k, v = q[:, :, :1].float(), k.float(), v.float()
    keys = None if valid is None else torch.nn.functional.pad(valid, (1, 0), value=True)  # [B, N+1]
    rel = _share(_relevance(q_row, k), keys)
    score = rel
    if semantic:
        score = score + _share(v[:, :, :1] @ v.transpose(-1, -2), keys)
    if strength:
        score = score * _strength(v)[:, 1:]
    return FlowScore(score, _entropy_ratio(rel, valid))


def token_score(q: Tensor, v_source: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, M] float32: score visual tokens by what flows between them and a token that is not among them.

    docs/algorithm.md 5: unlike in the tower the semantic logits are scaled, and no share is lost to the source.

    Args:
        q: [B, H, 1, d], the source's rotated query; its head i belongs to key head i // (H / Hkv).
        v_source: [B, Hkv, 1, d], the source's value.
        k, v: [B, Hkv, M, d], rotated keys and values of the visual tokens, any float dtype.
    """
    q, v_source, k, v = q.float(), v_source.float(), k.float(), v.float()
    rel = _share(_relevance(q, k), None, dropped=0)
    sem = _share(_relevance(v_source, v), None, dropped=0)
    return (rel + sem) * _strength(v)


def accumulate(running: Tensor | None, score: Tensor, history: float = HISTORY) -> Tensor:
    """Running score: the first layer's score, then the mean of what was and what is; without history always the first.

    What was may hold -inf, so its weight of 0 is no product.
    """
    return score if running is None or not history else history * running + (1 - history) * score


def _relevance(row: Tensor, keys: Tensor) -> Tensor:
    """Attention's scaled logits [B, H, 1, N] of one row [B, H, 1, d] over keys [B, Hkv, N, d]."""
    heads, groups = row.shape[1], keys.shape[1]
    scaled = (row * row.shape[-1] ** -0.5).reshape(len(row), groups, heads // groups, -1)  # [B, Hkv, H / Hkv, d]
    logits: Tensor = scaled @ keys.transpose(-1, -2)
    return logits.flatten(1, 2)[:, :, None]


def _strength(v: Tensor) -> Tensor:
    """[B, N], from values [B, H, N, d]."""
    return v.mean(1).abs().sum(-1)


def _share(logits: Tensor, keys: Tensor | None, dropped: int = 1) -> Tensor:
    """Head-mean attention of the source row, normalised to sum 1 over the keys after the first `dropped`.

    Args:
        logits: [B, H, 1, N+1].
        keys: [B, N+1] bool or None.
        dropped: 1 where the source, CLS, is the first of the keys; it counts in the softmax's denominator only.
    """
    logits = logits.squeeze(2)
    if keys is not None:
        logits = logits.masked_fill(~keys[:, None], -torch.inf)
    log_share = logits.log_softmax(-1)[..., dropped:]  # [B, H, N]
    largest = log_share.amax((1, 2), keepdim=True)
    weight = (log_share - largest).exp().sum(1)  # [B, N]
    return weight / weight.sum(-1, keepdim=True)


def _entropy_ratio(share: Tensor, valid: Tensor | None) -> Tensor:
    """-sum p ln p / ln N per image, with 0 ln 0 = 0."""
    entropy = -torch.special.xlogy(share, share).sum(-1)
    count = torch.full_like(entropy, share.shape[-1]) if valid is None else valid.sum(-1).to(entropy.dtype)
    return torch.where(count > 1, entropy / count.clamp(min=2).log(), torch.ones_like(entropy))
