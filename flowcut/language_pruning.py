"""Visual tokens dropped inside the decoder, in eager PyTorch: docs/algorithm.md 5, one sequence, rows physically gone.

The reference for the `language` graph with llm_tokens. The first two layers see the whole prompt and the others what
was kept of it, with positions of its own, 0, 1, 2, ..; so their keys and values differ in length, and while decoding
the two run on side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowcut.budget import PRUNE_LAYER
from flowcut.config import TextConfig
from flowcut.language import DecoderLayer, KVCache, LanguageModel, Step
from flowcut.scoring import token_score

Span = tuple[int, int]


@dataclass
class Reading:
    """A prompt that was read, and what has been written since.

    Attributes:
        hidden: [1, S', D], the prompt's last hidden state, before the final norm.
        kept: per span the numbers of the tokens that stay, counted from its first, ascending.
        cache: per layer as many rows as that layer has tokens, and room for those to come.
        lengths: tokens so far, in the layers up to PRUNE_LAYER and in the others; `step` counts on.
    """

    hidden: Tensor
    kept: list[Tensor]
    cache: KVCache
    lengths: tuple[int, int]


@torch.inference_mode()
def read(
    model: LanguageModel,
    embeds: Tensor,
    spans: Sequence[Span],
    llm_tokens: int,
    room: int = 0,
    keep: Sequence[Tensor] | None = None,
) -> Reading:
    """Prefill one sequence; the token that scores the visual ones is its last.

    Args:
        embeds: [1, S, D], of text and visual tokens.
        spans: start and length of each picture's visual tokens, apart from each other.
        llm_tokens: visual tokens that each picture keeps; one with no more of them keeps all.
        room: tokens that may follow.
        keep: per span what stays, in place of its best: as another computation chose among scores that differ slightly.
    """
    length, early, late = embeds.shape[1], *_layer_groups(model)
    left = length - sum(max(0, count - llm_tokens) for _, count in spans)
    rows = [length + room] * len(early) + [left + room] * len(late)
    cache = KVCache.allocate(model.config, 1, rows, embeds.dtype, embeds.device)
    entering = model.through(early[:-1], embeds, _positions(length, embeds), cache)
    hidden = model.through(early[-1:], entering, _positions(length, embeds), cache)
    layer, own = model.model.layers[PRUNE_LAYER], (cache.keys[PRUNE_LAYER], cache.values[PRUNE_LAYER])
    assert isinstance(layer, DecoderLayer)
    best = (best_tokens(layer, model.config, entering, own, span, llm_tokens) for span in spans)
    kept = list(best if keep is None else keep)
    hidden = model.through(late, without_dropped(hidden, spans, kept), _positions(left, embeds), cache)
    return Reading(hidden, kept, cache, (length, left))


@torch.inference_mode()
def step(model: LanguageModel, token_id: int | Tensor, reading: Reading) -> Tensor:
    """Hidden state [1, 1, D] of one more token, before the final norm; every layer's keys and values grow by it.

    Raises:
        InputError: `room` has been used up.
    """
    early, late = _layer_groups(model)
    weight = model.model.embed_tokens.weight
    hidden: Tensor = model.model.embed_tokens(torch.as_tensor(token_id, device=weight.device).view(1, 1))
    for layers, length in zip((early, late), reading.lengths, strict=True):
        hidden = model.through(layers, hidden, torch.full((1, 1), length, device=weight.device), reading.cache)
    reading.lengths = (reading.lengths[0] + 1, reading.lengths[1] + 1)
    return hidden


def _layer_groups(model: LanguageModel) -> tuple[range, range]:
    """Layers that see every token of the prompt, and those that see what was kept."""
    return range(PRUNE_LAYER + 1), range(PRUNE_LAYER + 1, model.config.num_hidden_layers)


def _positions(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device)[None]


def best_tokens(
    layer: DecoderLayer, config: TextConfig, entering: Tensor, cache: tuple[Tensor, Tensor], span: Span, tokens: int
) -> Tensor:
    """Numbers of a span's `tokens` best, ascending, or all. Arguments are those of `span_score`."""
    if span[1] <= tokens:
        return torch.arange(span[1], device=entering.device)
    score = span_score(layer, config, entering, cache, span)
    # stable: of equal scores the lower number wins, which torch.topk does not promise
    return score.sort(descending=True, stable=True).indices[:tokens].sort().values


def span_score(
    layer: DecoderLayer, config: TextConfig, entering: Tensor, cache: tuple[Tensor, Tensor], span: Span
) -> Tensor:
    """Scores of a span's tokens, float32, by the last token of all.

    Args:
        layer: the one at PRUNE_LAYER.
        entering: [1, S, D], what it was given.
        cache: its rotated keys and its values; of the queries the last token's alone is wanted.
    """
    start, count = span
    last = entering[:, -1:]
    at = _positions(entering.shape[1], entering)[:, -1:]
    q, _, source = layer.self_attn.project(layer.input_layernorm(last), Step.at(at, config, last.dtype))
    k, v = (rows[:, :, start : start + count] for rows in cache)
    return token_score(q, source, k, v)[0]


def without_dropped(hidden: Tensor, spans: Sequence[Span], kept: Sequence[Tensor]) -> Tensor:
    """hidden [1, S, D] less the rows of each span that are not kept."""
    stays = torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device)
    for (start, count), numbers in zip(spans, kept, strict=True):
        stays[start : start + count] = False
        stays[start + numbers] = True
    return hidden[:, stays]
