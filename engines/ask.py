"""One question about some pictures, answered and timed: what `flowcut run` and `make engine` show."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engines.layer_profile import LayerProfile, collect, forget_times
from engines.runtime.chat import Chat
from engines.runtime.decoding import Chunk
from engines.runtime.engine import Generation, LlavaEngine
from engines.runtime.memory import MemoryReport
from engines.runtime.pictures import Geometry
from engines.runtime.reading import pruning
from engines.runtime.sampling import GREEDY, Sampling
from flowcut.anyres import choose_tiling, image_slots
from flowcut.budget import Budget
from flowcut.chat import ChatTemplate, user
from flowcut.config import LlavaConfig
from flowcut.contract import Limits
from flowcut.errors import ConfigError, InputError
from flowcut.preprocess import open_image
from flowcut.prompt import IMAGE, PLACES, Tokenizer, batch
from flowcut.selector import selector_name

ANSWER_TOKENS = 32
STAGES = ("preprocess", "vision", "prefill", "time_to_first_token", "decode_per_token")
Summary = dict[str, float | None]
"""Of one stage."""
PATIENCE_S = 20.0
"""No further repeat starts after this long; n says how many there were."""


@dataclass(frozen=True)
class Question:
    """What to ask about which pictures, and how often for the clock.

    Attributes:
        text: a question, to be put into the model's template; or a prompt, with one `<image>` per picture.
        template: whether it is a question.
        answer_tokens: longest answer; None: 32, or what the engine allows if that is less.
        earlier: questions of the same chat that come before it, about the same pictures.
        sampling: but for max_new_tokens.
    """

    images: tuple[Path, ...]
    text: str
    answer_tokens: int | None = None
    repeats: int = 5
    template: bool = False
    earlier: tuple[str, ...] = ()
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        for name, value in (("repeats", self.repeats), ("answer_tokens", self.answer_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")

    def check(self) -> None:
        """Open the pictures and count their places: before a build of minutes, not after it.

        Raises:
            InputError: a picture that cannot be used, or a prompt with another number of places.
        """
        if not self.text.strip():
            raise InputError(f"{'question' if self.template else 'prompt'} must not be empty, got {self.text!r}.")
        for path in self.images:
            open_image(path)
        if (places := self.text.count(IMAGE) + len(self.images) * self.template) != len(self.images):
            raise InputError(
                f"prompt must have one {IMAGE} for each image ({len(self.images)}), got {places}. {PLACES}"
            )

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each picture, in pixels."""
        return [open_image(path).size for path in self.images]

    def prompt(self, template: ChatTemplate) -> str:
        """As a model takes it that has this template, without the earlier questions."""
        return template.render([user(self.text, len(self.images))]) if self.template else self.text

    def check_fits(
        self, tokenizer: Tokenizer, template: ChatTemplate, config: LlavaConfig, budget: Budget, limits: Limits
    ) -> None:
        """Raise InputError for a prompt or an answer too long for an engine that keeps so many tokens."""
        rows = Geometry(config, budget.tokens).rows([open_image(path) for path in self.images])
        encoded = tokenizer.encode(self.prompt(template), rows, image_slots(config, budget.tokens))
        batch([encoded], limits.max_prompt, pruning(config, budget, limits))
        self.new_tokens(limits.max_new_tokens)

    def new_tokens(self, limit: int) -> int:
        """Tokens to generate with an engine built for `limit`."""
        if self.answer_tokens is None:
            return min(ANSWER_TOKENS, limit)
        if self.answer_tokens > limit:
            raise InputError(
                f"answer_tokens must be at most {limit} (the engine's max_new_tokens), got {self.answer_tokens}. "
                "Ask for fewer, or rebuild the engine with --max-new-tokens."
            )
        return self.answer_tokens


