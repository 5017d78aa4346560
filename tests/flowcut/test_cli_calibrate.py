"""`flowcut calibrate schedule`: its table, its line of JSON, its files in other commands, and what it refuses."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cli_refusals import Refused, environment, process, refusals, run

from flowcut.arguments import make_parser
from flowcut.artifacts import read_manifest
from flowcut.cli import main
from flowcut.tiny.scenes import make_scene, render

pytestmark = pytest.mark.usefixtures("one_thread")
CALIBRATE = ("calibrate", "schedule", "llava-tiny", "--images", "photos", "--tokens", "16", "--threads", "1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With eight photos, one of them broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("photos").mkdir()
    Path("empty").mkdir()
    for number in range(7):
        render(make_scene("val", number)).save(f"photos/{number}.png")
    Path("photos/broken.jpg").write_bytes(b"\xff\xd8\xff")
    return tmp_path


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusals(place, capfd)


def calibrated(capfd: pytest.CaptureFixture[str], *options: str, out: str = "s.json") -> tuple[list[str], Any]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*CALIBRATE, "--out", out, *options])
    *table, last = capfd.readouterr().out.splitlines()
    assert ended.value.code == 0
    return table, json.loads(last)


def documented_keys() -> set[str]:
    parser: Any = make_parser()
    for word in ("calibrate", "schedule"):
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = commands.choices[word]
    text = " ".join(parser.format_help().split())
    return set(re.split(r", | and ", text.partition("with the keys ")[2].rstrip(".")))


def test_table_then_json(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table, told = calibrated(capfd)
    assert told.keys() == documented_keys()
    static, masked = (json.loads(Path(told[name]).read_text()) for name in ("schedule", "masked_schedule"))
    assert (told["schedule"], told["masked_schedule"]) == ("s.json", "s.masked.json")
    assert (static["counts"], masked["counts"]) == (told["counts"], told["capacities"])
    assert told["tokens"] == told["tokens_per_tile"] == static["tokens"]
    assert (told["pictures"], told["skipped"]) == ({"calibration": 4, "held_out": 3}, 1)
    assert told["agreement"].keys() == told["flops_share"].keys() == {"static", "masked", "closed_form"}
    assert all(len(line) <= 80 for line in table)
    text = "\n".join(table)
    assert "1 files are skipped:\n  broken.jpg: " in text
    for row in (["1", *map(str, (told["counts"][0], told["capacities"][0]))], ["closed form"], ["wrote s.masked.json"]):
        assert any(all(word in line for word in row) for line in table)
    assert "random weights" not in text


def test_random_weights_are_called_a_test_of_the_machinery(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table, told = calibrated(capfd, "--weights", "random", "--seed", "2", "--limit", "2")
    assert "random weights: this tests the machinery; the figures mean nothing." in table
    assert told["note"] == "random weights"


def test_its_files_are_schedules_of_other_commands(
    refused: Refused, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, told = calibrated(capfd)
    for name, counts in (("s.json", "counts"), ("s.masked.json", "capacities")):
        export = ("export", "llava-tiny", "--tokens", "16", "--schedule", name)
        assert run(capfd, *export, "--out", "engine").code == 0
        manifest = read_manifest(Path("engine"))
        assert manifest.schedule["counts"] == told[counts]
        assert "calibration" not in manifest.schedule
        by_masked = (
            r"schedule s\..*json must be made for this checkpoint, .* sha256 [0-9a-f]{12}, got one for [0-9a-f]{12}\."
        )
        message = refused(*export, "--weights", "random", "--out", "other")
        assert re.search(by_masked, message)
    assert run(capfd, "prune", "llava-tiny", "--tokens", "16", "--schedule", "s.json").code == 0
    evaluated = ("eval", "llava-tiny", "--tokens", "16", "--schedule", "s.json", "--questions", "1", "--threads", "1")
    assert run(capfd, *evaluated).code == 0
    assert "'tokens': 20" in refused("prune", "llava-tiny", "--tokens", "20", "--schedule", "s.json")


REFUSED = {
    "nothing there": ("--images nowhere", r"images must be a directory of pictures, got 'nowhere'"),
    "an empty directory": ("--images empty", r"images must hold a picture .* got none in 'empty'\."),
    "all tokens": ("--tokens all", r"nothing to calibrate\."),
    "one shot": ("--selector grid", r"selector must be .* got 'grid', which chooses once"),
    "a share": ("--choose flops=2", r"choose must be flops=X with X, .* in \(0, 1\], got 'flops=2'\."),
    "a least share": ("--choose flops=0.01", r"with X at least 0\.\d+ for 16 of 144 patches, got flops=0\.01"),
    "an output": ("--out nowhere/s.json", r"out must be a \.json file in an existing directory, got 'nowhere/s\.json'"),
    "a model": ("--seed -1 --weights random", r"seed must be 0 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case: str, refused: Refused) -> None:
    options, message = REFUSED[case]
    assert re.search(message, refused(*CALIBRATE, "--out", "s.json", *options.split()))


@pytest.mark.parametrize("name", ["mine.json", "mine.masked.json"])
def test_a_file_that_is_no_schedule_is_kept(name: str, place: Path, refused: Refused) -> None:
    (place / name).write_text('{"a": 1}', encoding="utf-8")
    message = refused(*CALIBRATE, "--out", "mine.json")
    assert f"out must be new or an earlier calibration, got '{name}', which is neither." in message
    assert (place / name).read_text(encoding="utf-8") == '{"a": 1}'


@pytest.mark.parametrize("words", [["calibrate"], ["calibrate", "everything"], [*CALIBRATE]])
def test_wrong_syntax_is_code_2(words: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, message = run(capfd, *words)
    assert code == 2
    assert re.fullmatch(r"flowcut calibrate( schedule)?: [^\n]+ --help\.\n", message)


def test_an_interrupted_command_continues(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calibrated(capfd, out="whole.json")
    command = process(*CALIBRATE, "--out", "s.json")
    running = subprocess.Popen(command, env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.PIPE, text=True)
    journal = Path(".s.json.partial")
    until = time.monotonic() + 60
    while time.monotonic() < until and not (journal.is_file() and len(journal.read_bytes().splitlines()) > 2):
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 1
    assert stderr.splitlines()[-1] == "flowcut: interrupted; the same command continues."
    assert not Path("s.json").exists()
    assert journal.is_file()
    calibrated(capfd)
    assert Path("s.json").read_bytes() == Path("whole.json").read_bytes()
    assert not journal.exists()
