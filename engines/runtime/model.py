"""Vision and language together, batch by batch: pictures and prompts to logits, then a token at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.loading import Parts
from engines.runtime.clock import Clock
from engines.runtime.counters import Counters
from engines.runtime.picture_cache import PictureCache, Seen
from engines.runtime.pictures import Tokens
from engines.runtime.reading import Opened, Reader, Request
from engines.sessions.session import DeviceTensor, Feed, State, feeds_of

KEPT_ON_DEVICE = ("image_embeds", "image_lengths")


@dataclass(frozen=True)
class Prefill:
    """What the model knows after reading B prompts.

    Attributes:
        logits: [B, vocab] float32, of the token that follows each prompt.
        kept: per prompt, per picture, the numbers of the patches left at the end, ascending: of LLaVA-NeXT as
            flowcut.anyres.kept_patches numbers them, and where visual tokens are dropped inside the decoder, behind
            that.
        lengths: [B], tokens of each prompt with its visual tokens.
        pruned_lengths: [B], the same behind the pruning inside the decoder; `lengths` where there is none.
        latency_ms: "preprocess" (decode, resize, tokenize), "queue" (waiting for a place), "vision", "prefill", and
            "total" around them all.
        device_ms: "vision" and "prefill" without the copies from and to the host.
        state: the KV cache; None once the place that it belongs to is given back.
    """

    logits: NDArray[np.float32]
    kept: list[list[Tokens]]
    lengths: Tokens
    pruned_lengths: Tokens
    latency_ms: Mapping[str, float]
    device_ms: Mapping[str, float]
    state: State | None


class Model:
    """The graphs of an engine directory and what they have seen."""

    def __init__(
        self, parts: Parts, reader: Reader, picture_cache_bytes: int, counters: Counters | None = None
    ) -> None:
        self.vision, self.language, self._reader = parts.vision, parts.language, reader
        self.pictures, self._counters = PictureCache(picture_cache_bytes), counters or Counters()
        self._inputs = {spec.name: spec for spec in feeds_of(self.language.contract)}
        self._nothing = self._no_picture()

    def close(self) -> None:
        """Give back what the sessions hold. Nothing may run any more."""
        self.pictures, self._nothing = PictureCache(0), {}
        self.vision.close()
        self.language.close()

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compute the pixels that vision will need, in the caller's thread, while the device may be at work; and those
        of large pictures that it has seen, of which a request that waits, or a Chat, would keep more than that."""
        for picture in (p for request in requests for p in request.pictures):
            if picture.large or picture.key not in self.pictures:
                picture.prepare()

    def prefill(self, requests: Sequence[Request], clock: Clock) -> Prefill:
        """Read prompts, one for each request.

        Raises:
            EngineError: the engine library failed.
        """
        batch = self._reader.batch(requests)
        pictures = [picture for request in requests for picture in request.pictures]
        seen, vision_ms = self._see(pictures)
        self._counters.batch(len(requests))
        clock.stop("vision")
        state = self.language.allocate_state(len(requests))
        rows = {name: [each.rows[name] for each in seen] for name in self._nothing} if seen else self._nothing
        spans = batch.image_spans if seen else np.zeros((1, 3), np.int64)
        known: dict[str, Feed] = {**vars(batch), **rows, "image_spans": spans}
        result = self.language.run(self._taken(known), state)
        clock.stop("prefill")
        kept = iter(self._reader.geometry.left(np.array([each.kept for each in seen], np.int64), result.arrays))
        lengths = result.arrays.get("lengths", batch.lengths)
        return Prefill(
            logits=result.arrays["logits"],
            kept=[[next(kept) for _ in request.pictures] for request in requests],
            lengths=lengths,
            pruned_lengths=result.arrays.get("pruned_lengths", lengths),
            latency_ms={**clock.stages, "total": clock.since_start()},
            device_ms={"vision": vision_ms, "prefill": result.device_ms},
            state=state,
        )

    def step(self, prefill: Prefill, tokens: Tokens, step: int) -> NDArray[np.float32]:
        """Logits [B, vocab] behind `tokens`, [B], the ones numbered `step` of the answers.

        A sequence that has ended goes on being computed, which its owner ignores. No picture takes part: their tokens
        are in the cache.
        """
        count = len(tokens)
        feeds: dict[str, Feed] = {
            "input_ids": tokens[:, None],
            "position_ids": (prefill.lengths + step)[:, None],
            "pruned_position_ids": (prefill.pruned_lengths + step)[:, None],
            "image_rows": np.full((count, 1), -1, np.int64),
            "last_token": np.zeros(count, np.int64),
            "image_spans": np.zeros((1, 3), np.int64),
            **self._nothing,
        }
        self._counters.step()
        logits: NDArray[np.float32] = self.language.run(self._taken(feeds), prefill.state).arrays["logits"]
        return logits

    def _taken(self, known: Mapping[str, Feed]) -> dict[str, Feed]:
        """Of what is known, the language graph's inputs."""
        return {name: known[name] for name in self._inputs if name in known}

    def _see(self, pictures: Sequence[Opened]) -> tuple[list[Seen], float]:
        """What vision has to say of each, by looking at those that it has not seen; and the device's milliseconds."""
        seen = {picture.key: self.pictures.get(picture.key) for picture in pictures}
        new = list({picture.key: picture for picture in pictures if seen[picture.key] is None}.values())
        vision_ms = 0.0
        if new:
            feeds = self._reader.geometry.feeds(new, self.vision.contract)
            result = self.vision.run(feeds, keep=KEPT_ON_DEVICE)
            rows = {name: tensor.split() for name, tensor in result.kept.items()}
            for i, picture in enumerate(new):
                one = Seen({name: parts[i] for name, parts in rows.items()}, result.arrays["kept"][i])
                seen[picture.key] = one
                self.pictures.put(picture.key, one)
            vision_ms = result.device_ms
        self._counters.pictures(len(new), len(pictures) - len(new))
        return [each for picture in pictures if (each := seen[picture.key]) is not None], vision_ms

    def _no_picture(self) -> dict[str, DeviceTensor]:
        """What the language graph takes where no prompt has a picture: one that no token refers to."""
        specs = (self._inputs[name] for name in KEPT_ON_DEVICE if name in self._inputs)
        return {spec.name: self.language.place(np.zeros(spec.shape({"images": 1}), spec.dtype)) for spec in specs}
