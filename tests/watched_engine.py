"""The bundled checkpoint on ONNX Runtime, its decoder watched and held up where a test wants it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engines.loading import open_directory
from engines.options import Options
from engines.runtime.engine import LlavaEngine
from engines.sessions.session import Feed, Result, Session, State, shape_of
from flowcut.prompt import question_prompt

PATIENCE_S = 60.0
"""After which a test that hangs fails; no test waits so long that passes."""

Hook = Callable[[Mapping[str, Feed]], None]


class Watched:
    """A decoder's session, which tells a test what it is run with before it runs.

    Attributes:
        before: called with the feeds of every run.
        prefills: batch sizes of prefills, in order.
        states: weak references to every KV cache there was.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.before: Hook = lambda feeds: None
        self.prefills: list[int] = []
        self.states: list[weakref.ref[Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def allocate_state(self, batch: int) -> State:
        state = self._session.allocate_state(batch)
        self.states.append(weakref.ref(state))
        return state

    def run(self, feeds: Mapping[str, Feed], state: State | None = None, keep: Any = ()) -> Result:
        if not is_step(feeds):
            self.prefills.append(shape_of(feeds["input_ids"])[0])
        self.before(feeds)
        return self._session.run(feeds, state, keep)

    def living(self) -> int:
        """KV caches that somebody still holds."""
        return sum(ref() is not None for ref in self.states)


def is_step(feeds: Mapping[str, Feed]) -> bool:
    """Whether a run decodes one token, rather than reading prompts."""
    return shape_of(feeds["input_ids"])[1] == 1


def watched(directory: Path, endless: bool = False, **options: Any) -> tuple[LlavaEngine, Watched]:
    """An engine, and its decoder.

    Args:
        endless: answers go on to max_new_tokens, since no token ends them.
    """
    chosen = Options.make({"threads": 1, **options})
    parts = open_directory(directory, "ort", chosen)
    if endless:
        geometry = replace(parts.manifest.geometry, eos_token_ids=())
        parts = replace(parts, manifest=replace(parts.manifest, geometry=geometry))
    decoder = Watched(parts.language)
    return LlavaEngine(replace(parts, language=decoder), chosen), decoder


def picture(seed: int, width: int = 210, height: int = 190) -> Image.Image:
    """Smooth, so that patches differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def question(text: str, images: int = 1) -> str:
    return question_prompt(text, images)
