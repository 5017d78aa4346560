"""`flowcut report`: the page, the table, the line of JSON, and what is refused with one line and no file changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from bench_files import bench, write_bench
from cli_refusals import Refused, refusals

from flowcut.cli import main


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    monkeypatch.chdir(tmp_path)
    return refusals(tmp_path, capfd)


def test_directories_become_one_page_and_a_line_of_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engine").mkdir()
    write_bench(tmp_path / "engine.bench", bench(64))
    write_bench(tmp_path / "other", bench(128))
    with pytest.raises(SystemExit) as ended:
        main(["report", "engine", "other"])
    out = capfd.readouterr().out.splitlines()
    assert not ended.value.code
    said = json.loads(out[-1])
    assert set(said) == {"report", "bytes", "groups", "mismatch", "warnings", "missing"}
    assert said["report"] == "report.html"
    assert said["groups"][0]["directories"] == ["engine.bench", "other"]
    assert (tmp_path / "report.html").stat().st_size == said["bytes"]
    rows = [line.split() for line in out if line.strip().startswith(("64 ", "128 "))]
    assert [row[0] for row in rows] == ["64", "128"]
    assert all(row[-2:] == ["agree", "75%"] for row in rows)


def test_names_from_files_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = write_bench(tmp_path / "r", bench(64, model="a\x1b[2Jb", warnings=["[bold]c\x1b[0m"]))
    with pytest.raises(SystemExit):
        main(["report", str(place), "--out", str(tmp_path / "page.html")])
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert "[bold]c" in out


def test_every_wrong_directory_is_one_line(tmp_path: Path, refused: Refused) -> None:
    good = write_bench(tmp_path / "good", bench(64))
    (tmp_path / "empty").mkdir()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "manifest.json").write_text("{}")
    truncated = write_bench(tmp_path / "truncated", bench(64)) / "bench.json"
    truncated.write_bytes(truncated.read_bytes()[:500])
    assert "DIR must be a directory" in refused("report", good, tmp_path / "none")
    assert "got a file" in refused("report", good / "bench.json")
    assert "DIR must hold bench.json" in refused("report", good, tmp_path / "empty")
    assert "`flowcut bench engine --baseline ENGINE_DIR` measures it" in refused("report", "engine")
    assert "content must be JSON, complete" in refused("report", truncated.parent)


def test_every_wrong_place_for_the_page_is_one_line(tmp_path: Path, refused: Refused) -> None:
    write_bench(tmp_path / "good", bench(64))
    (tmp_path / "folder.html").mkdir()
    assert "out must be in an existing directory" in refused("report", "good", "--out", "missing/page.html")
    assert "out must be a file, got the directory" in refused("report", "good", "--out", "folder.html")
    assert "out must end with .html" in refused("report", "good", "--out", "good/bench.json")
    (tmp_path / "pipe.html").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(SystemExit) as ended:
        main(["report", "good", "--out", "pipe.html"])
    assert ended.value.code == 1


def test_no_directory_is_wrong_syntax(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 2
    assert "DIR" in capfd.readouterr().err
