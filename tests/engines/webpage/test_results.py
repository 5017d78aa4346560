"""Directories of results are read whole, or refused with the file, the field, the rule, the value and a remedy."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_files import PATCHES, bench, write_bench

from engines.webpage.results import MOST_BYTES, MOST_PICTURE_BYTES, read_run, read_runs
from flowcut.errors import InputError

Change = Callable[[dict[str, Any]], Any]


def test_a_run_has_what_its_document_says(tmp_path: Path) -> None:
    document = bench(128, peers=["transformers-sdpa"], batches=(1, 4), accuracy=True)
    run = read_run(write_bench(tmp_path / "r", document))
    assert [each.name for each in run.bench.subjects] == ["pruned", "baseline", "transformers-sdpa"]
    found = run.bench.pruned.at(4)
    assert found is not None
    assert found.stages.total.p99 == document["pruned"]["batches"][1]["stages"]["total"]["p99"]
    ratio = run.bench.comparisons[0].ratios["prefill"]
    assert ratio is not None
    assert ratio.low == document["comparisons"][0]["ratios"]["prefill"]["low"]
    assert run.bench.accuracy is not None
    assert run.bench.accuracy.pruned.accuracy == document["accuracy"]["pruned"]["accuracy"]
    assert [(p.name, p.subject, p.width, p.missing) for p in run.pictures] == [
        ("kept.png", "pruned", 612, ""),
        ("kept-baseline.png", "baseline", 612, ""),
    ]
    assert run.pictures[0].png == (tmp_path / "r" / "kept.png").read_bytes()


def test_an_engine_directory_stands_for_the_results_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    write_bench(tmp_path / "engine.bench", bench())
    (tmp_path / "link").symlink_to(engine)
    monkeypatch.chdir(tmp_path)
    for name in ("engine", "engine/", "engine.bench", "link", "engine/../engine", str(engine)):
        (run,) = read_runs([Path(name)])
        assert run.directory.resolve() == tmp_path / "engine.bench"
    assert str(read_runs([Path("engine")])[0].directory) == "engine.bench"
    monkeypatch.chdir(engine)
    (run,) = read_runs([Path()])
    assert run.directory.resolve() == tmp_path / "engine.bench"


def test_a_directory_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    for name, tokens in (("a", 64), ("b.bench", 128)):
        write_bench(tmp_path / name, bench(tokens))
    monkeypatch.chdir(tmp_path)
    runs = read_runs([Path(name) for name in ("b", "a", "b.bench", "./a")])
    assert [run.bench.pruned.tokens for run in runs] == [128, 64]


def test_a_directory_without_results_is_refused_with_the_command_that_makes_some(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    with pytest.raises(
        InputError, match=r"DIR must hold bench\.json, got .*engine' without\. `flowcut bench ENGINE_DIR"
    ):
        read_runs([engine])
    (engine / "manifest.json").write_text("{}")
    with pytest.raises(
        InputError, match=rf"must have been measured, .*engine\.bench/bench\.json'\. `flowcut bench {engine} --baseline"
    ):
        read_runs([engine])


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text("{}")
    for path, got in ((file, "a file"), (tmp_path / "none", "none")):
        with pytest.raises(InputError, match=rf"DIR must be a directory that `flowcut bench` wrote.* got {got} at"):
            read_runs([path])


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "must be JSON, complete, got Expecting value"),
        (json.dumps(bench()).encode()[:-100], "must be JSON, complete, got"),
        (b'{"schema": NaN}', "must be JSON, complete, got NaN, which JSON has not"),
        (b"[" * 200_000, "must be JSON, complete, got brackets nested deeper"),
        (b"[1, 2]", r"must be a JSON object, got \[1, 2\]"),
        (b"\xff\xfe{}", "must be UTF-8 text, got 'utf-8' codec"),
        (b" " * (MOST_BYTES + 1), f"must be at most {MOST_BYTES} bytes, got more"),
        (b"{}", "schema must be 1, .* got None"),
        (b'{"schema": 2}', "schema must be 1, which this version of flowcut-trt reads, got 2"),
        (b'{"schema": true}', "schema must be 1, .* got True"),
        (b'{"schema": 1}', "command must be given, got none"),
    ],
)
def test_a_broken_document_is_refused_on_one_line(tmp_path: Path, content: bytes, got: str) -> None:
    path = write_bench(tmp_path / "r", {}) / "bench.json"
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=rf"{re.escape(str(path))}: .*{got}.* Measure again with `flowcut bench`\.$"
    ) as e:
        read_run(path.parent)
    assert "\n" not in str(e.value)


def _set(path: str, value: object) -> Change:
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]

    def change(document: Any) -> None:
        for key in keys:
            document = document[key]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("pruned.batches.0.stages.vision.median", "fast"),
            r"pruned\.batches\[0\]\.stages\.vision\.median must be a",
        ),
        (
            _set("pruned.batches.0.stages.total", None),
            r"pruned\.batches\[0\]\.stages\.total must be an object, got None",
        ),
        (_set("pruned.batches.0.stages.total.n", 0), r"total\.n must be a whole number, 1 or more, got 0"),
        (_set("comparisons.0.ratios.prefill.ratio", -2.0), r"prefill\.ratio must be a number, 0 or more, got -2\.0"),
        (
            _set("comparisons.0.against", "nobody"),
            r"comparisons\[0\]\.against must be a subject measured at batch 1 \(",
        ),
        (_set("comparisons.0.batch", 8), r"comparisons\[0\]\.subject must be a subject measured at batch 8"),
        (_set("pruned.tokens", PATCHES + 1), r"pruned: tokens must be at most 576, its patches, got 577"),
        (_set("pruned.batches", []), r"pruned: batches must be one batch size or several different ones, got \[\]"),
        (_set("baseline.name", "pruned"), r"peers must be subjects of different names, got \['pruned', 'pruned'\]"),
        (_set("machine.kind", "tpu"), r"machine\.kind must be one of 'cpu', 'gpu', got 'tpu'"),
        (_set("agreement.kept.jaccard", 1.5), r"agreement\.kept\.jaccard must be a number from 0 to 1, got 1\.5"),
        (_set("warnings", "many"), r"warnings must be a list, got 'many'"),
    ],
)
def test_a_value_that_no_benchmark_writes_is_named(tmp_path: Path, change: Change, message: str) -> None:
    document = copy.deepcopy(bench())
    change(document)
    with pytest.raises(InputError, match=message):
        read_run(write_bench(tmp_path / "r", document))


def test_a_pipe_or_a_link_is_neither_waited_for_nor_followed(tmp_path: Path) -> None:
    for name, make in (("pipe", os.mkfifo), ("link", lambda path: path.symlink_to("/etc/hostname"))):
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "bench.json")
        with pytest.raises(InputError, match=r"bench\.json must be a file that can be read, got: "):
            read_run(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it is not there"),
        (b"", "it is not a PNG picture that can be read"),
        (b"\x89PNG\r\n\x1a\n broken", "it is not a PNG picture that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "it is not a PNG picture"),
        (b"\x89PNG" + bytes(MOST_PICTURE_BYTES), "it is larger than 8 MB"),
    ],
)
def test_a_picture_that_cannot_be_shown_says_why(tmp_path: Path, content: bytes | None, reason: str) -> None:
    directory = write_bench(tmp_path / "r", bench())
    (directory / "kept.png").unlink()
    if content is not None:
        (directory / "kept.png").write_bytes(content)
    kept, baseline = read_run(directory).pictures
    assert kept.missing.startswith(reason)
    assert kept.png == b""
    assert baseline.missing == ""


def test_a_truncated_picture_is_not_shown(tmp_path: Path) -> None:
    directory = write_bench(tmp_path / "r", bench())
    whole = (directory / "kept.png").read_bytes()
    (directory / "kept.png").write_bytes(whole[: len(whole) // 2])
    assert read_run(directory).pictures[0].missing


def test_a_subject_that_keeps_everything_needs_no_picture(tmp_path: Path) -> None:
    directory = write_bench(tmp_path / "r", bench())
    (directory / "kept-baseline.png").unlink()
    assert [picture.name for picture in read_run(directory).pictures] == ["kept.png"]
