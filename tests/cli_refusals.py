"""A command of the command line, run in this process, that is refused: code 1, one line, no file changed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from flowcut.cli import main

ROOT = Path(__file__).parents[1]
Refused = Callable[..., str]


class Said(NamedTuple):
    """How a command ended and what it said on stderr."""

    code: int
    message: str


def files(place: Path) -> dict[str, bytes | None]:
    """Everything below a directory, and what is in it; None for a directory."""
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in place.rglob("*")}


def run(capfd: pytest.CaptureFixture[str], *argv: object) -> Said:
    """In this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in argv])
    return Said(int(str(ended.value.code)), capfd.readouterr().err)


def one_line(stderr: str) -> str:
    """The message of a stderr that holds just one."""
    assert re.fullmatch(r"flowcut: [^\n]+\n", stderr), stderr
    return stderr.removeprefix("flowcut: ").rstrip("\n")


def refusals(place: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """refused(*argv) -> the message of a command that ends with 1, says one line and changes no file in `place`."""

    def refused(*argv: object) -> str:
        before = files(place)
        code, message = run(capfd, *argv)
        assert code == 1, message
        assert files(place) == before
        return one_line(message)

    return refused


def process(*argv: object) -> list[str]:
    """The command as a process of its own."""
    return [sys.executable, "-m", "flowcut", *map(str, argv)]


def environment(**more: str) -> dict[str, str]:
    """Of such a process: no proxy stands between it and a server on this machine."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | more
