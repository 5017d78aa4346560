"""Builds and files hurt at every one of their steps, see tests/step_by_step.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_refusals import environment

HERE = Path(__file__).parents[1]
RACE = """
import json, os, random, sys
from pathlib import Path
import step_by_step as steps
from flowcut import atomic

root, seed, wrong = Path(sys.argv[1]), int(sys.argv[2]), []
if sys.argv[3] == "renames":
    atomic._exchange = lambda a, b: False
target = steps.prepare(root, "directory", "old")
draw = random.Random(seed)
for round in range(20):
    children = []
    for builder in range(5):
        number = draw.choice([0, draw.randrange(1, 150)])
        if child := os.fork():
            children.append(child)
            continue
        steps.by_line(number, "kill")
        steps.build("directory", target, draw.choice(["new", "next"]))
        os._exit(0)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if not set(ended) <= {0, -9}:
        wrong.append(f"ended with {ended}")
    steps.fail(target)
    if steps.found(target) not in ("old", "new", "next") or os.listdir(root) != ["target"]:
        wrong.append(f"{steps.found(target)} {os.listdir(root)} {ended}")
print(json.dumps(wrong))
"""


def python(*arguments: object) -> Any:
    """The JSON that a process prints."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hurt(root: Path, what: str, before: str, swap: str, how: str) -> dict[str, int]:
    """At each step in turn; what was at the target then, and how often."""
    found = python(HERE / "step_by_step.py", root / "place", what, before, swap, how)
    assert found["wrong"] == []
    assert found["through"] == "new"
    states: dict[str, int] = found["states"]
    return states


@pytest.mark.parametrize("swap", ["exchange", "renames"])
@pytest.mark.parametrize("before", ["nothing", "old", "leftover", "aside"])
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_build_hurt_at_any_line_leaves_the_old_directory_or_the_new_one(
    how: str, before: str, swap: str, tmp_path: Path
) -> None:
    states = hurt(tmp_path, "directory", before, swap, how)
    assert set(states) == {"nothing" if before == "nothing" else "old", "new"} | {"aside"} & set(states)
    assert sum(states.values()) > 80
    if before == "old":  # the window of a file system that cannot exchange, and nowhere else
        assert states.get("aside", 0) == (swap == "renames" and how == "kill")


@pytest.mark.parametrize("swap", ["exchange", "renames"])
@pytest.mark.parametrize("before", ["nothing", "old", "leftover", "aside"])
@pytest.mark.parametrize("how", ["EIO", "ENOSPC+", "EROFS+"])
def test_build_refused_by_the_disk_at_any_call_leaves_the_old_directory_or_the_new_one(
    how: str, before: str, swap: str, tmp_path: Path
) -> None:
    states = hurt(tmp_path, "directory", before, swap, how)
    assert {"nothing" if before == "nothing" else "old", "new"} <= set(states)


@pytest.mark.parametrize("before", ["nothing", "old", "leftover", "aside"])
@pytest.mark.parametrize("what", ["directory", "file"])
def test_writing_that_stops_anywhere_leaves_what_was_there(what: str, before: str, tmp_path: Path) -> None:
    """At the limit of a file's size: the one refusal of write(2) that a test without a disk of its own can have."""
    if (what, before) == ("file", "aside"):
        pytest.skip("files are not moved aside")
    states = hurt(tmp_path, what, before, "exchange", "EFBIG")
    assert set(states) == {"nothing" if before == "nothing" else "old"}
    assert sum(states.values()) > (50 if what == "directory" else 1)


@pytest.mark.parametrize("before", ["nothing", "old", "leftover"])
@pytest.mark.parametrize("how", ["kill", "interrupt", "EIO", "ENOSPC+"])
def test_file_hurt_at_any_step_is_the_old_one_or_the_new_one(how: str, before: str, tmp_path: Path) -> None:
    states = hurt(tmp_path, "file", before, "exchange", how)
    assert set(states) == {"nothing" if before == "nothing" else "old", "new"}


@pytest.mark.parametrize("swap", ["exchange", "renames"])
def test_builds_of_one_target_at_once_some_of_them_killed_leave_a_whole_directory(swap: str, tmp_path: Path) -> None:
    assert python("-c", RACE, tmp_path / "place", 0, swap) == []
