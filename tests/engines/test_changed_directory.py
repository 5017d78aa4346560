"""Whatever is changed in an engine directory, a byte or a file, it is refused before anything in it is opened."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_gpu
import pytest
from tiny_engine import write_engine

from engines import load_engine, loading
from flowcut.cli import main
from flowcut.errors import EngineError

Undo = Callable[[], object]
Change = Callable[[Path, list[Path], random.Random], tuple[list[Path], Undo]]


def a_byte(_: Path, files: list[Path], draw: random.Random) -> tuple[list[Path], Undo]:
    """Another value anywhere in one file: small files as often as large ones."""
    path = draw.choice(files)
    position = draw.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(position)
        old = file.read(1)
        new = bytes([old[0] ^ draw.randrange(1, 256)])

    def put(value: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(position)
            file.write(value)

    put(new)
    return [path], lambda: put(old)


def cut(_: Path, files: list[Path], draw: random.Random) -> tuple[list[Path], Undo]:
    path = draw.choice(files)
    content = path.read_bytes()
    os.truncate(path, draw.randrange(len(content)))
    return [path], lambda: path.write_bytes(content)


def longer(_: Path, files: list[Path], draw: random.Random) -> tuple[list[Path], Undo]:
    path = draw.choice(files)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(draw.randbytes(1))
    return [path], lambda: os.truncate(path, size)


def exchanged(directory: Path, files: list[Path], draw: random.Random) -> tuple[list[Path], Undo]:
    a, b = draw.sample(files, 2)

    def swap() -> None:
        a.rename(directory / "between")
        b.rename(a)
        (directory / "between").rename(b)

    swap()
    return [a, b], swap


def one_more(directory: Path, _: list[Path], draw: random.Random) -> tuple[list[Path], Undo]:
    folder = draw.choice([directory, directory / "folder"])
    folder.mkdir(exist_ok=True)
    path = folder / draw.choice(["model.onnx", ".hidden", "vision.engine.cache"])
    path.write_bytes(draw.randbytes(draw.randrange(3)))

    def undo() -> None:
        path.unlink()
        if folder != directory:
            folder.rmdir()

    return [path], undo


def one_less(directory: Path, files: list[Path], draw: random.Random) -> tuple[list[Path], Undo]:
    path = draw.choice(files)
    away = directory.parent / "away"
    path.rename(away)
    return [path], lambda: away.rename(path)


def linked(directory: Path, files: list[Path], draw: random.Random) -> tuple[list[Path], Undo]:
    """The very same content, but from elsewhere, where it may change at any time."""
    path = draw.choice(files)
    away = directory.parent / "away"
    path.rename(away)
    path.symlink_to(away)
    return [path], lambda: away.replace(path)


OTHERS: tuple[Change, ...] = (cut, longer, exchanged, one_more, one_less, linked)


def check_changes(directory: Path, count: int, seed: int, run: Callable[[], tuple[int, str]]) -> dict[str, int]:
    """Make `count` changes, each undone before the next, and see each refused by load_engine and by `run`.

    One of each kind, then three in four single bytes. Returns how many there were of each.
    """
    draw, done = random.Random(seed), dict.fromkeys(["a_byte", *(each.__name__ for each in OTHERS)], 0)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for number in range(count):
        drawn = a_byte if draw.random() < 0.75 else draw.choice(OTHERS)
        change = OTHERS[number] if number < len(OTHERS) else drawn
        changed, undo = change(directory, files, draw)
        try:
            with pytest.raises(EngineError) as caught:
                load_engine(directory)
            code, said = run()
        finally:
            undo()
        assert code == 1
        for line in (str(caught.value), said):
            assert "\n" not in line.strip()
            assert any(path.name in line for path in changed), (change.__name__, changed, line)
        done[change.__name__] += 1
    return done


@pytest.fixture(params=["ort", "rtx"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine", precision="fp16", backend=request.param).directory


@pytest.fixture
def inspect_check(directory: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[int, str]]:
    """`flowcut inspect --check`: its exit code, and what it complains of."""

    def run() -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["inspect", "--check", str(directory)])
        code = ended.value.code
        assert isinstance(code, int)
        return code, capsys.readouterr().err

    return run


@pytest.fixture(autouse=True)
def _restored(
    directory: Path, inspect_check: Callable[[], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Nothing may be opened during the test; the directory is good before it and after it."""
    with monkeypatch.context() as patch:
        fake_gpu.install(patch)
        assert inspect_check() == (0, "")
        patch.setattr(loading, "_sessions", lambda *_: pytest.fail("a changed directory was opened"))
        yield
        assert inspect_check() == (0, "")
    load_engine(directory, "ort", threads=1)


def test_changes_are_refused(directory: Path, inspect_check: Callable[[], tuple[int, str]]) -> None:
    done = check_changes(directory, 60, 0, inspect_check)
    assert all(done.values())


@pytest.mark.soak
def test_a_thousand_changes_of_a_byte_are_refused(
    directory: Path, inspect_check: Callable[[], tuple[int, str]]
) -> None:
    assert check_changes(directory, 1400, 1, inspect_check)["a_byte"] >= 1000


def test_a_change_is_made_and_undone(directory: Path, tmp_path: Path) -> None:
    """What the tests above rest on."""

    def content() -> dict[str, bytes | None]:
        paths = directory.rglob("*")
        return {str(p): p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in paths}

    files, before = sorted(directory.iterdir()), content()
    for change in (a_byte, *OTHERS):
        _, undo = change(directory, files, random.Random(0))
        assert content() != before
        undo()
        assert content() == before
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]
