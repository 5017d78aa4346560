"""docs/runtime.md: its examples print what it says, and its tables are complete."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import write_engine

from engines.options import Options
from engines.runtime.sampling import Sampling
from flowcut import errors
from flowcut.contract import Limits

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"## ([^\n]+)\n\n```python\n(.+?)```", PAGE, re.DOTALL))
ENGINE = "build/llava-tiny-16-fp16-rtx"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples take from a checkout after `make engine`, compiled files left out."""
    place = tmp_path_factory.mktemp("checkout")
    (place / "build").mkdir()
    write_engine(place / ENGINE, precision="fp16", limits=Limits(4, 4, 16 + 192, 128))
    (place / "flowcut").symlink_to(ROOT / "flowcut")
    return place


def test_there_are_the_five_examples() -> None:
    assert list(EXAMPLES) == ["One question", "A batch", "Streaming", "Threads", "Chat"]
    assert PAGE.count("```python") == 5


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    code, told = EXAMPLES[name], io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(code, name, "exec"), {})
    expected = [line.rpartition("# ")[2] for line in code.splitlines() if "# " in line]
    assert expected
    assert told.getvalue().splitlines() == expected


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its first two lines."""
    lines = re.search(rf"## {heading}\n(.+?)(?:\n## |\Z)", PAGE, re.DOTALL)
    assert lines is not None
    table = [line for line in lines[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_option_is_listed_with_its_default() -> None:
    expected: list[list[Any]] = [[f"`{field.name}`", f"`{field.default}`"] for field in fields(Options)]
    assert [row[:2] for row in rows("Options")] == expected


def test_every_setting_of_an_answer_is_listed() -> None:
    listed = re.findall("`([a-z_]+)`", " ".join(row[0] for row in rows("A batch")))
    assert sorted(listed) == sorted(field.name for field in fields(Sampling))


def test_every_error_is_one_of_ours() -> None:
    named = re.findall(r"`(\w+)`", " ".join(" ".join(row) for row in rows("Errors")))
    assert all(issubclass(getattr(errors, name), errors.FlowCutError) for name in named)
    assert len(set(named)) >= 8
