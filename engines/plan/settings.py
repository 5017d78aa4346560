"""What to plan, as a user says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from flowcut.config import Precision, is_integer, is_number
from flowcut.errors import ConfigError

TEXT_TOKENS, NEW_TOKENS, PICTURE = 40, 128, (672, 672)
"""Defaults. LLaVA-1.5's template and a short question are about 40; no picture has more tiles than such a square."""
AS_BUILT = ("tokens", "llm_tokens", "schedule", "selector", "precision", "vision_precision", "decoder_layers")
"""What an engine directory says itself."""


@dataclass(frozen=True)
class PlanSettings:
    """Attributes:
    model: an alias, a directory as `flowcut engine` takes it, or an engine directory.
    random, seed: as `flowcut engine` has them. They change nothing: no weight is read.
    tokens: budgets, each as --tokens gives one; none: the model's default. The unpruned model is always planned too.
    llm_tokens, schedule, selector, precision, vision_precision, decoder_layers: as `flowcut engine` has them. None: its
        defaults; they and tokens must be left out for an engine directory.
    gpu: names that engines.roofline.find_gpu knows; none: all that have the precision.
    batch: prompts at once, of one picture each.
    text_tokens: of each prompt, beside its picture's.
    picture: (width, height) in pixels or "WxH": how LLaVA-NeXT cuts it. LLaVA-1.5 sees all pictures alike.
    new_tokens: of an answer, for which the cache has room.
    target_ms: find the greatest budget whose predicted vision and prefill take no longer.
    """

    model: str
    random: bool = False
    seed: int = 0
    tokens: Sequence[int | str] = ()
    llm_tokens: int | None = None
    schedule: str | None = None
    selector: str | None = None
    precision: Precision | None = None
    vision_precision: Precision | None = None
    decoder_layers: int | None = None
    gpu: Sequence[str] = ()
    batch: int = 1
    text_tokens: int = TEXT_TOKENS
    picture: tuple[int, int] | str | None = None
    new_tokens: int = NEW_TOKENS
    target_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "text_tokens", "new_tokens"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}.")
        for name in ("precision", "vision_precision"):
            if (value := getattr(self, name)) is not None and value not in get_args(Precision):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(Precision))}, got {value!r}.")
        target = self.target_ms
        if target is not None and not (is_number(target) and target > 0):
            raise ConfigError(f"target_ms must be a number above 0, got {target!r}.")
        self.size  # noqa: B018 - checked here, before anything is counted

    @property
    def size(self) -> tuple[int, int]:
        """The picture's width and height.

        Raises:
            ConfigError: not two numbers of at least 1.
        """
        given = PICTURE if self.picture is None else self.picture
        if isinstance(given, str) and (match := re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", given.strip())):
            given = (int(match[1]), int(match[2]))
        if isinstance(given, str) or len(given) != 2 or not all(is_integer(edge) and edge >= 1 for edge in given):
            raise ConfigError(f"picture must be WxH in pixels, as 640x480, got {self.picture!r}.")
        return given[0], given[1]
