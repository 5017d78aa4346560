"""Tables stay within 80 columns at the sizes that real models have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tiny_engine import write_engine

from engines import load_engine, report
from engines.ask import STAGES, Answer, Question, Summary, ask
from engines.prune_result import Outcome, Pruned
from engines.runtime.engine import Generation
from engines.trust import Check
from flowcut.aliases import ASSETS
from flowcut.artifacts import read_manifest, write_manifest
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.schedule import make_schedule, pruning_points


def geometry(alias: str) -> LlavaConfig:
    return LlavaConfig.from_file(ASSETS / alias / "config.json")


@pytest.fixture
def console() -> Console:
    return Console(width=80, record=True, highlight=False, markup=False, emoji=False)


def test_every_pruning_point_of_llava_fits_in_a_row(console: Console) -> None:
    vision = LlavaConfig.from_file(ASSETS / "llava-1.5-7b" / "config.json").vision
    schedule, count = make_schedule("static", vision, 64), 12
    points = zip(pruning_points(vision.num_hidden_layers), schedule.counts, strict=True)
    trace = [(layer, [np.arange(kept)] * count) for layer, kept in points]
    pruned = Pruned(np.zeros((count, 64), np.int64), np.zeros((count, 25), np.int64), np.zeros((count, 64, 1)), trace)
    report.pruned(console, Outcome(pruned, schedule, "random weights", ["a.npz"]))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["picture", "input", *(str(layer) for layer, _ in trace)]
    assert [line.split() for line in lines[3 : 3 + count]] == [
        [str(i), "576", *map(str, schedule.counts)] for i in range(count)
    ]
    assert lines[-2:] == ["wrote    a.npz", "random weights: which patches are kept means nothing."]


def test_long_paths_are_not_broken(console: Console) -> None:
    path = str(Path("/", *["folder"] * 30, "kept.npz"))
    vision = LlavaConfig.from_file(ASSETS / "llava-tiny" / "config.json").vision
    pruned = Pruned(np.zeros((1, 144), np.int64), np.zeros((1, 13), np.int64), np.zeros((1, 144, 1)), [])
    report.pruned(console, Outcome(pruned, make_schedule("static", vision, 144), "", [path]))
    assert console.export_text().splitlines() == ["Nothing is pruned: all 144 patches stay.", f"wrote    {path}"]


def test_a_stage_without_a_run_is_a_dash(console: Console) -> None:
    latency: dict[str, Summary] = {stage: {"median": 1.5, "p90": 2.25, "n": 3} for stage in STAGES}
    latency["decode_per_token"] = {"median": None, "p90": None, "n": 0}
    answer = Answer(Generation([""], [[]], [True], [[]], [7], [7], {}), 7, latency)
    manifest = SimpleNamespace(backend="ort", note="", llm_tokens=None, geometry=geometry("llava-tiny"))
    engine = cast(Any, SimpleNamespace(backend="ort", manifest=manifest))
    report.answered(console, engine, Question((), "p"), answer)
    lines = console.export_text().splitlines()
    assert any(line.split() == ["milliseconds", "over", "3", "runs", "median", "p90"] for line in lines)
    assert lines[-2].split() == ["time", "to", "first", "token", "1.50", "2.25"]
    assert lines[-1].split() == ["each", "further", "token", "-", "-"]


def kept_lines(console: Console, config: LlavaConfig, size: tuple[int, int], kept: list[int]) -> list[str]:
    """What is printed of one picture: the titles and the maps."""
    maps = report._maps(config, size, kept, "#.")
    for each in maps:
        console.print(each.title)
        console.print(each.text)
    assert sum(each.patches for each in maps) == sum(
        len(line.strip()) for each in maps for line in str(each.text).split()
    )
    return [line.strip() for line in console.export_text().splitlines()]


def test_a_picture_of_llava_next_is_shown_as_base_and_grid(console: Console) -> None:
    """Numbers of the grid count its rows with the padding, which is not shown."""
    vision = VisionConfig(image_size=4, patch_size=1, hidden_size=16, num_hidden_layers=3)
    config = LlavaConfig(vision, TextConfig(vocab_size=32064), grid_pinpoints=((4, 8),))
    grid = [16 + row * 8 + column for row, column in ((1, 0), (2, 7), (2, 3))]  # rows 0 and 3 are padding
    assert kept_lines(console, config, (80, 20), [0, 15, *grid]) == [
        *("base", "#...", "....", "....", "...#"),
        *("1 x 2 tiles", "#.......", "...#...#"),
    ]


def test_a_lone_tile_is_one_map(console: Console) -> None:
    vision = VisionConfig(image_size=4, patch_size=2, hidden_size=16, num_hidden_layers=3)
    for pinpoints in (None, ()):
        config = LlavaConfig(vision, TextConfig(vocab_size=32064), grid_pinpoints=pinpoints)
        assert kept_lines(console, config, (80, 20), [1, 2]) == ["base", ".#", "#."]


def test_what_is_dropped_inside_the_decoder_is_said(console: Console, tmp_path: Path) -> None:
    tiny = write_engine(tmp_path / "e", tokens=48, llm_tokens=16)
    manifest = read_manifest(tiny.directory)
    report.inspected(console, tiny.directory, manifest)
    wide = console.export_text(clear=False)
    assert "48 of 144 patches, at most 16 of a picture behind" in wide
    assert "prompt 64 tokens (32 without a picture), answer 32 tokens" in wide
    image = tmp_path / "a.png"
    Image.new("RGB", (50, 40), "red").save(image)
    question = Question((image,), "Why?", 2, 1, template=True)
    answer = ask(load_engine(tiny.directory), question)
    report.answered(console, load_engine(tiny.directory), question, answer)
    text = console.export_text()
    assert "kept     16 of 144 patches, at most 16 of a picture behind the decoder's second layer" in text
    assert f"{answer.prompt_tokens} prompt tokens ({answer.prompt_tokens - 32} from the third layer on)" in text
    said = answer.to_dict(load_engine(tiny.directory), question)
    assert (said["tokens"], said["llm_tokens"]) == (48, 16)


def test_one_longest_prompt_is_said_where_nothing_is_dropped_inside_the_decoder(
    console: Console, tmp_path: Path
) -> None:
    tiny = write_engine(tmp_path / "e", tokens=48)
    report.inspected(console, tiny.directory, read_manifest(tiny.directory))
    assert "prompt 64 tokens, answer 32 tokens" in console.export_text()


def test_what_a_stranger_wrote_cannot_steer_the_terminal(console: Console, tmp_path: Path) -> None:
    evil = "a\x1b[2Jb\x1b]0;c\x07"
    directory = write_engine(tmp_path / "e", backend="rtx").directory
    (directory / f"file{evil}").touch()
    named = {name: name + evil for name in ("model", "note", "source_sha256", "created", "command")}
    many = {"versions": {"lib": evil}, "compute_capabilities": (evil,)}
    manifest = write_manifest(directory, replace(read_manifest(directory), **named, **many))
    report.inspected(console, directory, manifest)
    report.checked(console, [Check("GPU", "differs", f"must be {evil}")])
    report._say_note(console, manifest)
    shown = console.export_text()
    assert "\x1b" not in shown
    assert shown.count(r"a\x1b[2Jb\x1b]0;c\x07") >= 8


def test_what_the_language_model_leaves_is_said_picture_by_picture(console: Console) -> None:
    vision = LlavaConfig.from_file(ASSETS / "llava-tiny" / "config.json").vision
    kept, left = np.arange(8).reshape(2, 4), [np.array([1, 2]), np.array([5, 7])]
    pruned = Pruned(kept, np.zeros((2, 13), np.int64), np.zeros((2, 4, 1)), [(9, list(kept))], left=left)
    schedule = make_schedule("static", vision, 4)
    report.pruned(console, Outcome(pruned, schedule, "", [], 2, "Where [is]\nit?"))
    lines = console.export_text().splitlines()
    assert lines[-4:] == [
        "language model: patches left after its second layer",
        "question Where [is] it?",
        "0        2 of 4 patches",
        "1        2 of 4 patches",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (963_200, "963.2 kB"), (13_476_839_424, "13.5 GB")],
)
def test_sizes_have_the_unit_that_suits_them(count: int, text: str) -> None:
    assert report._size(count) == text
