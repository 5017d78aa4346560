"""From answers to accuracies, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flowcut.tiny.questions import KINDS, Kind

Interval = tuple[float, float]
Z = 1.959963984540054  # 95% of a normal distribution lies within so many standard deviations
RESAMPLES = 2000


@dataclass(frozen=True)
class Answered:
    """One question, the word that answers it, and what was answered, without the spaces around it."""

    scene: int
    kind: Kind
    question: str
    answer: str
    got: str
    selector: str

    @property
    def right(self) -> bool:
        return self.got == self.answer

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "right": self.right}


@dataclass(frozen=True)
class Score:
    """Share of right answers to n questions, and where with 95% confidence it lies."""

    accuracy: float
    n: int
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {"accuracy": round(self.accuracy, 6), "n": self.n, "interval": [round(low, 6), round(high, 6)]}


def overall(answers: Sequence[Answered]) -> Score:
    """All questions. A selector of several seeds answers each question several times: the mean, and still n questions.

    The questions about one scene are not independent of each other, the scenes are: hence `bootstrap`.
    """
    return Score(_accuracy(answers), _questions(answers), bootstrap(answers))


def by_kind(answers: Sequence[Answered]) -> dict[Kind, Score]:
    """Each kind of question that was asked, with Wilson's interval: a scene has one question of a kind."""
    scores = {}
    for kind in KINDS:
        if some := [answer for answer in answers if answer.kind == kind]:
            share, n = _accuracy(some), _questions(some)
            scores[kind] = Score(share, n, wilson(share, n))
    return scores


def by_selector(answers: Sequence[Answered]) -> dict[str, float]:
    """Accuracy of each, in the order in which they were asked."""
    names = dict.fromkeys(answer.selector for answer in answers)
    return {name: _accuracy([a for a in answers if a.selector == name]) for name in names}


def wilson(share: float, n: int) -> Interval:
    """Wilson's 95% interval for a share of n independent trials."""
    middle, square = share + Z * Z / (2 * n), Z * Z / n
    half = Z * math.sqrt(share * (1 - share) / n + square / (4 * n))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def bootstrap(answers: Sequence[Answered], seed: int = 0) -> Interval:
    """The middle 95% of accuracies over RESAMPLES draws of as many scenes, with replacement, as there are.

    Where every scene has the same share of right answers, every draw is equal; then it is Wilson's interval with the
    scenes as trials.
    """
    scenes, rows = np.unique([answer.scene for answer in answers], return_inverse=True)
    asked = np.bincount(rows)
    right = np.bincount(rows, weights=[answer.right for answer in answers])
    if len(set((right / asked).tolist())) == 1:
        return wilson(float(right.sum() / asked.sum()), len(scenes))
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = (rng.integers(len(scenes), size=len(scenes)) for _ in range(RESAMPLES))
    low, high = np.percentile([right[rows].sum() / asked[rows].sum() for rows in drawn], (2.5, 97.5))
    return float(low), float(high)


def _accuracy(answers: Sequence[Answered]) -> float:
    return sum(answer.right for answer in answers) / len(answers)


def _questions(answers: Sequence[Answered]) -> int:
    """Questions, however many selectors each was asked with."""
    return len({(answer.scene, answer.kind, answer.question) for answer in answers})
