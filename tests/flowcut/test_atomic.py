"""A directory is replaced whole or not at all, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowcut import atomic
from flowcut.atomic import check_space, remove_leftovers, replacing, write_file
from flowcut.errors import EngineError

BUILD = """
import sys, time
from pathlib import Path
from flowcut.atomic import replacing
with replacing(Path(sys.argv[1]), lambda target: None) as partial:
    (partial / "text").write_text("new")
    print("building", flush=True)
    time.sleep(60)
"""


def anything(target: Path) -> None:
    """The check that lets everything be replaced."""


def build(target: Path, text: str) -> None:
    with replacing(target, anything) as partial:
        (partial / "text").write_text(text)
        (partial / "deep").mkdir()
        (partial / "deep" / "text").write_text(text)


def tree(directory: Path) -> dict[str, str]:
    return {p.relative_to(directory).as_posix(): p.read_text() for p in directory.rglob("*") if p.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def build_and_raise(target: Path, error: BaseException) -> None:
    with replacing(target, anything) as partial:
        (partial / "text").write_text("new")
        raise error


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "build").mkdir()
    return tmp_path / "build" / "tiny-8-fp16-ort"


@pytest.fixture(params=["exchange", "two renames"])
def either_swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)


@pytest.mark.usefixtures("either_swap")
def test_publishes_and_replaces_leaving_only_the_target(target: Path) -> None:
    build(target, "first")
    assert tree(target) == {"text": "first", "deep/text": "first"}
    build(target, "second")
    assert tree(target) == {"text": "second", "deep/text": "second"}
    assert names(target.parent) == [target.name]


def test_a_parent_made_for_a_failed_build_goes_with_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        build_and_raise(tmp_path / "new" / "target", RuntimeError())
    assert names(tmp_path) == []
    build(tmp_path / "new" / "target", "text")
    assert names(tmp_path / "new") == ["target"]


def test_all_folders_made_for_a_failed_build_go_with_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        build_and_raise(tmp_path / "a" / "b" / "c" / "target", RuntimeError())
    assert names(tmp_path) == []


def test_folder_that_another_builds_failure_takes_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one made it, and ends just before this one's hidden directory is in it."""
    target, clean, begun = tmp_path / "a" / "b" / "target", atomic._clean, []

    def other_failed(folder: Path) -> None:
        begun.append(folder)
        if len(begun) % 2:
            folder.rmdir()
            folder.parent.rmdir()
        clean(folder)

    monkeypatch.setattr(atomic, "_clean", other_failed)
    target.parent.mkdir(parents=True)
    with pytest.raises(RuntimeError):
        build_and_raise(target, RuntimeError())
    assert names(tmp_path) == []
    target.parent.mkdir(parents=True)
    build(target, "new")
    assert tree(tmp_path) == {"a/b/target/text": "new", "a/b/target/deep/text": "new"}


def test_target_is_untouched_until_the_block_ends(target: Path) -> None:
    build(target, "old")
    with replacing(target, anything) as partial:
        (partial / "text").write_text("new")
        assert partial.parent == target.parent
        assert tree(target)["text"] == "old"
    assert tree(target) == {"text": "new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_failure_inside_the_block_leaves_nothing_behind(
    target: Path, error: type[BaseException], existing: bool
) -> None:
    if existing:
        build(target, "old")
    with pytest.raises(error):
        build_and_raise(target, error())
    assert names(target.parent) == [target.name] * existing
    assert not existing or tree(target)["text"] == "old"


def test_old_directory_returns_when_the_second_rename_fails(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(target, "old")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.ENOSPC, "no space")
        return rename(self, to)

    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(EngineError, match="No space left"):
        build(target, "new")
    assert tree(target)["text"] == "old"
    assert names(target.parent) == [target.name]


