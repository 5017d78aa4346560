"""The pruning step between two encoder layers: accumulate the score, keep the best, in spatial order.

One code path for every schedule. Rows beyond an image's valid count exist with `masked` only; there they stay finite,
carry a running score of -inf and are masked out of attention and of later scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowcut.schedule import Schedule, drop_count, layers_left
from flowcut.scoring import FlowScore, running_score


class Pruner:
    """State of one forward pass over B images. `after_layer` is called once per layer, in order."""

    def __init__(self, schedule: Schedule, layers: int, batch: int, device: torch.device) -> None:
        self._schedule = schedule
        self._layers = layers
        self._points = schedule.points(layers)
        self._scored_layers = schedule.scored_layers(layers)
        self._numbers = torch.arange(schedule.patches, device=device).repeat(batch, 1)  # [B, N] original numbers
        self._valid_count = torch.full((batch,), schedule.patches, device=device) if schedule.kind == "masked" else None
        self._running: Tensor | None = None
        self._counts = [self._count()]
        self._trace: list[tuple[int, list[Tensor]]] = []

    @property
    def _patches(self) -> int:
        return self._numbers.shape[1]

    def attention_mask(self) -> Tensor | None:
        """[B, 1, 1, N+1] bool, True where a key takes part; None when all do."""
        valid = self._valid()
        return None if valid is None else F.pad(valid, (1, 0), value=True)[:, None, None]

    def after_layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """Score the layer, if the selector reads it, and at a pruning point drop patches.

        Args:
            q, k, v: [B, H, N+1, d] of this layer.
            hidden: [B, N+1, D], the layer's output.

        Returns:
            hidden of CLS and the patches that stay, [B, K+1, D].
        """
        if self._patches > self._schedule.tokens and layer in self._scored_layers:
            scored = running_score(self._schedule, self._running, q, k, v, self._valid())
            self._running = scored.score
            if layer in self._points:
                hidden = self._prune(layer, scored, hidden)
        self._counts.append(self._count())
        return hidden

    def finish(self) -> tuple[Tensor, Tensor, list[tuple[int, list[Tensor]]]]:
        """kept [B, T], counts [B, L+1] and the trace; layers that were not run leave what entered them."""
        missing = self._layers + 1 - len(self._counts)
        counts = torch.stack(self._counts + self._counts[-1:] * missing, 1)
        return self._numbers, counts, self._trace

    def _prune(self, layer: int, scored: FlowScore, hidden: Tensor) -> Tensor:
        assert self._running is not None
        keep = self._capacity(layer, scored)
        if keep < self._patches or self._valid_count is not None:
            valid = self._valid()
            running = self._running if valid is None else self._running.masked_fill(~valid, -torch.inf)
            # stable: of equal scores the lower patch number wins, which torch.topk does not promise
            best = running.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
            order = self._spatial_order(best, layer, scored)
            hidden = torch.cat([hidden[:, :1], _take(hidden[:, 1:], order)], 1)
            self._running = _take(running, order)
            self._numbers = _take(self._numbers, order)
        self._trace.append((layer, self._kept_now()))
        return hidden

    def _capacity(self, layer: int, scored: FlowScore) -> int:
        """Rows that remain after this pruning point."""
        if self._schedule.counts:
            return self._schedule.counts[self._points.index(layer)]
        left = layers_left(self._layers, layer)
        return self._patches - drop_count(self._patches, self._schedule.tokens, left, float(scored.entropy_ratio[0]))

    def _spatial_order(self, best: Tensor, layer: int, scored: FlowScore) -> Tensor:
        """Rows to gather, ascending; with `masked` the valid ones first, and the valid count is updated."""
        if self._valid_count is None:
            return best.sort(-1).values
        self._valid_count = self._masked_count(layer, scored, best.shape[1])
        surplus = torch.arange(best.shape[1], device=best.device) >= self._valid_count[:, None]
        behind = best + surplus * self._patches  # a key beyond every valid row
        return behind.sort(-1).values % self._patches

    def _masked_count(self, layer: int, scored: FlowScore, capacity: int) -> Tensor:
        """min(rule, capacity) per image, with the valid count as N (docs/algorithm.md 3)."""
        count, tokens, left = self._valid_count, self._schedule.tokens, layers_left(self._layers, layer)
        assert count is not None
        if left == 0:
            return torch.full_like(count, tokens)
        drop = ((count - tokens) / left**0.5 * (1 - scored.entropy_ratio**2)).round().long()
        return torch.minimum((count - drop).clamp(min=tokens), torch.full_like(count, capacity))

    def _valid(self) -> Tensor | None:
        if self._valid_count is None:
            return None
        return torch.arange(self._patches, device=self._numbers.device) < self._valid_count[:, None]

    def _count(self) -> Tensor:
        if self._valid_count is not None:
            return self._valid_count.clone()
        return torch.full((len(self._numbers),), self._patches, device=self._numbers.device)

    def _kept_now(self) -> list[Tensor]:
        if self._valid_count is None:
            return list(self._numbers)  # nobody waits for the device
        counts = self._count().tolist()
        return [numbers[:n] for numbers, n in zip(self._numbers, counts, strict=True)]


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, N, ...] at rows [B, K] of each image."""
    index = rows.view(*rows.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
