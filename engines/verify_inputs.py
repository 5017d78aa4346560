"""What `verify` runs the graphs on: seeded pictures, and prompts of different lengths about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.runners import Feeds
from engines.sessions.session import Array
from flowcut.anyres import Tiling, choose_tiling, image_slots, vision_feeds
from flowcut.artifacts import Manifest
from flowcut.config import LlavaConfig
from flowcut.contract import pruned_limit

TEXT_TOKENS, IMAGE_AT, LENGTH_STEP, DECODE_STEPS = 24, 4, 5, 3
"""Of the prompts: text beside a picture, where it begins, by how much lengths differ, steps after the prefill."""
SHAPES = ((1.8, 0.7), (0.7, 2.7), (2.0, 1.4), (0.3, 2.6), (0.2, 0.2))
"""LLaVA-NeXT's pictures, in edges of a tile: each in turn, so that numbers of tiles differ, and some have padding. The
first two, of few tiles and little padding, are to share a prompt, and to lose tokens in it."""


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Attributes:
        steps: inputs of a prefill and of decode steps, without the cache.
        lengths, pruned_lengths: [B], tokens of each prompt, as far as real, and behind the pruning inside the decoder.
        tokens, kept: [images], real tokens of each picture in its prompt, and how many of them stay there.
    """

    steps: list[Feeds]
    lengths: Array
    pruned_lengths: Array
    tokens: Array
    kept: Array


def tilings(config: LlavaConfig, count: int) -> list[Tiling]:
    """How `count` pictures are cut; none where they are not."""
    side = config.vision.image_size
    shapes = [SHAPES[i % len(SHAPES)] for i in range(count)] if config.anyres else []
    return [choose_tiling(config, max(1, round(w * side)), max(1, round(h * side))) for w, h in shapes]


def vision_inputs(manifest: Manifest, pixels: Array, cuts: Sequence[Tiling]) -> Feeds:
    """The vision graph's."""
    if not manifest.geometry.anyres:
        return {"pixel_values": pixels}
    return {"pixel_values": pixels, **vision_feeds(manifest.geometry, manifest.tokens, cuts).arrays()}


def pictures(count: int, size: int, seed: int) -> Array:
    """Smooth seeded pixel_values with a little noise, float32 [count, 3, size, size], unit variance."""
    rng = np.random.default_rng([seed, 0])
    y, x = np.mgrid[0:size, 0:size] / size
    waves = (
        rng.uniform(-6, 6, (count, 3, 8, 2)),
        rng.uniform(0, 2 * np.pi, (count, 3, 8)),
        rng.normal(size=(count, 3, 8)),
    )
    out = 0.3 * rng.standard_normal((count, 3, size, size))
    for i in range(8):
        frequency, phase, height = (w[:, :, i, ..., None, None] for w in waves)
        out += height * np.sin(2 * np.pi * (frequency[:, :, 0] * x + frequency[:, :, 1] * y) + phase)
    scaled: Array = (out / out.std()).astype(np.float32)
    return scaled


