"""LLaVA-NeXT's visual tokens of one picture in reading order, in eager PyTorch, with lengths as they come.

The reference for the vision graph, which sorts by place (docs/algorithm.md 5). Here patches are put back on the grid,
the padding is cropped off, and what is left is read row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowcut.anyres import Tiling

_NOTHING = -1


def pack(embeds: Tensor, kept: Tensor, tiling: Tiling, newline: Tensor) -> tuple[Tensor, Tensor]:
    """One picture's visual tokens [n, D] in reading order, and their places [n] (flowcut.anyres).

    Where every patch was kept, a newline ends each row of the grid, as in LLaVA-NeXT without pruning; otherwise only a
    lone base tile has one.

    Args:
        embeds: [tiles, K, D], the base tile first, then the grid's, row by row.
        kept: [tiles, K], numbers of the patches kept of each tile, ascending.
        newline: [D].
    """
    tiles, count, _ = embeds.shape
    tokens = torch.cat([embeds.flatten(0, 1), newline[None].to(embeds.dtype)])
    base, ending = torch.arange(count, device=kept.device), kept.new_tensor([tiles * count])  # rows of tokens
    if tiles == 1:
        return tokens, torch.cat([2 * kept[0], kept.new_tensor([2 * tiling.side**2 - 1])])
    rows, columns = (slice(seen.start, seen.stop) for seen in tiling.seen)
    numbers, all_places = _on_grid(kept[1:], tiling), _grid_places(kept, tiling)
    grid, places = numbers[rows, columns], all_places[rows, columns]
    if count == tiling.side**2:
        grid = torch.cat([grid, ending.expand(len(grid), 1)], 1)
        places = torch.cat([places, all_places[rows, -1:] + 1], 1)
    read = grid != _NOTHING
    return tokens[torch.cat([base, grid[read]])], torch.cat([2 * kept[0], places[read]])


def _on_grid(kept: Tensor, tiling: Tiling) -> Tensor:
    """[gh, gw]: which token is there, counted from the base tile's first, or _NOTHING. kept: [tiles of the grid, K]."""
    tiles, count = kept.shape
    tokens = torch.arange(count, (1 + tiles) * count, device=kept.device).view(tiles, count)
    patches = kept.new_full((tiles, tiling.side**2), _NOTHING).scatter(1, kept, tokens)
    return patches.view(tiling.rows, tiling.columns, tiling.side, tiling.side).transpose(1, 2).reshape(tiling.grid)


def _grid_places(kept: Tensor, tiling: Tiling) -> Tensor:
    """[gh, gw] in the type of `kept`: every patch's place, were there no padding."""
    gh, gw = tiling.grid
    return 2 * (tiling.side**2 + torch.arange(gh * gw, dtype=kept.dtype, device=kept.device).view(gh, gw))
