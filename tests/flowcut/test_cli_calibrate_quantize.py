"""`flowcut calibrate quantize`: its table, its line of JSON, Ctrl-C, and what it refuses."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_refusals import Refused, environment, process, refusals

from calib.calibration import load_calibration
from flowcut.aliases import resolve
from flowcut.arguments import make_parser
from flowcut.cli import main
from flowcut.tiny.scenes import make_scene, render

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures and a broken one in `images`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("images").mkdir()
    for number in range(2):
        render(make_scene("val", number)).save(f"images/{number}.png")
    Path("images/broken.jpg").write_bytes(b"no picture")
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"no picture")
    return tmp_path


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusals(place, capfd)


def parser() -> argparse.ArgumentParser:
    found = make_parser()
    for name in ("calibrate", "quantize"):
        (commands,) = (a for a in found._actions if isinstance(a, argparse._SubParsersAction))
        found = commands.choices[name]
    return found


def documented_keys() -> set[str]:
    text = " ".join(parser().format_help().split())
    return set(re.split(r", | and ", text.partition("with the keys ")[2].rstrip(".")))


@pytest.mark.parametrize("precision", ["all", "fp8", "int4"])
def test_table_then_json(precision: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["llava-tiny", "--images", "images", "--decoder-layers", "1", "--threads", "1", "--precision", precision]
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "quantize", *argv, "--out", "c.safetensors"])
    *table, last = capfd.readouterr().out.splitlines()
    told = json.loads(last)
    assert ended.value.code == 0
    assert told.keys() == documented_keys()
    assert (told["pictures"], told["skipped"], told["precision"]) == (2, 1, precision)
    assert told["note"] == "1 of 4 decoder layers"
    read = load_calibration(Path("c.safetensors"), resolve("llava-tiny", decoder_layers=1).weights)
    assert (told["ranges"], told["scales"]) == (len(read.ranges), len(read.scales))
    assert (told["ranges"] > 0, told["scales"] > 0) == (precision != "int4", precision != "fp8")
    assert told["error"].keys() == (set() if precision == "fp8" else {"vision", "language"})
    assert told["bytes"] == Path("c.safetensors").stat().st_size
    assert all(len(line) <= 80 for line in table)
    assert "wrote c.safetensors" in table
    assert any(line.startswith("  broken.jpg: ") for line in table)
    assert sorted(p.name for p in place.iterdir()) == ["broken", "c.safetensors", "empty", "images"]


def test_weights_that_are_random_are_said_to_be(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = "llava-tiny --weights random --images images --limit 1 --precision fp8 --question Why? --out r.safetensors"
    with pytest.raises(SystemExit):
        main(["calibrate", "quantize", *argv.split(), "--threads", "1"])
    out = capfd.readouterr().out
    assert "random weights: this tests the machinery; the figures mean nothing." in out
    assert json.loads(out.splitlines()[-1])["note"] == "random weights"


def test_interrupted_process_continues_and_ends_the_same(place: Path) -> None:
    options = ("--images", "images", "--decoder-layers", "1", "--threads", "1", "--out")
    command = process("calibrate", "quantize", "llava-tiny", *options)
    subprocess.run([*command, "whole.safetensors"], env=environment(), check=True, capture_output=True)
    running = subprocess.Popen([*command, "c.safetensors"], env=environment(), stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not list(place.glob(".c.safetensors.partial/vision-*")):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)  # a picture is done; the tower's scales take seconds
    _, err = running.communicate(timeout=120)
    assert running.returncode == 1
    assert err.splitlines()[-1] == "flowcut: interrupted; the same command continues."
    assert not Path("c.safetensors").exists()
    subprocess.run([*command, "c.safetensors"], env=environment(), check=True, capture_output=True)
    assert Path("c.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    assert not list(place.glob(".*"))


REFUSED = {
    "no such directory": ("--images absent", r"images must be a directory of pictures, got 'absent'"),
    "no picture": ("--images empty", r"images must hold a picture .*, got none in 'empty'"),
    "broken pictures only": ("--images broken", r"images must hold at least one usable picture, got none in 'broken'"),
    "limit": ("--limit 0", r"limit must be at least 1, got 0\."),
    "threads": ("--threads 0", r"threads must be at least 1, got 0\."),
    "tokens": ("--tokens 145", r"tokens must be in 1\.\.144"),
    "schedule": ("--schedule dynamic", r"schedule must be adaptive, static, masked or a \.json file, got 'dynamic'\."),
    "layers": ("--decoder-layers 5", r"decoder_layers must be in 1\.\.4, got 5\."),
    "suffix": ("--out c.json", r"out must be a \.safetensors file in an existing directory, got 'c\.json'\."),
    "a folder": ("--out empty", r"out must be a \.safetensors file in an existing directory, got 'empty'\."),
    "question": ("--question=", r"question must be text of at most \d+ tokens with 16 visual ones, got ''"),
}


@pytest.mark.parametrize(("argv", "said"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line(argv: str, said: str, refused: Refused) -> None:
    given = {"--images": "images", "--out": "c.safetensors"}
    rest = [part for name, value in given.items() if name not in argv for part in (name, value)]
    message = refused("calibrate", "quantize", "llava-tiny", *rest, *argv.split())
    assert re.search(said, message.split("skipped: ")[-1])


def test_a_file_that_is_no_calibration_is_kept(place: Path, refused: Refused) -> None:
    shutil.copy(resolve("llava-tiny").files / "model.safetensors", place / "other.safetensors")
    message = refused("calibrate", "quantize", "llava-tiny", "--images", "images", "--out", "other.safetensors")
    assert "out must be new or an earlier calibration, got 'other.safetensors', which is neither." in message


def test_checkpoint_that_is_not_whole_is_refused(place: Path, refused: Refused) -> None:
    cut = shutil.copytree(resolve("llava-tiny").files, place / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    message = refused("calibrate", "quantize", "cut", "--images", "images", "--out", "c.safetensors")
    assert "damaged files: model.safetensors" in message


@pytest.mark.parametrize("argv", ["--precision int8", "--limit few", ""])
def test_wrong_syntax_is_code_2(argv: str, place: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "quantize", "llava-tiny", "--images", "images", *argv.split()])
    assert ended.value.code == 2
