"""`python step_by_step.py ROOT WHAT BEFORE SWAP HOW`: a small build, begun again and again, hurt one step later each
time, until it gets through. Prints what was found as JSON. A process of its own, as it forks for each step.

WHAT   directory or file
BEFORE what is there: nothing; old; leftover, beside old; aside, where old was moved by a killed build
SWAP   exchange, or renames as on a file system that cannot exchange
HOW    kill, at each line that flowcut/atomic.py and shutil.py execute; interrupt, in the former only, as shutil's
       rmtree may turn one into an OSError; EFBIG, writing more and more until nothing is cut short; or the name of
       an error of the disk, at each call of faults.STEPS, with a + at all that follow too
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import faults

from flowcut import atomic
from flowcut.errors import EngineError

SOURCES = {"kill": {atomic.__file__, shutil.__file__}, "interrupt": {atomic.__file__}}
WELL, REFUSED, INTERRUPTED, UNHURT, WRONG = 0, 1, 2, 3, 4
"""How a build may end, beside killed."""
KILLED = 4_000_000
"""The process that left what `prepare` leaves."""


def content(text: str) -> dict[str, str]:
    return {"graph": text, "weights": text * 1000}


def fill(directory: Path, text: str) -> None:
    for name, written in content(text).items():
        (directory / name).write_text(written)


def anything(target: Path) -> None:
    """The check that lets everything be replaced."""


def build(what: str, target: Path, text: str) -> None:
    if what == "file":
        atomic.write_file(target, text.encode())
        return
    with atomic.replacing(target, anything) as directory:
        fill(directory, text)


def fail(target: Path) -> None:
    """The next build, which does not get far."""
    try:
        with atomic.replacing(target, anything):
            raise RuntimeError
    except RuntimeError:
        pass


def found(path: Path) -> str:
    """What is there: old, new, next, nothing, or what else."""
    if not os.path.lexists(path):
        return "nothing"
    if path.is_file():
        return path.read_text()
    here = {p.name: p.read_text() for p in path.iterdir()}
    return next((text for text in ("old", "new", "next") if here == content(text)), f"half: {sorted(here)}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def prepare(root: Path, what: str, before: str) -> Path:
    """A fresh folder with what was there before; returns the target in it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    target = root / "target"
    if before != "nothing":
        build(what, target, "old")
    if before == "leftover":
        fill_leftover(root / f".target.{KILLED}.0a1b2c3d.partial", what)
        fill_leftover(root / f".another.{KILLED}.0a1b2c3d.partial", what)
    if before == "aside":
        target.rename(root / f".target.{KILLED}.0a1b2c3d.old")
        fill_leftover(root / f".target.{KILLED}.0a1b2c3d.partial", what)
    return target


def fill_leftover(path: Path, what: str) -> None:
    if what == "file":
        path.write_text("half")
    else:
        path.mkdir()
        fill(path, "new")


def by_line(number: int, how: str) -> Callable[[], int]:
    """As faults.install, at lines."""
    count = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == number:
                faults.happen(how, None)
        return local

    def traced(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        return local if code.co_filename in SOURCES[how] or code is Path.write_bytes.__code__ else None

    sys.settrace(traced)
    return lambda: count


def by_size(number: int) -> Callable[[], int]:
    """As faults.install: files may hold a few bytes, with each number more, which write(2) writes before it fails."""
    most = (number - 1) ** 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return lambda: 0


def hurt(what: str, target: Path, number: int, how: str) -> int:
    """Build `new` in a process of its own, and how it ended; negative where killed."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = WRONG
    try:
        if how in SOURCES:
            steps = by_line(number, how)
        elif how == "EFBIG":
            steps = by_size(number)
        else:
            steps = faults.install(target.parent, number, how.rstrip("+"), lasting=how.endswith("+"), sync=False)
        build(what, target, "new")
        code = WELL if steps() >= number else UNHURT
    except KeyboardInterrupt:
        code = INTERRUPTED
    except EngineError as error:
        code = WRONG if "\n" in str(error) else REFUSED
    finally:
        os._exit(code)


def problems(what: str, before: str, swap: str, how: str, target: Path, ended: int) -> tuple[str, list[str]]:
    """What is at the target now, and what of it may not be."""
    state, start = found(target), "nothing" if before == "nothing" else "old"
    aside = [found(path) for path in target.parent.glob(".target.*.old")]
    wrong = []
    if state == "nothing" and aside == ["old"] and (before == "aside" or swap == "renames"):
        state = "aside"
    if state not in (start, "new", *(["aside"] * (start == "old"))) or (ended == WELL and state != "new"):
        wrong.append(f"{state}, aside {aside}")
    if ended not in {"kill": (-signal.SIGKILL,), "interrupt": (INTERRUPTED,)}.get(how, (WELL, REFUSED)):
        wrong.append(f"ended with {ended}")
    own = [name for name in names(target.parent) if name.endswith(".partial") and f".{KILLED}." not in name]
    if own and ended >= 0 and not how.endswith("+"):  # a disk that lasts in refusing lets nothing be removed
        wrong.append(f"ended with {ended} and left {own}")
    if what == "directory":
        fail(target)
        if found(target) not in ((start, "new") if state == "aside" else (state,)):
            wrong.append(f"{state}, and after a build that failed {found(target)}")
        if (left := names(target.parent)) not in ([], ["target"]):
            wrong.append(f"left behind: {left}")
    build(what, target, "next")
    if found(target) != "next" or (left := names(target.parent)) != ["target"]:
        wrong.append(f"after the next build: {found(target)}, {left}")
    return state, wrong


def main(root: Path, what: str, before: str, swap: str, how: str) -> None:
    if swap == "renames":
        atomic._exchange = lambda a, b: False
    states, wrong = Counter[str](), []
    for number in range(1, 10_000):
        target = prepare(root, what, before)
        ended = hurt(what, target, number, how)
        if ended == UNHURT:
            break
        state, problem = problems(what, before, swap, how, target, ended)
        states[state] += 1
        wrong += [f"step {number}: {line}" for line in problem]
    print(json.dumps({"states": states, "wrong": wrong, "through": found(target)}))


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # only a power cut would tell
    main(Path(sys.argv[1]), *sys.argv[2:])
