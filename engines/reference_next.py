"""References of graphs that LLaVA-1.5 has not: tiles packed into pictures, and visual tokens dropped in the decoder.

As in engines.reference, whose runners these extend. The decoder is run sequence by sequence, without its gaps and
padding: a result that depends on what else is in the batch shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engines.comparison import Led
from engines.reference import ExportedWeights, TorchLanguage, TorchVision, choose, rounded_step
from engines.sessions.session import Array
from flowcut.anyres import NO_TOKEN, Tiling, patch_places
from flowcut.budget import PRUNE_LAYER
from flowcut.config import TextConfig
from flowcut.contract import GraphContract, cached_layers, hidden_name, past_names, present_names
from flowcut.language import DecoderLayer, KVCache, LanguageModel, Step
from flowcut.language_pruning import Reading, Span, read, span_score, step
from flowcut.packing import pack
from flowcut.schedule import Schedule


class TorchTiles(TorchVision):
    """Tower, projector and packing of pictures that are cut as `tilings` say."""

    def __init__(
        self, weights: ExportedWeights, contract: GraphContract, schedule: Schedule, tilings: Sequence[Tiling]
    ) -> None:
        super().__init__(weights, contract, schedule)
        self.tilings = tilings

    @torch.inference_mode()
    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        seen = [
            self.model.see(tiles, tiling, self.schedule) for tiles, tiling in self._tiles(feed_dict["pixel_values"])
        ]
        slots, width = (int(dim) for dim in self.contract.outputs[0].dims[1:])
        embeds, kept = torch.zeros(len(seen), slots, width), torch.full((len(seen), slots), NO_TOKEN)
        for i, (tokens, places) in enumerate(seen):
            embeds[i, : len(tokens)], kept[i, : len(places)] = tokens, places
        lengths = torch.tensor([len(tokens) for tokens, _ in seen])
        return self.typed({"image_embeds": embeds, "kept": kept, "image_lengths": lengths})

    @torch.inference_mode()
    def lead(self, pixel_values: Array, kept: Sequence[Array], score_gap: float) -> Led:
        """See TorchVision; `kept` are places. Which patches of the padding a tile kept cannot be seen in them."""
        embeds, measured = [], []
        for (tiles, tiling), own in zip(self._tiles(pixel_values), kept, strict=True):
            led = [
                self.lead_one(
                    tile[None],
                    torch.from_numpy(np.flatnonzero(np.isin(places, own))),
                    score_gap,
                    torch.from_numpy(np.flatnonzero(places == NO_TOKEN)),
                )
                for tile, places in zip(tiles, patch_places(tiling), strict=True)
            ]
            tokens = torch.cat([one.embeds for one in led]), torch.stack([one.kept for one in led])
            embeds.append(pack(*tokens, tiling, self.model.image_newline)[0].numpy())
            measured += [one.gaps for one in led]
        widest, firm, closest = zip(*measured, strict=True)
        return Led(embeds, max(widest), max(firm), min(closest))

    def _tiles(self, pixel_values: Array) -> list[tuple[Tensor, Tiling]]:
        pixels = torch.from_numpy(pixel_values).float()
        parts = torch.split(pixels, [tiling.tiles for tiling in self.tilings])
        return list(zip(parts, self.tilings, strict=True))


class _Rounded(LanguageModel):
    """With rotary tables rounded as the graph's are."""

    def __init__(self, config: TextConfig, precision: str) -> None:
        super().__init__(config)
        self.precision = precision

    def step(self, position_ids: Tensor, dtype: torch.dtype) -> Step:
        return rounded_step(position_ids, self.config, self.precision)


