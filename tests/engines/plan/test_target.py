"""The greatest budget within a time: bisection against trying all of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteCheckpoint

from engines.plan.predict import find_machines
from engines.plan.settings import PlanSettings
from engines.plan.subject import Subject, find_subject
from engines.plan.target import candidates, find_target

KINDS: tuple[dict[str, Any], ...] = ({}, {"schedule": "masked", "llm_tokens": 3})


@pytest.fixture(scope="module")
def model(checkpoint: WriteCheckpoint) -> Path:
    """25 patches."""
    return checkpoint(vision={"image": 35})


def subject(model: Path, **given: Any) -> Subject:
    return find_subject(PlanSettings(str(model), text_tokens=7, new_tokens=5, **given))


@pytest.mark.parametrize("given", KINDS, ids=["static", "masked-inside"])
def test_bisection_finds_what_trying_all_budgets_does(model: Path, given: dict[str, Any]) -> None:
    found = subject(model, **given)
    budgets = candidates(found)
    assert [budget.tokens for budget in budgets] == list(range((given.get("llm_tokens") or 0) + 1, 25))
    (machine,) = find_machines(["A100"], "fp16", "fp16")[0]
    times = [machine.total_ms(found.first_token(budget)) for budget in budgets]
    whole = machine.total_ms(found.row(found.baseline).costs)
    assert times == sorted(times)
    assert times[0] < times[-1] < whole
    looked: list[None] = []
    for target in (*times, *((a + b) / 2 for a, b in pairwise(times)), times[-1] + 1e-12):
        looked.clear()
        got = find_target(found, machine, target, lambda: looked.append(None))
        best = max(i for i, ms in enumerate(times) if ms <= target)
        assert got.met
        assert got.budget == budgets[best]
        assert got.total_ms == times[best] <= target
        assert len(looked) <= 2 + 5, "log2 of 24"


def test_when_even_all_tokens_meet_it_and_when_none_does(model: Path) -> None:
    found = subject(model)
    (machine,) = find_machines(["A100"], "fp16", "fp16")[0]
    whole, least = (machine.total_ms(found.row(budget).costs) for budget in (found.baseline, candidates(found)[0]))
    got = find_target(found, machine, whole, lambda: None)
    assert (got.met, got.to_dict()["tokens"], got.verdict) == (True, 25, "even all tokens meet it, by the roofline")
    got = find_target(found, machine, least * 0.999, lambda: None)
    assert (got.met, got.to_dict()["tokens"], got.verdict) == (False, None, "no budget meets it, by the roofline")
    assert got.total_ms == least


def test_of_llava_next_budgets_are_even() -> None:
    found = find_subject(PlanSettings("llava-v1.6-vicuna-7b", decoder_layers=3))
    budgets = candidates(found)
    assert [budget.llm_tokens for budget in budgets] == list(range(2, 1151, 2))
    assert all(budget.tokens * 2 == budget.llm_tokens for budget in budgets)
