"""Full disks, file size limits, signals and a Hub that does not answer: one line, exit code 1, nothing left behind.

Signals, limits and the Hub (whose client reads its settings when imported) need processes of their own.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_refusals import Refused, environment, files, one_line, process, refusals

from flowcut.deps import available

RTX = pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusals(place, capfd)


@pytest.fixture
def small_disk(place: Path) -> Iterator[Callable[..., Path]]:
    """small_disk(bytes, read_only=False) -> an empty file system of that size."""
    disk = place / "disk"
    disk.mkdir()

    def mount(size: int, read_only: bool = False) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}{',ro' * read_only}", "flowcut", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a small disk is not allowed here: {done.stderr.strip()}")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


def test_little_space_is_refused_before_the_export(small_disk: Callable[..., Path], refused: Refused) -> None:
    message = refused("engine", "llava-tiny", "--backend", "ort", "--out", small_disk(1 << 20) / "engine")
    assert re.search(
        r"free space for .*/disk/engine must be at least 13\.\d MB, got 1\.0 MB\. Free some space", message
    )


@pytest.mark.parametrize(
    ("backend", "size"), [("ort", 2 << 20), pytest.param("rtx", 12 << 20, marks=RTX)], ids=["export", "compile"]
)
def test_disk_that_fills_up_is_left_empty(
    backend: str, size: int, small_disk: Callable[..., Path], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.pipeline.check_space", lambda *_: None)  # others may take what was free
    disk = small_disk(size)
    message = refused("engine", "llava-tiny", "--backend", backend, "--out", disk / "engine")
    assert re.search(r"/disk/.*(could not write|must be writable, got: )?.*No space left on device", message)
    assert list(disk.iterdir()) == []


def test_read_only_disk_is_refused(small_disk: Callable[..., Path], refused: Refused) -> None:
    disk = small_disk(200 << 20, read_only=True)
    assert re.search(
        r"must be writable, got: Read-only file system .* on a writable disk",
        refused("engine", "llava-tiny", "--backend", "ort", "--out", disk / "engine"),
    )
    assert "Read-only file system" in refused("prune", "llava-tiny", "--out", disk / "kept.npz")


@pytest.mark.parametrize(
    ("backend", "limit"), [("ort", 2 << 20), pytest.param("rtx", 12 << 20, marks=RTX)], ids=["export", "compile"]
)
def test_file_size_limit_leaves_nothing_behind(backend: str, limit: int, place: Path) -> None:
    before = files(place)
    done = subprocess.run(
        process("engine", "llava-tiny", "--backend", backend, "--out", "engine"),
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert re.search("File too large", one_line(done.stderr))
    assert files(place) == before


def _hidden(place: Path) -> list[Path]:
    return list(place.glob("build/.*.partial"))


def _exporting(place: Path) -> bool:
    return any(path.stat().st_size > 50 << 20 for d in _hidden(place) for path in d.glob("*.data"))


def _compiling(place: Path) -> bool:
    return any((d / "vision.engine").exists() for d in _hidden(place))


BIG = "llava-1.5-7b --weights random --decoder-layers 1 --backend ort"


@pytest.mark.parametrize(
    ("model", "phase", "number", "whole_group"),
    [
        (BIG, _exporting, signal.SIGINT, False),
        pytest.param("llava-tiny --backend rtx", _compiling, signal.SIGINT, True, marks=RTX),
        pytest.param("llava-tiny --backend rtx", _compiling, signal.SIGINT, False, marks=RTX),
        pytest.param("llava-tiny --backend rtx", _compiling, signal.SIGTERM, False, marks=RTX),
    ],
    ids=["export", "compile", "compile-one-process", "compile-terminated"],
)
def test_interrupted_build_ends_soon_and_leaves_nothing(
    model: str, phase: Callable[[Path], bool], number: signal.Signals, whole_group: bool, place: Path
) -> None:
    before = files(place)
    command = process("engine", *model.split())
    with subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, process_group=0
    ) as build:
        deadline = time.monotonic() + 300
        while not phase(place):
            assert build.poll() is None, build.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        children = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()
        (os.killpg if whole_group else os.kill)(build.pid, number)
        _, stderr = build.communicate(timeout=300)
    assert build.returncode == 1
    assert one_line(stderr) == "interrupted; nothing half-written was left behind."
    assert files(place) == before
    assert bool(children) == (phase is _compiling)
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.parametrize("listening", [False, True], ids=["refusing", "silent"])
def test_unreachable_hub_is_reported_soon(listening: bool, place: Path, tmp_path: Path) -> None:
    before = files(place)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listening:
            server.close()
        done = subprocess.run(
            process("engine", "llava-1.5-7b", "--backend", "ort"),
            env=environment(HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HOME=str(tmp_path / "hub")),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 1
    message = one_line(done.stderr)
    assert message.startswith(f"llava-1.5-7b must be downloaded from http://127.0.0.1:{port}")
    assert message.endswith("Give a local copy with MODEL=DIR, or build with WEIGHTS=random.")
    assert files(place) == before
