"""What --tokens and --llm-tokens mean for both families."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowcut.aliases import ASSETS
from flowcut.budget import Budget, make_budget
from flowcut.config import LlavaConfig
from flowcut.errors import ConfigError

OLD = LlavaConfig.from_file(ASSETS / "llava-1.5-7b" / "config.json")
NEXT = LlavaConfig.from_file(ASSETS / "llava-v1.6-vicuna-7b" / "config.json")
LONE = replace(NEXT, grid_pinpoints=())
LARGE = replace(NEXT, grid_pinpoints=((2016, 2016),))  # 37 tiles


@pytest.mark.parametrize(
    ("config", "tokens", "llm_tokens", "budget", "label"),
    [
        (OLD, None, None, Budget(64), "64"),
        (OLD, "all", None, Budget(576), "576"),
        (OLD, 192, 64, Budget(192, 64), "192to64"),
        (OLD, "all", 575, Budget(576, 575), "576to575"),
        (NEXT, None, None, Budget(80, 160), "160"),
        (NEXT, 160, None, Budget(80, 160), "160"),
        (NEXT, 2, None, Budget(1, 2), "2"),
        (NEXT, 1150, None, Budget(575, 1150), "1150"),
        (NEXT, "all", None, Budget(576), "2880"),
        (LONE, None, None, Budget(16, 32), "32"),
        (LONE, "all", None, Budget(576), "576"),
        (LARGE, None, None, Budget(575, 1150), "1150"),  # 5.6% of their patches would be more than half of a tile's
    ],
)
def test_budget_and_its_name(
    config: LlavaConfig, tokens: Any, llm_tokens: int | None, budget: Budget, label: str
) -> None:
    assert make_budget(config, tokens, "", llm_tokens) == budget
    assert budget.label(config) == label
    assert budget.asked(config) == int(label.partition("to")[0])
    assert tokens in (None, "all", budget.asked(config))


def test_a_schedule_file_is_of_a_tile(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"kind": "adaptive", "patches": 576, "tokens": 40, "counts": []}), encoding="utf-8")
    assert make_budget(NEXT, None, str(path)) == Budget(40, 80)
    assert make_budget(OLD, None, str(path)) == Budget(40)
    assert make_budget(OLD, None, str(path), 10) == Budget(40, 10)


@pytest.mark.parametrize(
    ("config", "tokens", "llm_tokens", "message"),
    [
        (NEXT, 161, None, r"tokens must be even and in 2\.\.1150 for LLaVA-NeXT .*576 patches\), or 'all', got 161\."),
        (NEXT, 0, None, "got 0"),
        (NEXT, 1, None, "got 1"),
        (NEXT, -2, None, "got -2"),
        (NEXT, 1152, None, "got 1152"),
        (NEXT, True, None, "got True"),
        (NEXT, 2.0, None, r"got 2\.0"),
        (NEXT, 160, 80, r"llm_tokens must not be given for LLaVA-NeXT, got 80\."),
        (NEXT, "all", 80, r"llm_tokens must not be given for LLaVA-NeXT, got 80\."),
        (OLD, 64, 64, r"llm_tokens must be in 1\.\.63 \(fewer than the 64 tokens .*got 64\."),
        (OLD, 64, 0, r"llm_tokens must be in 1\.\.63 .*got 0\."),
        (OLD, 64, True, "got True"),
        (OLD, 577, 8, r"tokens must be in 1\.\.576"),
        (OLD, 0, None, r"tokens must be in 1\.\.576 .*got 0\."),
        (OLD, "x", None, r"tokens must be an integer or 'all', got 'x'\."),
        (OLD, 2.5, None, r"tokens must be an integer or 'all', got 2\.5\."),
        (NEXT, "x", None, r"tokens must be even .* or 'all', got 'x'\."),
    ],
)
def test_refuses_in_one_line(config: LlavaConfig, tokens: Any, llm_tokens: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make_budget(config, tokens, "", llm_tokens)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tokens", "llm_tokens", "message"),
    [
        (-3, 900, r"^tokens must be an integer of at least 1, got -3\."),
        (0, None, "^tokens .*got 0"),
        (True, None, "^tokens .*got True"),
        (None, None, "^tokens .*got None"),
        (1.5, None, r"^tokens .*got 1\.5"),
        (8, 0, r"^llm_tokens must be an integer of at least 1, got 0\."),
        (8, "all", "^llm_tokens .*got 'all'"),
    ],
)
def test_no_budget_is_made_of_nonsense(tokens: Any, llm_tokens: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(tokens, llm_tokens)


def test_a_decoder_needs_a_layer_behind_the_pruning() -> None:
    old, new = (replace(config, text=replace(config.text, num_hidden_layers=2)) for config in (OLD, NEXT))
    for arguments in ((old, 64, "", 16), (new, 160)):
        with pytest.raises(ConfigError, match=r"decoder_layers must be at least 3 .*, got 2\."):
            make_budget(*arguments)
    assert make_budget(old, 64) == Budget(64)
    assert make_budget(new, "all") == Budget(576)
