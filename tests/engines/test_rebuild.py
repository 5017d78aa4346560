"""The command in a manifest is the build's own, whatever it was given."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from engines.pipeline import BuildSettings, build_directory
from engines.rebuild import build_command
from flowcut.aliases import ASSETS
from flowcut.arguments import make_parser
from flowcut.artifacts import read_manifest
from flowcut.cli import build_settings
from flowcut.config import Precision

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=12)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(lambda names: "/" + "/".join(names))
COUNTS = st.integers(1, 10**6)
PRECISIONS = st.sampled_from(get_args(Precision))
SETTINGS = st.builds(
    BuildSettings,
    model=st.sampled_from(["llava-tiny", "llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"]) | PATHS,
    random=st.booleans(),
    seed=st.integers(-5, 10**9),
    tokens=st.none() | st.just("all") | COUNTS,
    llm_tokens=st.none() | COUNTS,
    schedule=st.sampled_from(["static", "masked"]) | PATHS.map(lambda path: f"{path}.json"),
    selector=st.none() | st.sampled_from(["flowcut", "cls", "random-7"]),
    precision=PRECISIONS,
    vision_precision=st.none() | PRECISIONS,
    calibration=st.none() | st.just("none") | PATHS,
    stages=COUNTS,
    backend=st.sampled_from(["rtx", "trt", "ort"]),
    decoder_layers=st.none() | COUNTS,
    max_batch=COUNTS,
    max_images=COUNTS,
    max_prompt=st.none() | COUNTS,
    max_new_tokens=COUNTS,
    compute_capabilities=st.lists(st.sampled_from(["sm80", "SM86", "sm120"]), max_size=3).map(tuple),
    out=st.none() | PATHS.map(Path),
    out_root=st.just(Path("build")) | PATHS.map(Path),
)


def typed(command: str) -> BuildSettings:
    """What the command line makes of a command."""
    program, *arguments = shlex.split(command)
    assert program == "flowcut"
    return build_settings(make_parser().parse_args(arguments))


@given(SETTINGS)
def test_the_command_line_takes_every_setting_back(settings: BuildSettings) -> None:
    got = typed(build_command(settings, settings.backend))
    if settings.out is not None:  # which decides alone
        settings = replace(settings, out_root=got.out_root)
    assert got == settings


def test_what_was_not_chosen_is_not_said() -> None:
    assert build_command(BuildSettings("llava-tiny"), "rtx") == "flowcut engine llava-tiny --backend rtx"


def test_files_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    settings = BuildSettings(
        model="my model",
        schedule="a schedule's.json",
        calibration="~/calibration.safetensors",
        out=Path("out"),
        out_root=Path("elsewhere"),
    )
    got = typed(build_command(settings, "ort"))
    assert got.model == str(tmp_path / "my model")
    assert got.schedule == str(tmp_path / "a schedule's.json")
    assert got.calibration == str(Path.home() / "calibration.safetensors")
    assert got.out == tmp_path / "out"
    assert typed(build_command(replace(settings, out=None), "ort")).out_root == tmp_path / "elsewhere"


def test_a_directory_is_built_again_by_what_it_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, and into the same files: everything but times and dates."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("it's a model").symlink_to(ASSETS / "llava-tiny")
    settings = BuildSettings(
        "it's a model", tokens=9, selector="grid", precision="int8", vision_precision="fp32", stages=2, max_batch=1,
        max_images=3, max_prompt=77, max_new_tokens=5, backend="ort", random=True, seed=3, decoder_layers=2,
        out=Path("an 'engine'"),
    )  # fmt: skip
    first = build_directory(settings, Progress(disable=True)).manifest
    assert read_manifest(Path("an 'engine'")) == first
    monkeypatch.chdir(tmp_path)
    again = build_directory(typed(first.command), Progress(disable=True)).manifest
    assert read_manifest(tmp_path / "here" / "an 'engine'") == again
    same = {"created": first.created, "build_seconds": first.build_seconds, "sha256": first.sha256}
    assert replace(again, **same) == first