def prompts(
    manifest: Manifest, seen: Mapping[str, Array], cuts: Sequence[Tiling], batch: int, seed: int, bare: bool = False
) -> Prompts:
    """A prefill of `batch` prompts, and decode steps of seeded tokens.

    One prompt has the first two pictures, the following ones have one each, and those before it, if any, have none.
    Where max_prompt has no room for these two pictures and a token of text, the prompts have one each, from the first:
    then nothing shows how pictures of one prompt count together.

    Args:
        seen: image_embeds and, of LLaVA-NeXT, image_lengths.
        bare: the first of several prompts is to have no picture in any case, so that none of its values depends on
            which visual tokens stay.
    """
    rng, limits = np.random.default_rng([seed, 1]), manifest.limits
    spans, widths = _spans(manifest, len(seen["image_embeds"]), cuts, batch, bare)
    slots, longest = image_slots(manifest.geometry, manifest.tokens), int(widths.max())
    image_rows = np.full((batch, longest), -1)
    for i, (row, first, count) in enumerate(spans):
        image_rows[row, first : first + count] = i * slots + np.arange(count)
    real = np.minimum(seen.get("image_lengths", spans[:, 2]), spans[:, 2])
    kept = real if manifest.llm_tokens is None else np.minimum(real, manifest.llm_tokens)
    lengths, pruned_lengths, pruned_widths = widths.copy(), widths.copy(), widths.copy()
    np.subtract.at(lengths, spans[:, 0], spans[:, 2] - real)
    np.subtract.at(pruned_lengths, spans[:, 0], spans[:, 2] - kept)
    if manifest.llm_tokens is not None:
        np.subtract.at(pruned_widths, spans[:, 0], np.maximum(spans[:, 2] - manifest.llm_tokens, 0))
    prefill = {
        "input_ids": rng.integers(0, manifest.geometry.text.vocab_size, (batch, longest)),
        "position_ids": np.tile(np.arange(longest), (batch, 1)),
        "image_rows": image_rows,
        "last_token": widths - 1,
        "image_spans": spans,
        "pruned_position_ids": np.tile(np.arange(int(pruned_widths.max())), (batch, 1)),
        **seen,
    }
    decode = [
        {
            "input_ids": rng.integers(0, manifest.geometry.text.vocab_size, (batch, 1)),
            "position_ids": (lengths + step)[:, None],
            "image_rows": np.full((batch, 1), -1),
            "last_token": np.zeros(batch, np.int64),
            "image_spans": np.zeros_like(spans),
            "pruned_position_ids": (pruned_lengths + step)[:, None],
            **seen,
        }
        for step in range(min(DECODE_STEPS, limits.max_new_tokens))
    ]
    return Prompts([prefill, *decode], lengths, pruned_lengths, real, kept)


def _spans(manifest: Manifest, images: int, cuts: Sequence[Tiling], batch: int, bare: bool) -> tuple[Array, Array]:
    """Sequence, first place and places of each picture [images, 3], none where there is no prompt for it, and the
    places of each prompt [batch]."""
    geometry, tokens = manifest.geometry, manifest.tokens
    rows = vision_feeds(geometry, tokens, cuts).rows if geometry.anyres else (tokens,) * images
    paired = images > 1 and sum(rows[:2]) < _longest(manifest, rows[:2])
    owners = _owners(images, batch, paired, bare)
    spans, widths = np.zeros((images, 3), np.int64), np.zeros(batch, np.int64)
    for b in range(batch):
        own = [i for i, owner in enumerate(owners) if owner == b]
        sizes = [rows[i] for i in own]
        text = max(1, TEXT_TOKENS - LENGTH_STEP * b)
        widths[b] = min(sum(sizes) + text, _longest(manifest, sizes))
        spare, place = int(widths[b]) - sum(sizes) - 1, 0  # at least one token of text is behind the pictures
        for i in own:
            before = min(IMAGE_AT, spare)
            spans[i] = b, place + before, rows[i]
            spare, place = spare - before, place + before + rows[i]
    return spans, widths


def _owners(images: int, batch: int, paired: bool, bare: bool) -> list[int]:
    """The prompt of each picture, as `prompts` says; the last pictures may have none."""
    first = 1 if bare and batch > 1 else 0
    if not paired:
        return list(range(first, batch))[:images]
    used = min(images, batch - first + 1)
    begin = batch - used + 1
    return [begin, *range(begin, begin + used - 1)]


def _longest(manifest: Manifest, sizes: Sequence[int]) -> int:
    """Places that a prompt with pictures of these sizes may have: one whose pictures are small may be too long for the
    layers behind the pruning."""
    limits, llm_tokens = manifest.limits, manifest.llm_tokens
    if llm_tokens is None:
        return limits.max_prompt
    most = pruned_limit(manifest.geometry, manifest.tokens, llm_tokens, limits)
    return min(limits.max_prompt, most + sum(max(0, size - llm_tokens) for size in sizes))