@dataclass(frozen=True)
class Answer:
    """An answer and the latency of its stages.

    Attributes:
        generation: of the run before the counted ones.
        prompt_tokens: length of the prompt with its visual tokens.
        latency_ms: per stage its "median" and "p90" over the "n" counted runs that had it; None where none had, as
            "decode_per_token" of an answer that ends at its first token.
        profile: where "vision" and "language" spent the counted runs; empty unless loaded with Options.profile.
        memory: of the engine after them; None likewise.
        prompt: what was asked, with the earlier questions and their answers.
        earlier: these answers.
    """

    generation: Generation
    prompt_tokens: int
    latency_ms: Mapping[str, Summary]
    profile: Mapping[str, LayerProfile] = field(default_factory=dict)
    memory: MemoryReport | None = None
    prompt: str = ""
    earlier: tuple[str, ...] = ()

    def to_dict(self, engine: LlavaEngine, question: Question) -> dict[str, Any]:
        """What the last line of `flowcut run` holds."""
        manifest = engine.manifest
        config = manifest.geometry
        cuts = [choose_tiling(config, *size) for size in question.sizes] if config.anyres else []
        return {
            "answer": self.generation.texts[0],
            "token_ids": self.generation.token_ids[0],
            "ended": self.generation.ended[0],
            "finish": self.generation.finish[0],
            **({"earlier": list(self.earlier)} if self.earlier else {}),
            "kept": [numbers.tolist() for numbers in self.generation.kept[0]],
            **({"grids": [[tiling.rows, tiling.columns] for tiling in cuts]} if config.anyres else {}),
            "prompt_tokens": self.prompt_tokens,
            "pruned_prompt_tokens": self.generation.pruned_prompt_tokens[0],
            "latency_ms": {stage: dict(values) for stage, values in self.latency_ms.items()},
            "model": manifest.model,
            "weights": manifest.weights,
            "note": manifest.note,
            "tokens": manifest.budget.asked(config),
            "llm_tokens": manifest.llm_tokens,
            "selector": selector_name(manifest.schedule),
            "schedule": manifest.schedule["kind"],
            "precision": manifest.precision,
            "vision_precision": manifest.vision_precision,
            "backend": engine.backend,
            "built_for": manifest.backend,
            **({"profile": {graph: each.to_dict() for graph, each in self.profile.items()}} if self.profile else {}),
            **({} if self.memory is None else {"memory": self.memory.to_dict()}),
        }


def ask(engine: LlavaEngine, question: Question, show: Callable[[str], None] | None = None) -> Answer:
    """Answer once to warm up, then up to `question.repeats` times for the clock. `show` gets the first answer's text as
    it comes."""
    manifest, images = engine.manifest, list(question.images)
    sampling = replace(question.sampling, max_new_tokens=question.new_tokens(manifest.limits.max_new_tokens))
    prompt, earlier = _conversation(engine, question, sampling, show)
    if show is None:
        first = engine.generate(images, prompt, sampling)
    else:
        first = _shown(engine.stream(images, prompt, sampling), show)
    profiled = engine.options.profile
    if profiled:
        forget_times(engine.model)
    runs: list[Generation] = []
    deadline = time.perf_counter() + PATIENCE_S
    while len(runs) < question.repeats and (not runs or time.perf_counter() < deadline):
        runs.append(engine.generate(images, prompt, sampling))
    answer = Answer(first, first.prompt_tokens[0], _summary(runs), prompt=prompt, earlier=earlier)
    return replace(answer, profile=collect(engine.model), memory=engine.memory()) if profiled else answer


def _conversation(
    engine: LlavaEngine, question: Question, sampling: Sampling, show: Callable[[str], None] | None
) -> tuple[str, tuple[str, ...]]:
    """The prompt, and the answers to the earlier questions in it, shown a line each."""
    if not question.earlier:
        return question.prompt(engine.template), ()
    chat, images, answers = Chat(engine, sampling), question.images, list[str]()
    for text in question.earlier:
        answers += (chat.ask(text, images) if show is None else _shown(chat.stream(text, images), show)).texts
        if show is not None:
            show("\n")
        images = ()
    return chat.prompt(question.text)[1], tuple(answers)


def _shown(stream: Generator[Chunk, None, Generation], show: Callable[[str], None]) -> Generation:
    with closing(stream) as chunks:
        while True:
            try:
                chunk = next(chunks)
            except StopIteration as end:
                answer: Generation = end.value
                return answer
            show(chunk.text)


def _summary(runs: Sequence[Generation]) -> dict[str, Summary]:
    return {stage: _of_stage([run.latency_ms[stage] for run in runs if stage in run.latency_ms]) for stage in STAGES}


def _of_stage(values: Sequence[float]) -> Summary:
    if not values:
        return {"median": None, "p90": None, "n": 0}
    median, p90 = float(np.median(values)), float(np.percentile(values, 90))
    return {"median": round(median, 3), "p90": round(p90, 3), "n": len(values)}
