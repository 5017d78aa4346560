"""One question about some pictures, answered and timed: what `flowcut run` and `make engine` show."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.runtime import Generation, LlavaEngine

STAGES = ("preprocess", "vision", "prefill", "time_to_first_token", "decode_per_token")
PATIENCE_S = 20.0
"""No further repeat starts after this long; n says how many there were."""


@dataclass(frozen=True)
class Answer:
    """An answer and the latency of its stages.

    Attributes:
        generation: of the run before the counted ones.
        prompt_tokens: length of the prompt with its visual tokens.
        latency_ms: per stage its "median", "p90" and "n" over the counted runs.
    """

    generation: Generation
    prompt_tokens: int
    latency_ms: Mapping[str, Mapping[str, float]]

    def to_dict(self, engine: LlavaEngine) -> dict[str, Any]:
        """What the last line of `flowcut run` holds."""
        manifest = engine.manifest
        return {
            "answer": self.generation.texts[0],
            "token_ids": self.generation.token_ids[0],
            "kept": [numbers.tolist() for numbers in self.generation.kept[0]],
            "prompt_tokens": self.prompt_tokens,
            "latency_ms": {stage: dict(values) for stage, values in self.latency_ms.items()},
            "model": manifest.model,
            "weights": manifest.weights,
            "note": manifest.note,
            "tokens": manifest.tokens,
            "schedule": manifest.schedule["kind"],
            "precision": manifest.precision,
            "backend": engine.backend,
            "built_for": manifest.backend,
        }


def ask(engine: LlavaEngine, images: Sequence[Path], prompt: str, max_new_tokens: int, repeats: int) -> Answer:
    """Answer once to warm up, then up to `repeats` times for the clock."""
    first = engine.generate(list(images), prompt, max_new_tokens)
    runs: list[Generation] = []
    deadline = time.perf_counter() + PATIENCE_S
    while len(runs) < repeats and (not runs or time.perf_counter() < deadline):
        runs.append(engine.generate(list(images), prompt, max_new_tokens))
    return Answer(first, first.prompt_tokens[0], _summary(runs))


def _summary(runs: Sequence[Generation]) -> dict[str, dict[str, float]]:
    summary = {}
    for stage in STAGES:
        values = [run.latency_ms[stage] for run in runs]
        summary[stage] = {
            "median": round(float(np.median(values)), 3),
            "p90": round(float(np.percentile(values, 90)), 3),
            "n": len(values),
        }
    return summary
