"""Real builds over an engine directory, killed or refused by the disk at random moments."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
from cli_refusals import ROOT, environment, files
from faults import FAULTS
from rich.progress import Progress

from engines import pipeline
from engines.runtime.engine import load_engine
from flowcut.artifacts import check_files, read_manifest
from flowcut.deps import available
from flowcut.errors import ConfigError, EngineError

RTX = available("tensorrt_rtx")
OLD, NEW = 8, 16
"""Tokens kept, which tell the directories apart."""
Way = Literal["fault", "signal", "two", "rtx"]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def command(target: Path, tokens: int, backend: str = "ort") -> list[str]:
    return ["engine", "llava-tiny", "--backend", backend, "--tokens", str(tokens), "--out", str(target)]


def start(*arguments: object) -> subprocess.Popen[str]:
    """A process in a group of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def start_hurt(target: Path, number: int, how: str) -> subprocess.Popen[str]:
    """A build with a fault at its `number`-th step on the disk, or only counted."""
    return start(ROOT / "tests" / "faults.py", target.parent, number, how, *command(target, NEW))


def ended(build: subprocess.Popen[str], killed: bool) -> int:
    """How a build ended, which has to be well: done, refused in one line, or killed where that may be."""
    _, stderr = build.communicate(timeout=300)
    if killed and build.returncode == -signal.SIGINT:  # while Python itself was starting
        return build.returncode
    assert "Traceback" not in stderr, stderr
    assert build.returncode in (0, 1, *([-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT] * killed)), stderr
    if build.returncode == 1:
        assert stderr.splitlines()[-1].startswith("flowcut: "), stderr
    return build.returncode


def steps_of(target: Path) -> int:
    """On the disk, of a build that replaces what is at `target`."""
    stdout, stderr = start_hurt(target, 0, "kill").communicate(timeout=300)
    assert stderr == "" or "flowcut:" not in stderr, stderr
    return int(stdout.splitlines()[-1])


def state(target: Path, old: dict[str, bytes | None], load: bool) -> str:
    """old, or new and complete: anything else fails."""
    if (now := files(target)) == old:
        return "old"
    manifest = read_manifest(target)
    assert check_files(target, manifest) == [], sorted(now)
    assert manifest.tokens == NEW
    if load:
        assert load_engine(target, "ort", threads=1).manifest == manifest
    return "new"


def run_signal(target: Path, draw: random.Random, backend: str, begun: str) -> dict[int, int]:
    """A signal at any time, or soon after a file of that name begins to grow."""
    build = start("-m", "flowcut", *command(target, NEW, backend))
    delay = draw.uniform(0, 1.5)
    if begun:
        while build.poll() is None and not list(target.parent.glob(f".{target.name}.*.partial/{begun}")):
            time.sleep(0.005)
        delay = draw.uniform(0, 4 if backend == "rtx" else 0.3)
    try:
        build.wait(delay)
    except subprocess.TimeoutExpired:
        build.send_signal(draw.choice(SIGNALS))
    return {build.pid: ended(build, killed=True)}


def run_round(way: Way, target: Path, steps: int, draw: random.Random) -> dict[int, int]:
    """One build or two, by their processes, and how they ended."""
    if way == "signal":
        return run_signal(target, draw, "ort", draw.choice(["", "vision.onnx.data", "language.onnx.data"]))
    if way == "rtx":
        return run_signal(target, draw, "rtx", draw.choice(["vision.onnx", "vision.engine"]))
    if way == "two":
        faults = [(draw.randrange(1, 2 * steps), "kill") for _ in range(2)]
    else:
        faults = [(draw.randrange(1, steps + 1), draw.choice(FAULTS))]
    builds = [start_hurt(target, number, how) for number, how in faults]
    return {build.pid: ended(build, killed=how == "kill") for build, (_, how) in zip(builds, faults, strict=True)}


