"""What `verify` runs the graphs on: seeded pictures, and prompts of different lengths about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.runners import Feeds
from engines.session import Array
from flowcut.anyres import Tiling, choose_tiling, image_slots, vision_feeds
from flowcut.artifacts import Manifest
from flowcut.config import LlavaConfig
from flowcut.contract import pruned_limit

TEXT_TOKENS, IMAGE_AT, LENGTH_STEP, DECODE_STEPS = 24, 4, 5, 3
"""Of the prompts: text beside a picture, where it begins, by how much lengths differ, steps after the prefill."""
SHAPES = ((2.0, 1.4), (1.0, 0.3), (0.3, 2.6), (0.2, 0.2))
"""LLaVA-NeXT's pictures, in edges of a tile: each in turn, so that numbers of tiles differ, and some have padding."""


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Attributes:
        steps: inputs of a prefill and of decode steps, without the cache.
        lengths, pruned_lengths: [B], tokens of each prompt, as far as real, and behind the pruning inside the decoder.
        kept: [images], tokens that stay of each picture there.
    """

    steps: list[Feeds]
    lengths: Array
    pruned_lengths: Array
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


def prompts(manifest: Manifest, seen: Mapping[str, Array], cuts: Sequence[Tiling], batch: int, seed: int) -> Prompts:
    """A prefill of `batch` prompts, the first ones with a picture each, and decode steps of seeded tokens.

    seen: image_embeds and, of LLaVA-NeXT, image_lengths.
    """
    rng, limits = np.random.default_rng([seed, 1]), manifest.limits
    spans, widths = _spans(manifest, len(seen["image_embeds"]), cuts, batch)
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
    return Prompts([prefill, *decode], lengths, pruned_lengths, kept)


def _spans(manifest: Manifest, images: int, cuts: Sequence[Tiling], batch: int) -> tuple[Array, Array]:
    """Sequence, first place and places of each picture [images, 3], none where there is no prompt for it, and the
    places of each prompt [batch]."""
    geometry, tokens, limits = manifest.geometry, manifest.tokens, manifest.limits
    rows = vision_feeds(geometry, tokens, cuts).rows if geometry.anyres else (tokens,) * images
    own = np.array([*rows, *[0] * batch][:batch])
    longest = min(limits.max_prompt, max(rows) + TEXT_TOKENS)
    widths = np.maximum(longest - LENGTH_STEP * np.arange(batch), own + 1)
    if manifest.llm_tokens is not None:  # a prompt whose picture is smaller may be too long behind the pruning
        most = pruned_limit(geometry, tokens, manifest.llm_tokens, limits)
        widths = np.minimum(widths, most + np.maximum(own - manifest.llm_tokens, 0))
    spans = np.zeros((images, 3), np.int64)
    for i in range(min(batch, images)):
        spans[i] = i, min(IMAGE_AT, int(widths[i]) - rows[i] - 1), rows[i]
    return spans, widths
