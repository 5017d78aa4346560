"""The greatest budget whose roofline meets a target, as a measured time need not: bisection over counted graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engines.plan.predict import Machine
from engines.plan.subject import Subject
from flowcut.budget import Budget, make_budget
from flowcut.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """What was found: `budget` is the greatest that meets it, or the least there is where none does; `tokens` is what
    --tokens calls it."""

    budget: Budget
    tokens: int
    total_ms: float
    met: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "met": self.met,
            "tokens": self.tokens if self.met else None,
            "total_ms": self.total_ms,
            "verdict": self.verdict,
        }


def candidates(subject: Subject) -> list[Budget]:
    """All budgets that prune, the smallest first: with the decoder's budget where one was given."""
    config, kept = subject.config, subject.settings.llm_tokens
    if config.anyres:
        return [make_budget(config, 2 * each) for each in range(1, config.vision.patches)]
    return [make_budget(config, each, "", kept) for each in range((kept or 0) + 1, config.vision.patches)]


def find_target(subject: Subject, machine: Machine, target_ms: float, counted: Callable[[], None]) -> Target:
    """By the roofline of vision and prefill.

    Args:
        counted: called after each budget that was looked at.
    """

    def total_ms(budget: Budget) -> float:
        found = machine.total_ms(subject.first_token(budget))
        counted()
        return found

    if total_ms(subject.baseline) <= target_ms:
        return _target(subject, machine, subject.baseline, True, "even all tokens meet it, by the roofline")
    budgets = candidates(subject)
    if not budgets:
        raise ConfigError(f"target_ms needs a model with budgets to choose from, got {subject.name}.")
    if total_ms(budgets[0]) > target_ms:
        return _target(subject, machine, budgets[0], False, "no budget meets it, by the roofline")
    best = budgets[_last(budgets, lambda budget: total_ms(budget) <= target_ms)]
    return _target(subject, machine, best, True, "the greatest budget that meets it, by the roofline")


def _last(budgets: Sequence[Budget], meets: Callable[[Budget], bool]) -> int:
    """Index of the last that meets, where the first does and all after one that does not do not."""
    low, high = 0, len(budgets)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(budgets[middle]) else (low, middle)
    return low


def _target(subject: Subject, machine: Machine, budget: Budget, met: bool, verdict: str) -> Target:
    total_ms = machine.total_ms(subject.first_token(budget))
    return Target(budget, budget.asked(subject.config), total_ms, met, verdict)
