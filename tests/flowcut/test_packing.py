"""One picture's visual tokens in reading order: docs/algorithm.md 5 token by token, and transformers unpruned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowcut.anyres import Tiling, newline_places, patch_places
from flowcut.packing import pack

Array = np.ndarray[Any, Any]
WIDTH = 3  # of an embedding
EDGES = st.one_of(st.integers(1, 40), st.sampled_from([56, 300, 336, 1000, 3000]))
NEWLINE = np.full(WIDTH, -7.0, np.float32)


@st.composite
def pictures(draw: st.DrawFn, pruned: bool) -> tuple[Tiling, Array, Array]:
    """A picture's tiling, and the embeddings [tiles, K, D] and numbers [tiles, K] of the patches kept of its tiles."""
    rows, columns = draw(st.sampled_from([(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 4), (2, 3)]))
    side = draw(st.integers(2 if pruned else 1, 5))
    tiling = Tiling(draw(EDGES), draw(EDGES), rows, columns, side)
    count = draw(st.integers(1, side**2 - 1)) if pruned else side**2
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kept = np.stack([np.sort(rng.permutation(side**2)[:count]) for _ in range(tiling.tiles)])
    return tiling, rng.standard_normal((tiling.tiles, count, WIDTH), np.float32), kept


def packed(tiling: Tiling, embeds: Array, kept: Array) -> tuple[Array, Array]:
    tokens, places = pack(torch.from_numpy(embeds), torch.from_numpy(kept), tiling, torch.from_numpy(NEWLINE))
    return tokens.numpy(), places.numpy()


def spec(tiling: Tiling, embeds: Array, kept: Array) -> tuple[list[Array], list[int]]:
    """What docs/algorithm.md 5 says of pruned tiles, one patch of the grid after the other."""
    side, patches = tiling.side, tiling.side**2
    tokens, places = list(embeds[0]), [2 * int(p) for p in kept[0]]
    if tiling.tiles == 1:
        return [*tokens, NEWLINE], [*places, 2 * (patches - 1) + 1]
    gh, gw, w, h = tiling.rows * side, tiling.columns * side, tiling.width, tiling.height
    above, left = ((gh - int(h * gw / w)) // 2, 0) if w / h > gw / gh else (0, (gw - int(w * gh / h)) // 2)
    for r in range(above, gh - above):
        for c in range(left, gw - left):
            tile, patch = 1 + r // side * tiling.columns + c // side, r % side * side + c % side
            for found, embedding in zip(kept[tile], embeds[tile], strict=True):
                if found == patch:
                    tokens.append(embedding)
                    places.append(2 * (patches + r * gw + c))
    return tokens, places


@settings(deadline=None)
@given(pictures(pruned=True))
def test_pruned_tiles_are_read_as_specified(picture: tuple[Tiling, Array, Array]) -> None:
    tokens, places = packed(*picture)
    expected, expected_places = spec(*picture)
    np.testing.assert_array_equal(tokens, np.stack(expected))
    assert places.tolist() == expected_places


@settings(deadline=None)
@given(pictures(pruned=False))
def test_where_nothing_is_pruned_tiles_are_read_as_transformers_reads_them(
    picture: tuple[Tiling, Array, Array],
) -> None:
    tiling, embeds, _ = picture
    modeling = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    pinpoints = [[tiling.rows * tiling.side, tiling.columns * tiling.side]]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tiling.side, patch_size=1), image_grid_pinpoints=pinpoints
    )
    (expected,), _ = modeling.LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.from_numpy(embeds)],
        torch.tensor([[tiling.height, tiling.width]]),
        vision_feature_select_strategy="default",
        image_newline=torch.from_numpy(NEWLINE),
    )
    np.testing.assert_array_equal(packed(*picture)[0], expected.numpy())


@settings(deadline=None)
@given(st.booleans().flatmap(lambda pruned: st.tuples(pictures(pruned), st.just(pruned))))
def test_tokens_are_in_the_order_of_their_places(drawn: tuple[tuple[Tiling, Array, Array], bool]) -> None:
    """The vision graph sorts the places of flowcut.anyres: this is what it must come to."""
    (tiling, _, kept), pruned = drawn
    seen = np.take_along_axis(patch_places(tiling), kept, 1).flatten()
    _, places = packed(*drawn[0])
    assert places.tolist() == sorted([*seen[seen < 1 << 30].tolist(), *newline_places(tiling, pruned).tolist()])
    assert len(set(places.tolist())) == len(places)


def test_a_picture_one_pixel_wide_leaves_the_base_tile_and_newlines() -> None:
    tiling = Tiling(1, 3000, 3, 1, 4)
    embeds, kept = np.ones((4, 16, WIDTH), np.float32), np.tile(np.arange(16), (4, 1))
    tokens, _ = packed(tiling, embeds, kept)
    assert (tokens == NEWLINE).all(1).tolist() == [False] * 16 + [True] * 12
    assert len(packed(tiling, embeds[:, :9], kept[:, :9])[0]) == 9


def test_half_precision_stays() -> None:
    embeds = torch.ones((2, 4, WIDTH), dtype=torch.float16)
    tokens, places = pack(embeds, torch.arange(4).repeat(2, 1), Tiling(5, 5, 1, 1, 2), torch.from_numpy(NEWLINE))
    assert (tokens.dtype, places.dtype) == (torch.float16, torch.int64)