class TorchPruning(TorchLanguage):
    """The decoder, or its first stage, where visual tokens are dropped after layer PRUNE_LAYER.

    Attributes:
        follow: what another runner kept of each picture, in place of torch's own choice; None: that.
        gap: how far at most, in torch's scores, a token that had to go was above one that took its place.
    """

    follow: Array | None = None
    gap: float = 0.0

    def build(self) -> LanguageModel:
        text = self.weights.config.text
        return _Rounded(replace(text, num_hidden_layers=len(cached_layers(self.contract))), self.weights.precision)

    @torch.inference_mode()
    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: torch.from_numpy(array) for name, array in feed_dict.items()}
        shapes = {s.name: s.dims for s in self.contract.outputs}
        images, batch = len(feeds["image_spans"]), len(feeds["input_ids"])
        outputs = {
            "lengths": torch.ones(batch, dtype=torch.int64),
            "pruned_lengths": torch.ones(batch, dtype=torch.int64),
            "kept_tokens": torch.zeros((images, int(shapes["kept_tokens"][1])), dtype=torch.int64),
        }
        layers = cached_layers(self.contract)
        for i in layers:
            caches = (feeds[name].to(torch.float32, copy=True) for name in past_names(i))
            outputs |= dict(zip(present_names(i), caches, strict=True))
        rows = feeds["pruned_position_ids"].shape[1]
        hidden = torch.zeros(batch, rows, self.model.config.hidden_size)
        for b in range(batch):
            begins = int(feeds["position_ids"][b, 0]) == 0
            own = self._read(feeds, b, outputs) if begins else self._step(feeds, b, outputs)
            hidden[b, : own.shape[1]] = own[0]
        if "logits" in shapes:
            logits = self.model.logits(hidden, outputs["pruned_lengths"] - 1)
            return self.typed(outputs | {"logits": logits})
        return self.typed(outputs | {hidden_name(layers[-1] + 1): hidden})

    def _read(self, feeds: Mapping[str, Tensor], b: int, outputs: dict[str, Tensor]) -> Tensor:
        """One sequence of a prefill: its hidden states [1, S', D]; everything else goes into `outputs`."""
        numbers, spans, places = self._real(feeds, b)
        ids, image_rows = (feeds[name][b, places][None] for name in ("input_ids", "image_rows"))
        embeds = self.model.embed(ids, image_rows, feeds["image_embeds"].float())
        keep, tokens = None, outputs["kept_tokens"].shape[1]
        if self.follow is not None:
            pairs = zip(numbers, spans, strict=True)
            keep = [torch.from_numpy(self.follow[i][: min(tokens, count)]) for i, (_, count) in pairs]
            self._measure(embeds, spans, keep, tokens)
        reading = read(self.model, embeds, spans, tokens, keep=keep)
        for number, kept in zip(numbers, reading.kept, strict=True):
            outputs["kept_tokens"][number, : len(kept)] = kept
        outputs["lengths"][b], outputs["pruned_lengths"][b] = reading.lengths
        for i in cached_layers(self.contract):
            for name, cache in zip(present_names(i), (reading.cache.keys[i], reading.cache.values[i]), strict=True):
                outputs[name][b, :, : cache.shape[2]] = cache[0]
        return reading.hidden

    def _real(self, feeds: Mapping[str, Tensor], b: int) -> tuple[list[int], list[Span], Tensor]:
        """Of a sequence: its pictures' numbers, their spans once the gaps are closed, and the places of its tokens."""
        real = torch.ones(int(feeds["last_token"][b]) + 1, dtype=torch.bool)
        numbers, spans, closed = [], [], 0
        for i, (sequence, first, capacity) in enumerate(feeds["image_spans"].tolist()):
            if sequence == b and capacity:
                count = min(int(feeds["image_lengths"][i]), capacity) if "image_lengths" in feeds else capacity
                numbers.append(i)
                spans.append((first - closed, count))
                real[first + count : first + capacity] = False
                closed += capacity - count
        return numbers, spans, real.nonzero()[:, 0]

    def _measure(self, embeds: Tensor, spans: Sequence[Span], keep: Sequence[Tensor], tokens: int) -> None:
        """Widen `gap` to the scores of what is kept against torch's own choice."""
        length, config = embeds.shape[1], self.model.config
        rows = [length if i <= PRUNE_LAYER else 0 for i in range(config.num_hidden_layers)]
        cache, positions = KVCache.allocate(config, 1, rows), torch.arange(length)[None]
        entering = self.model.through(range(PRUNE_LAYER), embeds, positions, cache)
        self.model.through(range(PRUNE_LAYER, PRUNE_LAYER + 1), entering, positions, cache)
        layer, own = self.model.model.layers[PRUNE_LAYER], (cache.keys[PRUNE_LAYER], cache.values[PRUNE_LAYER])
        assert isinstance(layer, DecoderLayer)
        for span, numbers in zip(spans, keep, strict=True):
            if span[1] > tokens:
                wanted = torch.isin(torch.arange(span[1]), numbers)
                gap = choose(span_score(layer, config, entering, own, span), wanted, tokens)[1]
                self.gap = max(self.gap, gap)

    def _step(self, feeds: Mapping[str, Tensor], b: int, outputs: dict[str, Tensor]) -> Tensor:
        """One sequence of a decode step, [1, 1, D]; its cache grows in `outputs`."""
        names = [present_names(i) for i in cached_layers(self.contract)]
        keys, values = ([outputs[pair[which]][b : b + 1] for pair in names] for which in range(2))
        at = tuple(int(feeds[name][b, 0]) for name in ("position_ids", "pruned_position_ids"))
        reading = Reading(torch.empty(0), [], KVCache(keys, values), (at[0], at[1]))
        return step(self.model, int(feeds["input_ids"][b, 0]), reading)
