"""docs/results/llm_tokens: the page is the .json, its words hold there, and asking again gives the same answers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.progress import Progress

from engines.evaluate import make_pages
from engines.evaluate_torch import Eager
from flowcut.aliases import resolve

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SCRIPT = "llm_tokens"
AGAIN = 5
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_page_is_made_of_the_json(script: ModuleType, data: dict[str, Any]) -> None:
    assert (RESULTS / "llm_tokens.md").read_text(encoding="utf-8") == script.page(data)


def test_rows_are_of_the_same_questions(script: ModuleType, data: dict[str, Any]) -> None:
    assert {(row["n"], row["asked"]) for row in data["rows"]} == {(data["rows"][0]["n"], data["rows"][0]["asked"])}
    for row in data["rows"]:
        assert len(row["right"]) == data["scenes"] >= 100
        assert sum(map(int, row["asked"])) == row["n"]
        assert row["accuracy"] == pytest.approx(sum(map(int, row["right"])) / row["n"], abs=1e-6)
    asked = [(row["tokens"], row["llm_tokens"]) for row in data["rows"]]
    assert asked == [(144 if tokens == "all" else tokens, inside) for tokens, inside in script.BUDGETS]


def test_what_the_page_says_holds(script: ModuleType, data: dict[str, Any]) -> None:
    both, encoder, wide, one = (script.found(data, *key) for key in ((48, 16), (16,), (48,), (48, 1)))
    assert script.gain(both, encoder)[1] > 5, "more right than 16 from the encoder alone"
    assert script.gain(both, wide)[2] > -3
    assert one["accuracy"] < both["accuracy"]
    assert encoder["decoder_flops"] < both["decoder_flops"] < wide["decoder_flops"]


@pytest.mark.parametrize(("tokens", "llm_tokens"), [(48, 16), (16, None)])
def test_the_first_scenes_are_answered_as_the_json_has_it(
    script: ModuleType, data: dict[str, Any], tokens: int, llm_tokens: int | None
) -> None:
    model, pages = resolve(data["model"]), make_pages("test", AGAIN)
    again = script.measured(model, Eager.load(model), pages, tokens, llm_tokens, Progress(disable=True))
    row = script.found(data, tokens, llm_tokens)
    assert again["right"] == row["right"][:AGAIN]
    assert again["decoder_flops"] == row["decoder_flops"]
    assert data["sha256"] == model.weights.sha256