def test_check_runs_again_before_the_swap(target: Path) -> None:
    calls = []

    def check(path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise EngineError("somebody moved in")

    with pytest.raises(EngineError, match="moved in"), replacing(target, check):
        pass
    assert calls == [target, target]
    assert names(target.parent) == []


def start_build(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    return process


def test_next_build_removes_what_a_killed_one_left(target: Path) -> None:
    build(target, "old")
    process = start_build(target)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(names(target.parent)) == 2
    assert tree(target)["text"] == "old"
    build(target, "new")
    assert names(target.parent) == [target.name]


def test_next_build_leaves_a_living_one_alone(target: Path) -> None:
    process = start_build(target)
    try:
        build(target, "mine")
        assert len(names(target.parent)) == 2
    finally:
        process.kill()
        process.wait()


def test_interrupted_process_leaves_nothing(target: Path) -> None:
    process = start_build(target)
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    assert names(target.parent) == []


def test_directory_moved_aside_by_a_killed_build_comes_back(target: Path) -> None:
    build(target, "old")
    target.rename(target.parent / f".{target.name}.4000000.0a1b2c3d.old")
    with pytest.raises(RuntimeError):
        build_and_raise(target, RuntimeError())
    assert tree(target)["text"] == "old"
    assert names(target.parent) == [target.name]


def test_hidden_names_that_no_build_makes_stay(target: Path) -> None:
    others = [f".{target.name}.4.5.abc.partial", ".other.5.abc.partial", f".{target.name}.partial"]
    others += [".other.5.0a1b2c3d.gone", "other.5.0a1b2c3d.partial", ".5.0a1b2c3d.partial"]
    for name in others:
        (target.parent / name).mkdir()
    (target.parent / ".other.5.0a1b2c3d.partial").symlink_to(target.parent / others[0])
    build(target, "new")
    assert names(target.parent) == sorted([*others, ".other.5.0a1b2c3d.partial", target.name])


def test_leftovers_of_every_target_in_the_folder_go(target: Path) -> None:
    aside, folder = target.parent / ".second.2.0a1b2c3d.old", target.parent / ".other-name.1.0a1b2c3d.partial"
    folder.mkdir()
    (folder / "weights").write_text("half")
    (target.parent / ".result.json.1.0a1b2c3d.partial").write_text("half")
    build(aside, "second")
    remove_leftovers(target)
    assert names(target.parent) == ["second"]
    assert tree(target.parent / "second")["text"] == "second"


def test_files_and_directories_clean_up_after_each_other(target: Path) -> None:
    (target.parent / ".other.1.0a1b2c3d.partial").mkdir()
    write_file(target.parent / "file", b"text")
    (target.parent / ".other.1.0a1b2c3d.partial").write_text("half")
    build(target, "new")
    assert names(target.parent) == ["file", target.name]


def test_leftovers_in_no_folder_are_none(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "a" / "b")
    assert names(tmp_path) == []


def test_without_locks_leftovers_stay_and_are_named(
    target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    leftover = target.parent / ".other.1.0a1b2c3d.partial"
    leftover.mkdir()
    build(target, "new")
    assert names(target.parent) == [leftover.name, target.name]
    assert str(leftover) in caplog.text


def test_ctrl_c_while_the_old_directory_is_removed_waits_for_it(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree, begun = shutil.rmtree, []

    def interrupted(path: Path, ignore_errors: bool) -> None:
        begun.append(path)
        if len(begun) == 1:
            raise KeyboardInterrupt
        rmtree(path, ignore_errors=ignore_errors)

    build(target, "old")
    monkeypatch.setattr(atomic.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(target, "new")
    assert tree(target)["text"] == "new"
    assert names(target.parent) == [target.name]


def test_what_cannot_be_removed_is_named(
    target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leftover = target.parent / ".other.1.0a1b2c3d.partial"
    leftover.mkdir()
    build(target, "old")
    assert not caplog.text
    leftover.mkdir()
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda path, ignore_errors: None)
    build(target, "new")
    assert tree(target)["text"] == "new"
    left = [target.parent / name for name in names(target.parent) if name != target.name]
    assert len(left) == 2
    assert all(f"{path}: left by a build, and could not be removed" in caplog.text for path in left)


def test_contents_are_on_the_disk_before_names_and_names_before_the_swap(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves cannot be tried here: the order of what is asked of the disk can."""
    build(target, "old")
    asked: list[str] = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        asked.append(re.sub(r"\.tiny.*?partial", "new", path.relative_to(target.parent).as_posix()))

    def exchange(new: Path, old: Path) -> bool:
        asked.append("swap")
        return real(new, old)

    real = atomic._exchange
    monkeypatch.setattr(atomic.os, "fsync", fsync)
    monkeypatch.setattr(atomic, "_exchange", exchange)
    build(target, "new")
    assert asked == ["new/text", "new", "new/deep/text", "new/deep", "swap", "."]
    asked.clear()
    write_file(target.parent / "tiny.json", b"text")
    assert asked == ["new", "."]


def test_new_folders_above_the_target_are_written_through_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(atomic.os, "fsync", lambda fd: asked.append(Path(f"/proc/self/fd/{fd}").resolve()))
    build(tmp_path / "a" / "b" / "target", "new")
    assert {tmp_path, tmp_path / "a"} <= set(asked)


def test_what_cannot_be_listed_to_be_written_through_is_not_published(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(target, "old")
    scandir = os.scandir

    def failing(path: Path | str | int) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("deep"):
            raise OSError(errno.EIO, "any", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "scandir", failing)
        with pytest.raises(EngineError, match="deep must be writable, got: Input/output error"):
            build(target, "new")
    assert tree(target)["text"] == "old"
    assert names(target.parent) == [target.name]


def test_disk_that_cannot_write_folders_through_is_good_enough(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, "not of folders")

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    build(target, "new")
    assert tree(target)["text"] == "new"


def test_target_that_cannot_be_moved_is_refused_at_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(target, "old")
    begun = []
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "access", lambda path, mode: path != target)  # root may write anywhere
        with pytest.raises(EngineError, match=r"must be writable, got: Permission denied"), replacing(target, anything):
            begun.append("read-only")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
    with pytest.raises(EngineError, match=r"A disk is mounted there: build into a folder"), replacing(target, anything):
        begun.append("mounted")
    assert not begun
    assert tree(target)["text"] == "old"
    assert names(target.parent) == [target.name]


def test_file_that_is_a_device_or_a_pipe_is_refused(tmp_path: Path) -> None:
    """Root could replace /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngineError, match=r"must be a file to write, got a device or pipe\. Choose another name\."):
        write_file(tmp_path / "pipe", b"text")
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_two_builds_at_once_end_with_a_whole_directory(target: Path) -> None:
    build(target, "old")
    with replacing(target, anything) as first, replacing(target, anything) as second:
        (first / "text").write_text("first")
        (second / "text").write_text("second")
    assert tree(target) == {"text": "first"}
    assert names(target.parent) == [target.name]


def test_link_to_a_directory_is_followed(target: Path, tmp_path: Path) -> None:
    build(target, "old")
    link = tmp_path / "latest"
    link.symlink_to(target)
    build(link, "new")
    assert link.is_symlink()
    assert tree(target)["text"] == "new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_disk_errors_are_one_line_with_what_is_free_and_a_remedy(target: Path, code: int) -> None:
    with pytest.raises(EngineError) as caught, replacing(target, anything) as partial:
        raise OSError(code, "any", str(partial / "language.engine"))
    message = str(caught.value)
    assert "language.engine must be writable, got: " + os.strerror(code) in message
    assert "MB free" in message
    assert "\n" not in message
    assert names(target.parent) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_met_while_writing_is_explained(target: Path) -> None:
    with pytest.raises(EngineError, match="No space left on device"), replacing(target, anything):
        Path("/dev/full").write_text("x")
    assert names(target.parent) == []


def test_errors_about_the_target_and_what_is_above_or_in_it_are_explained(target: Path) -> None:
    for place in (lambda new: new, lambda new: new / "x", lambda new: target, lambda new: target / "x"):
        with pytest.raises(EngineError, match="must be writable"), replacing(target, anything) as partial:
            raise PermissionError(errno.EACCES, "any", str(place(partial)))
    for path in (target.parent, *target.parent.parents):
        with pytest.raises(EngineError, match=f"^{path} must be writable"), replacing(target, anything):
            raise PermissionError(errno.EACCES, "any", str(path))


def test_errors_about_other_files_pass_unchanged(target: Path, tmp_path: Path) -> None:
    hidden = target.with_name(".other.1.0a1b2c3d.partial")  # of another target
    beside = [target.parent / "model.safetensors", target.with_name(f"{target.name}-2") / "x", hidden / "x"]
    for path in [Path("/elsewhere/model.safetensors"), target.parent.with_name("build-2") / "x", Path("x"), *beside]:
        with pytest.raises(PermissionError), replacing(target, anything):
            raise PermissionError(errno.EACCES, "any", str(path))
    with pytest.raises(FileNotFoundError), replacing(target, anything) as partial:
        (partial / "absent").read_text()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: root / "file" / "x", "Not a directory|File exists"),
        (lambda root: root / "file" / "deep" / "x", "Not a directory|File exists"),
        (lambda root: root / ("x" * 300), "name too long"),
        (lambda root: root / "loop" / "x", "file or a link to itself"),
    ],
)
def test_impossible_targets_are_explained(tmp_path: Path, spoil: Callable[[Path], Path], expected: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(EngineError, match=expected):
        build(spoil(tmp_path), "new")


def test_too_little_space_is_refused_with_both_figures(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: atomic.shutil._ntuple_diskusage(10**10, 0, 5 * 10**8))
    check_space(target, 5 * 10**8)
    with pytest.raises(EngineError, match=r"at least 9,000\.0 MB, got 500\.0 MB"):
        check_space(target, 9 * 10**9)


def test_space_of_a_path_that_does_not_exist_is_that_of_its_disk(tmp_path: Path) -> None:
    check_space(tmp_path / "a" / "b" / "c", 1)
    with pytest.raises(EngineError, match="free space for"):
        check_space(tmp_path / "a" / "b" / "c", 1 << 62)