def kill_builds(root: Path, count: int, seed: int, rtx_every: int) -> Counter[str]:
    """`count` builds hurt at random moments; how often the old directory stood there afterwards and how often the new.

    Args:
        rtx_every: one round in so many is compiled by TensorRT-RTX, in a process of its own; 0 for none.
    """
    target, draw, states = root / "engine", random.Random(seed), Counter[str]()
    assert ended(start("-m", "flowcut", *command(target, OLD)), killed=False) == 0
    old, steps = files(target), steps_of(target)
    for number in range(count):
        ways: list[Way] = ["fault", "fault", "signal", "two"]
        way: Way = "rtx" if RTX and rtx_every and number % rtx_every == 1 else draw.choice(ways)
        restore(target, old)
        codes = run_round(way, target, steps, draw)
        states[state(target, old, load=number % 4 == 0)] += 1
        if list(codes.values()) == [0]:
            assert names(root) == ["engine"], way
        for process, code in codes.items():
            assert code < 0 or not list(root.glob(f".*.{process}.*")), f"{way}: {code}, left {names(root)}"
    assert ended(start("-m", "flowcut", *command(target, NEW)), killed=False) == 0
    assert names(root) == ["engine"]
    return states


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def restore(target: Path, old: dict[str, bytes | None]) -> None:
    """What stood there first, if it is not there still."""
    if files(target) != old:
        for path in target.iterdir():
            path.unlink()
        for name, content in old.items():
            assert content is not None
            (target / name).write_bytes(content)


def test_builds_hurt_at_random_moments_leave_the_old_directory_or_the_new_one(tmp_path: Path) -> None:
    states = kill_builds(tmp_path, count=12, seed=1, rtx_every=0)
    assert set(states) == {"old", "new"}


@pytest.mark.soak
def test_200_builds_hurt_at_random_moments_leave_the_old_directory_or_the_new_one(tmp_path: Path) -> None:
    states = kill_builds(tmp_path, count=200, seed=2, rtx_every=10)
    assert set(states) == {"old", "new"}


def test_leftovers_are_gone_before_the_free_space_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be what fills the disk."""
    (tmp_path / ".engine.4000000.0a1b2c3d.partial").mkdir()
    (tmp_path / ".another.4000000.0a1b2c3d.partial").mkdir()

    def check_space(*_: object) -> None:
        raise EngineError(f"measured beside {names(tmp_path)}")

    monkeypatch.setattr(pipeline, "check_space", check_space)
    with pytest.raises(EngineError, match=r"measured beside \[\]"):
        pipeline.build_directory(
            pipeline.BuildSettings("llava-tiny", backend="ort", out=tmp_path / "engine"), Progress()
        )


def test_build_that_fails_at_once_brings_back_what_a_killed_one_had_moved_aside(tmp_path: Path) -> None:
    (tmp_path / ".engine.4000000.0a1b2c3d.old").mkdir()
    (tmp_path / ".engine.4000000.0a1b2c3d.old" / "text").write_text("old")
    with pytest.raises(ConfigError):
        pipeline.build_directory(
            pipeline.BuildSettings(str(tmp_path / "absent"), backend="ort", out=tmp_path / "engine"), Progress()
        )
    assert files(tmp_path) == {"engine": None, "engine/text": b"old"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_child_that_reads_nothing_dies_with_its_parent() -> None:
    """As a compiler that holds Python's lock for minutes, in which no thread sees the pipe end."""
    child = (
        "from engines.child import die_with_parent; import time; die_with_parent(); "
        "print('ready', flush=True); time.sleep(60); print('outlived its parent')"
    )
    parent = start("-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    stdout, _ = parent.communicate()  # both write to it: its end is the child's
    assert stdout == ""


@pytest.mark.skipif(not RTX, reason="needs the rtx extra (tensorrt-rtx-cu13)")
def test_compiler_process_dies_with_a_killed_build_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    build = start("-m", "flowcut", *command(target, NEW, "rtx"))
    children = Path(f"/proc/{build.pid}/task/{build.pid}/children")
    while not (compilers := children.read_text().split()):
        assert build.poll() is None, build.communicate()[1]
        time.sleep(0.02)
    build.kill()
    assert ended(build, killed=True) == -signal.SIGKILL
    while alive(int(compilers[0])):  # a hang here is what fails
        time.sleep(0.02)
    assert len(names(tmp_path)) == 1
    assert ended(start("-m", "flowcut", *command(target, OLD)), killed=False) == 0
    assert names(tmp_path) == ["engine"]


def alive(process: int) -> bool:
    """Not gone, nor dead and waiting for somebody to ask how it ended."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
