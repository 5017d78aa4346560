"""A plan on a terminal: within 80 columns, and labelled as predicted."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from engines.plan.grids import grids, heading, ms
from engines.plan.run import Plan, PlanSettings, plan
from engines.plan.table import planned


def made(model: str = "llava-tiny", **given: Any) -> Plan:
    with Progress(disable=True) as progress:
        return plan(PlanSettings(model, **given), progress)


def printed(result: Plan) -> str:
    out = io.StringIO()
    planned(Console(file=out, width=80, highlight=False, markup=False, emoji=False), result)
    return out.getvalue()


@pytest.fixture(scope="module")
def tiny() -> Plan:
    return made(tokens=[64, 16], target_ms=0.0045)


def test_tables_fit_a_terminal_and_cut_no_cell(tiny: Plan) -> None:
    text = printed(tiny)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for gpu in ("A100", "H100", "H200", "L40S", "RTX 4090", "RTX 5090", "Jetson AGX Orin"):
        assert text.count(gpu) >= 3


def test_every_table_of_times_is_labelled_predicted(tiny: Plan) -> None:
    titles = [grid.title for grid in grids(tiny.to_dict())]
    assert titles[0] == "counted from the graphs"
    assert all(title.startswith("predicted") for title in titles[1:])
    assert "Nothing has been run" in " ".join(printed(tiny).split())


def test_a_target_names_the_gpus_that_miss_it_and_those_that_need_no_pruning(tiny: Plan) -> None:
    text = " ".join(printed(tiny).split())
    assert "most tokens within 0.0045 ms" in text
    assert "By the roofline no budget meets it on L40S, RTX 4090" in text
    assert "By the roofline even all tokens meet it on H100 SXM" in text


def test_a_heading_says_what_was_planned() -> None:
    one = made(precision="int4", batch=2, text_tokens=33, decoder_layers=2, gpu=["H100"])
    assert heading(one.to_dict()) == (
        "llava-tiny (2 of 4 decoder layers), decoder int4, vision int8, batch 2, 33 text tokens"
    )
    other = made("llava-v1.6-vicuna-7b", decoder_layers=3, gpu=["H100"], picture="640x480")
    assert heading(other.to_dict()).endswith("pictures of 640 x 480 in 5 tiles")
    assert "440, then 200" in " ".join(printed(other).split())


def test_what_does_not_fit_a_memory_is_said() -> None:
    text = " ".join(printed(made("llava-1.5-13b", tokens=[64], gpu=["4090", "H100"], decoder_layers=39)).split())
    assert "RTX 4090: weights and cache do not fit its 24 GB at 576, 64 tokens." in text
    assert "H100 SXM: weights" not in text


@pytest.mark.parametrize(("value", "text"), [(0.12345, "0.123"), (1.234, "1.23"), (99.999, "100.00"), (123.4, "123.4")])
def test_times_have_three_digits_or_so(value: float, text: str) -> None:
    assert ms(value) == text
