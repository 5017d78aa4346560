"""`flowcut plan`: its tables, its line of JSON, its help, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_refusals import Refused, refusals, run
from tiny_engine import write_engine

from flowcut.cli import main

EVERY = (
    "--weights random --seed 3 --llm-tokens 5 --schedule masked --precision int4 --vision-precision fp16 "
    "--decoder-layers 3 --gpu orin --batch 2 --text-tokens 9 --new-tokens 7"
)


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    monkeypatch.chdir(tmp_path)
    return refusals(tmp_path, capfd)


def plan(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[str, dict[str, Any]]:
    """What `flowcut plan` prints, and its last line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, argv)])
    out, err = capfd.readouterr()
    assert ended.value.code == 0, err
    assert err == ""
    *text, last = out.splitlines()
    return "\n".join(text), json.loads(last)


def words(help_text: str) -> str:
    return " ".join(help_text.split())


def test_a_plan_is_tables_and_a_line_of_json(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text, result = plan(capfd, "llava-tiny", "--tokens", "64,16", 8, "--gpu", "H100", "RTX4090", "--target-ms", 1)
    assert [row["tokens"] for row in result["budgets"]] == [144, 64, 16, 8]
    assert [gpu["gpu"] for gpu in result["gpus"]] == ["H100 SXM", "RTX 4090"]
    assert result["label"] == "predicted"
    assert all(gpu["target"]["verdict"] == "even all tokens meet it, by the roofline" for gpu in result["gpus"])
    assert "predicted from published figures" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    listed = words(capfd.readouterr().out).split("with the keys ")[1].split(";")[0]
    assert set(re.split(r", | and ", listed)) == set(result)


def test_every_option_is_taken(capfd: pytest.CaptureFixture[str]) -> None:
    _, result = plan(capfd, "llava-tiny", "--tokens", "16", *EVERY.split())
    assert (result["precision"], result["vision_precision"], result["schedule"]) == ("int4", "fp16", "masked")
    assert (result["batch"], result["text_tokens"], result["new_tokens"], result["decoder_layers"]) == (2, 9, 7, 3)
    assert (result["budgets"][1]["llm_tokens"], result["budgets"][1]["pruned_prompt_tokens"]) == (5, 14)
    assert result["note"] == "3 of 4 decoder layers"


def test_a_picture_is_cut_for_llava_next(capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--decoder-layers", 3, "--gpu", "A100")
    _, wide = plan(capfd, "llava-v1.6-vicuna-7b", "--picture", "336x336", *options)
    _, square = plan(capfd, "llava-v1.6-vicuna-7b", *options)
    assert (wide["picture"], wide["tiles"], square["picture"], square["tiles"]) == ([336, 336], 3, [672, 672], 5)
    assert wide["budgets"][0]["prompt_tokens"] < square["budgets"][0]["prompt_tokens"]


def test_an_engine_directory_is_planned(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = write_engine(tmp_path / "engine", precision="fp16", backend="rtx")
    _, result = plan(capfd, made.directory, "--text-tokens", 30, "--gpu", "H200")
    assert (result["model"], result["precision"]) == ("llava-tiny", "fp16")
    assert [row["tokens"] for row in result["budgets"]] == [144, 16]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["llava-2"], "model must be one of llava-tiny"),
        (["llava-tiny", "--tokens", "145"], r"tokens must be in 1\.\.144"),
        (["llava-tiny", "--tokens", "16,0"], r"tokens must be in 1\.\.144"),
        (["llava-v1.6-vicuna-7b", "--tokens", "161"], r"tokens must be even and in 2\.\.1150"),
        (["llava-tiny", "--gpu", "V100"], "gpu must be one of A100 SXM 80GB, .*H200 SXM, got 'V100'"),
        (["llava-tiny", "--gpu", "RTX"], "gpu must be one of"),
        (["llava-tiny", "--gpu", "A100", "--precision", "fp8"], "gpu must have fp8, which GPUs have from sm89 on"),
        (["llava-tiny", "--gpu", "A100", "--vision-precision", "fp8"], "gpu must have fp8"),
        (["llava-tiny", "--batch", "0"], "batch must be an integer of at least 1, got 0"),
        (["llava-tiny", "--text-tokens", "0"], "text_tokens must be an integer of at least 1, got 0"),
        (["llava-tiny", "--text-tokens", "4000"], "text_tokens must be at most 3824"),
        (["llava-tiny", "--new-tokens", "0"], "new_tokens must be an integer of at least 1, got 0"),
        (["llava-tiny", "--target-ms", "0"], r"target_ms must be a number above 0, got 0\.0"),
        (["llava-tiny", "--target-ms", "-1"], r"target_ms must be a number above 0, got -1\.0"),
        (["llava-tiny", "--picture", "640"], "picture must be WxH in pixels, as 640x480, got '640'"),
        (["llava-tiny", "--schedule", "adaptive"], "schedule must be static, masked or a .json file"),
        (["llava-tiny", "--schedule", "no.json"], "schedule no.json must be a readable JSON file"),
        (["llava-tiny", "--selector", "best"], "selector must be"),
        (["llava-tiny", "--decoder-layers", "9"], r"decoder_layers must be in 1\.\.4, got 9"),
    ],
)
def test_what_cannot_be_planned_is_one_line(refused: Refused, argv: list[str], message: str) -> None:
    assert re.search(message, refused("plan", *argv))


@pytest.mark.parametrize("argv", [["--tokens", "many"], ["--precision", "fp4"], ["--target-ms", "soon"], []])
def test_wrong_syntax_is_code_2(capfd: pytest.CaptureFixture[str], argv: list[str]) -> None:
    model = ["llava-tiny"] if argv else []
    code, message = run(capfd, "plan", *model, *argv)
    assert code == 2
    assert "flowcut plan" in message


def test_help_teaches_with_examples_and_says_predicted(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capfd.readouterr().out
    assert "flowcut plan llava-1.5-7b --tokens 64,128,192 --gpu A100 H100" in text
    assert "All times are predicted, none is measured." in words(text)
    for option in ("--tokens", "--llm-tokens", "--schedule", "--precision", "--vision-precision", "--gpu", "--batch"):
        assert option in text
    for option in ("--text-tokens", "--picture", "--new-tokens", "--target-ms", "MODEL|ENGINE_DIR"):
        assert option in text
