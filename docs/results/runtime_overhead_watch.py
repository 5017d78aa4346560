"""An engine whose runs are timed one by one, from the outside: for runtime_overhead.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

from engines.runtime import reading
from engines.runtime.engine import LlavaEngine, load_engine
from engines.sessions.session import Result
from flowcut.prompt import Tokenizer


class Call(NamedTuple):
    """One run of a graph.

    Attributes:
        position: of the token that a decode step reads; None of other runs.
        start, seconds: of the whole `Session.run`, by perf_counter.
        inside: seconds within ONNX Runtime's own run.
    """

    graph: str
    position: int | None
    start: float
    seconds: float
    inside: float


def endless(directory: Path, threads: int, **options: Any) -> LlavaEngine:
    """An engine whose answers end only where they are as long as they may be."""
    engine = load_engine(directory, "ort", threads=threads, **options)
    engine.manifest = replace(engine.manifest, geometry=replace(engine.manifest.geometry, eos_token_ids=()))
    return engine


@contextmanager
def watched(engine: LlavaEngine) -> Iterator[list[Call]]:
    """Every run of the engine's two graphs."""
    calls: list[Call] = []
    sessions = {"vision": engine.model.vision, "language": engine.model.language}
    with ExitStack() as patches:
        for graph, session in sessions.items():
            patches.enter_context(patch.object(session, "run", recorder(graph, session.run, calls)))
        yield calls


def recorder(graph: str, run: Callable[..., Result], calls: list[Call]) -> Callable[..., Result]:
    def recorded(feeds: Mapping[str, Any], *others: Any, **named: Any) -> Result:
        start = perf_counter()
        result = run(feeds, *others, **named)
        seconds = perf_counter() - start
        positions = feeds.get("position_ids")
        step = graph == "language" and positions is not None and positions.shape[1] == 1
        position = int(positions[0, 0]) if step else None
        calls.append(Call(graph, position, start, seconds, result.device_ms / 1e3))
        return result

    return recorded


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Seconds spent in the host's parts of a request: opening, hashing, tokenizing, resizing."""
    spent: dict[str, float] = {}
    parts = {
        "open": (reading, "open_image"),
        "hash": (reading.Opened, "__init__"),
        "tokenize": (Tokenizer, "encode"),
        "resize": (reading.Opened, "prepare"),
    }
    with ExitStack() as patches:
        for part, (owner, name) in parts.items():
            patches.enter_context(patch.object(owner, name, adding(spent, part, getattr(owner, name))))
        yield spent


def adding(spent: dict[str, float], part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def added(*values: Any, **named: Any) -> Any:
        start = perf_counter()
        try:
            return function(*values, **named)
        finally:
            spent[part] = spent.get(part, 0.0) + perf_counter() - start

    return added
