"""How the next token is chosen, and when an answer ends: for each prompt of a batch on its own.

Settings mean what they mean to `generate` of transformers, whose processors come in this order: repetition penalty,
temperature, top-k, top-p. Logits are of every token, so a step's work grows with the vocabulary alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flowcut.config import is_integer, is_number
from flowcut.errors import ConfigError, EngineError, TooLarge

NEW_TOKENS = 64
STRONGEST = 1e6
"""Repetition penalty, and one over the weakest: far beyond use, and logits stay finite in float32."""


@dataclass(frozen=True)
class Sampling:
    """What `generate` of transformers calls by the same names, but for temperature and stop.

    Attributes:
        max_new_tokens: longest answer; None: 64, or what the engine was built for if that is less.
        temperature: what logits are divided by before a token is drawn; 0 takes the likeliest, whatever top_k, top_p
            and seed say.
        top_k: draw among the k likeliest and those as likely as the k-th; None: among all.
        top_p: draw among the fewest likeliest tokens whose probabilities add up to this; 1: among all.
        repetition_penalty: 1e-6 to 1e6; what the positive logits of tokens in prompt or answer are divided by, and the
            negative multiplied; above 1 such tokens get rarer, with temperature 0 too. Visual tokens count as the image
            token.
        seed: of the draws: equal requests with equal seeds draw alike, alone or in a batch. None: unlike every time.
        stop: strings at the first of which an answer ends, without it; a single one may be given as it is. The tokens
            that make the string are among the answer's token_ids, as they are with transformers' stop_strings.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 1), ("seed", 0)):
            object.__setattr__(self, name, _integer(name, getattr(self, name), least))
        for name, (fits, rule) in _NUMBERS.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), fits, rule))
        stop = self.stop if isinstance(self.stop, list | tuple) else (self.stop,)
        if not all(isinstance(text, str) and text for text in stop):
            raise ConfigError(f"stop must be strings of at least one character, got {self.stop!r}.")
        object.__setattr__(self, "stop", tuple(stop))

    def within(self, limit: int) -> Sampling:
        """The same with a number for max_new_tokens, of an engine built for at most `limit`.

        Raises:
            TooLarge: it asks for more.
        """
        if self.max_new_tokens is None:
            return replace(self, max_new_tokens=min(NEW_TOKENS, limit))
        if self.max_new_tokens > limit:
            raise TooLarge(
                f"max_new_tokens must be in 1..{limit} (the engine's limit), got {self.max_new_tokens!r}. Ask for "
                f"fewer, or rebuild the engine with --max-new-tokens {self.max_new_tokens}."
            )
        return self


_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: x >= 0, "at least 0"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "repetition_penalty": (lambda x: 1 / STRONGEST <= x <= STRONGEST, f"from {1 / STRONGEST:g} to {STRONGEST:g}"),
}
"""What each must be."""


class Sampler:
    """The choices for one prompt.

    Args:
        prompt_ids: the prompt's tokens, visual ones as image_token_id.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] | NDArray[np.int64]) -> None:
        self._sampling = sampling
        self._seen = np.unique(np.asarray(prompt_ids, np.int64)) if sampling.repetition_penalty != 1 else None
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature else None

    def next(self, logits: NDArray[np.float32]) -> int:
        """The next token, from its logits [vocab].

        Raises:
            EngineError: logits that are not numbers.
        """
        scores = logits if self._seen is None else penalized(logits, self._seen, self._sampling.repetition_penalty)
        token = int(np.argmax(scores))  # NaN counts as the greatest
        if not math.isfinite(scores[token]):
            raise EngineError(
                f"logits must be numbers to choose a token from, got {scores[token]} for token {token}. If other "
                "pictures and prompts give the same, build the engine in another precision."
            )
        if self._random is not None:
            token = self._draw(scores, self._random)
        if self._seen is not None:
            self._seen = np.union1d(self._seen, token)
        return token

    def _draw(self, scores: NDArray[np.float32], random: np.random.Generator) -> int:
        """By the inverse of the cumulative distribution: what rounding differs by hardly ever changes a token."""
        tokens, shares = distribution(scores, self._sampling)
        sums = np.cumsum(shares)
        place = np.searchsorted(sums, random.random() * sums[-1], side="right")
        return int(tokens[min(int(place), len(tokens) - 1)])


def penalized(logits: NDArray[np.float32], seen: NDArray[np.int64], penalty: float) -> NDArray[np.float32]:
    """A copy whose logits of `seen` tokens count for less; in float32 as in transformers, for the same argmax."""
    scores, by = logits.astype(np.float32), np.float32(penalty)
    old = scores[seen]
    scores[seen] = np.where(old < 0, old * by, old / by)
    return scores


def distribution(scores: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What is drawn from: tokens [n], ascending, and their probabilities.

    Args:
        scores: [vocab] behind the penalty; the greatest is finite.
    """
    tokens = np.arange(len(scores))
    if sampling.top_k is not None and sampling.top_k < len(scores):
        tokens = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
    shares = _softmax(scores[tokens].astype(np.float64), sampling.temperature)
    if sampling.top_p < 1:
        kept = _nucleus(shares, sampling.top_p)
        tokens, shares = tokens[kept], shares[kept] / shares[kept].sum()
    return tokens, shares


def _softmax(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """The greatest is subtracted before the division, which a tiny temperature would take to infinity."""
    with np.errstate(over="ignore"):
        shares = np.exp((scores - scores.max()) / temperature)
    result: NDArray[np.float64] = shares / shares.sum()
    return result


def _nucleus(shares: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Places of the fewest greatest shares that add up to at least top_p, ascending.

    What is so small that all of it together cannot matter is left out before sorting, which is most of a vocabulary.
    """
    large = np.flatnonzero(shares >= min((1 - top_p) / len(shares), shares.max()))
    order = large[np.argsort(shares[large], kind="stable")]
    small = shares.sum() - shares[order].sum()
    dropped = small + np.cumsum(shares[order]) <= 1 - top_p
    dropped[-1:] = False
    return np.sort(order[~dropped])


def _integer(name: str, value: object, least: int) -> int | None:
    whole = value.item() if isinstance(value, np.integer) else value
    if whole is not None and not (is_integer(whole) and whole >= least):
        raise ConfigError(f"{name} must be at least {least} or None, got {value!r}.")
    return whole


def _number(name: str, value: object, fits: Callable[[float], bool], rule: str) -> float:
    if not is_number(value) or not fits(float(value)):
        raise ConfigError(f"{name} must be a number {rule}, got {value!r}.")
    return float(value)


GREEDY = Sampling()
