"""What is timed: a model that reads prompts with their pictures, and goes on for some tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.runtime.clock import Clock
from engines.runtime.control import Control
from engines.runtime.engine import LlavaEngine
from engines.runtime.pictures import Tokens
from engines.runtime.sampling import Sampling

STAGES = ("preprocess", "vision", "prefill")
"""That a clock is stopped at, in this order, before "decode"."""


@dataclass(frozen=True)
class Work:
    """What each run does: B prompts, each with a picture of its own.

    Attributes:
        pictures: no two alike, since a runtime may encode equal ones once.
        prompts: with one <image>.
    """

    pictures: tuple[Path | Image.Image, ...]
    prompts: tuple[str, ...]

    @property
    def batch(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Output:
    """What a run found, for comparing subjects.

    Attributes:
        logits: [B, vocab] float32, of the token that follows each prompt.
        kept: per prompt the numbers of its picture's patches that are left at the end, ascending.
        visual_tokens, prompt_tokens: per prompt, as the decoder's first layer sees them.
        pruned_prompt_tokens: the same behind the pruning inside the decoder.
        device_ms: "vision" and "prefill" inside the library, by CUDA events where those are; empty for peers.
    """

    logits: NDArray[np.float32]
    kept: Sequence[Tokens]
    visual_tokens: Sequence[int]
    prompt_tokens: Sequence[int]
    pruned_prompt_tokens: Sequence[int] = ()
    device_ms: dict[str, float] = field(default_factory=dict)


class Subject(Protocol):
    """A model, loaded.

    Attributes:
        name: short, one in a benchmark.
        title: what it is, for people.
    """

    name: str
    title: str

    def prepare(self, work: Work) -> None:
        """Once before `work` is timed. Nothing that a request has to compute may be kept."""

    def run(self, work: Work, clock: Clock, steps: int) -> Output:
        """Read the prompts, then take `steps` greedy steps, whatever ends the answers.

        The clock is stopped at "preprocess" (pictures decoded and resized, prompts tokenized), "vision" (visual tokens
        are there), "prefill" (logits of the last tokens are there) and, if there are steps, "decode".
        """
        ...


class EngineSubject:
    """An engine directory, on whatever runs it."""

    def __init__(self, name: str, title: str, engine: LlavaEngine) -> None:
        self.name, self.title, self.engine = name, title, engine

    def prepare(self, work: Work) -> None:
        """Nothing: the engine is loaded without a cache of pictures."""

    def run(self, work: Work, clock: Clock, steps: int) -> Output:
        """See Subject. Through the engine's reader and model, without its queue and without choosing tokens."""
        reader, model = self.engine.reader, self.engine.model
        requests = reader.read_all([[each] for each in work.pictures], list(work.prompts), Sampling(1), Control())
        model.prepare(requests)
        clock.stop("preprocess")
        prefill = model.prefill(requests, clock)
        clock.skip()  # what the model makes of its results for the caller
        logits = prefill.logits
        for step in range(steps):
            logits = model.step(prefill, logits.argmax(-1).astype(np.int64), step)
        if steps:
            clock.stop("decode")
        visual = [int((request.encoded.image_rows >= 0).sum()) for request in requests]
        return Output(
            logits=prefill.logits,
            kept=[pictures[0] for pictures in prefill.kept],
            visual_tokens=visual,
            prompt_tokens=prefill.lengths.tolist(),
            pruned_prompt_tokens=prefill.pruned_lengths.tolist(),
            device_ms=dict(prefill.device_ms),
        )
