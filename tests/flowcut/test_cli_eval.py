"""`flowcut eval`: its table, its line of JSON, and what it refuses."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from cli_refusals import Refused, refusals, run
from tiny_engine import write_engine

from flowcut.aliases import resolve
from flowcut.arguments import make_parser
from flowcut.cli import main
from flowcut.contract import Limits
from flowcut.schedule import make_schedule

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = resolve("llava-tiny")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says it was built for rtx; ONNX Runtime runs it."""
    limits = Limits(max_batch=4, max_images=4, max_prompt=128, max_new_tokens=8)
    path = tmp_path_factory.mktemp("eval") / "engine"
    return write_engine(path, precision="fp16", backend="rtx", limits=limits).directory


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("folder").mkdir()
    return tmp_path


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusals(place, capfd)


def documented_keys() -> set[str]:
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    text = " ".join(commands.choices["eval"].format_help().split())
    return set(re.split(r", | and ", text.partition("with the keys ")[2].rstrip(".")))


@pytest.mark.parametrize("target", ["checkpoint", "directory"])
def test_table_then_json(target: str, directory: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "llava-tiny" if target == "checkpoint" else str(directory)
    with pytest.raises(SystemExit) as ended:
        main(["eval", name, "--questions", "8", "--answers", "a.jsonl", "--threads", "1"])
    *table, last = capfd.readouterr().out.splitlines()
    told = json.loads(last)
    assert ended.value.code == 0
    assert told.keys() == documented_keys()
    assert (told["n"], told["scenes"], told["tokens"], told["selector"]) == (8, 2, 16, "flowcut")
    by_target = {"checkpoint": ("torch", "fp32", "adaptive"), "directory": ("ort", "fp16", "static")}
    assert (told["backend"], told["precision"], told["schedule"]) == by_target[target]
    assert "llava-tiny: 16 of 144 patches" in table
    assert sum(score["n"] for score in told["by_type"].values()) == 8
    assert all(len(line) <= 80 for line in table)
    assert len(Path("a.jsonl").read_text().splitlines()) == 8


OF_A_CHECKPOINT = {
    "no scenes": ("--scenes 0", r"scenes must be at least 1, got 0\."),
    "no questions": ("--questions -1", r"questions must be at least 1, got -1\."),
    "no threads": ("--threads 0", r"threads must be at least 1, got 0\."),
    "too many questions": ("--scenes 1 --questions 7", r"questions must be at most 6 \(all about 1 scenes\), got 7\."),
    "tokens": ("--tokens 145", r"tokens must be in 1\.\.144"),
    "selector": ("--selector flow", r"selector must be one of flowcut, .* Did you mean flowcut\?"),
    "schedule of one shot": ("--selector grid --schedule masked", r"schedule must be static with the selector grid"),
    "adaptive on ort": ("--backend ort --schedule adaptive", r"schedule must be static, masked or a \.json file"),
    "a compiler's backend": ("--backend rtx", r"backend must be torch or ort for a checkpoint, got 'rtx'\."),
    "fp16 in torch": ("--precision fp16", r"precision must be fp32 with torch, got 'fp16'\. --backend ort"),
    "absent folder": ("--answers nowhere/a.jsonl", r"answers must be a file in an existing directory, got 'nowhere/a"),
    "a folder": ("--answers folder", r"answers must be a file in an existing directory, got 'folder'"),
}


@pytest.mark.parametrize("case", OF_A_CHECKPOINT)
def test_checkpoint_and_setting_that_do_not_fit_are_refused(case: str, refused: Refused) -> None:
    options, message = OF_A_CHECKPOINT[case]
    assert re.search(message, refused("eval", "llava-tiny", *options.split()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokens 32", r"tokens must be 16, which .* was built with, got 32\. Leave it out, or name the checkpoint"),
        ("--selector cls", r"selector must be 'flowcut', .*got 'cls'"),
        ("--schedule adaptive", r"schedule must be 'static', .*got 'adaptive'"),
        ("--precision fp32", r"precision must be 'fp16', .*got 'fp32'"),
        ("--backend torch", r"backend must be auto, rtx, trt or ort for an engine directory, got 'torch'"),
        ("--backend trt", r"backend must be one of auto, rtx, ort for this directory, .*got 'trt'"),
    ],
)
def test_directory_keeps_its_settings(options: str, message: str, directory: Path, refused: Refused) -> None:
    assert re.search(message, refused("eval", directory, *options.split()))


def calibrated(path: Path, move: int = 0) -> str:
    """What `flowcut calibrate schedule` writes, where it found the closed form, or `move` patches more at one point."""
    schedule = make_schedule("static", TINY.config.vision, 16)
    first, *others = schedule.counts
    origin = {"geometry": asdict(TINY.config.vision), "vision_sha256": "0" * 64, "choose": "median"}
    path.write_text(json.dumps({**schedule.to_dict(), "counts": [first + move, *others], "calibration": origin}))
    return path.name


def test_calibrated_file_is_compared_by_its_schedule(place: Path, directory: Path, refused: Refused) -> None:
    asked = ("eval", directory, "--questions", "1", "--threads", "1", "--schedule")
    same, other = calibrated(place / "same.json"), calibrated(place / "other.json", move=2)
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in (*asked, same)])
    assert ended.value.code == 0
    message = refused(*asked, other)
    own, given = (json.loads((place / name).read_text())["counts"] for name in (same, other))
    assert re.search(rf"schedule must be .*'counts': {re.escape(str(own))}.* was built with, got ", message)
    assert f"'counts': {given}" in message.partition(", got ")[2]
    assert "vision_sha256" not in message


def test_unknown_targets_are_refused(place: Path, refused: Refused) -> None:
    assert "model must be one of llava-tiny" in refused("eval", "llava-tin")
    assert "config.json" in refused("eval", "folder")
    (place / "folder" / "manifest.json").write_text("{}")
    assert "missing keys: backend" in refused("eval", "folder")


@pytest.mark.parametrize("options", ["", "a b", "a --split train", "a --tokens few", "a --precision int3"])
def test_wrong_syntax_ends_with_2(options: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "eval", *options.split()).code == 2
