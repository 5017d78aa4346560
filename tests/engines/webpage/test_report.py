"""`write_report` writes one whole page or nothing, and refuses where it must not write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_files import MACHINE, bench, write_bench
from rich.console import Console

from engines.progress import terminal_progress
from engines.webpage.report import ReportSettings, write_report
from engines.webpage.table import reported
from flowcut.errors import ConfigError, EngineError, InputError


def test_a_report_says_where_it_is_and_what_is_on_it(tmp_path: Path) -> None:
    places = [write_bench(tmp_path / str(tokens), bench(tokens)) for tokens in (128, 64)]
    other = bench(64, machine={**MACHINE, "device": "B"}, warnings=["busy"], mismatch=["precision"])
    places.append(write_bench(tmp_path / "other", other, pictures=False))
    with terminal_progress() as progress:
        result = write_report(ReportSettings(tuple(places), tmp_path / "page.html"), progress)
    page = (tmp_path / "page.html").read_bytes()
    said = json.loads(json.dumps(result.to_dict()))
    assert said["report"] == str(tmp_path / "page.html")
    assert said["bytes"] == len(page)
    assert page.startswith(b"<!DOCTYPE html>")
    first, second = said["groups"]
    assert first["directories"] == [str(tmp_path / "128"), str(tmp_path / "64")]
    assert first["lines"] == [{"title": "batch 1, 40 text tokens, static", "tokens": [64, 128]}]
    assert second["directories"] == [str(tmp_path / "other")]
    assert said["warnings"] == [f"{tmp_path / 'other'}: busy"]
    assert said["mismatch"] == [f"{tmp_path / 'other'}: precision"]
    assert said["missing"] == [str(tmp_path / "other" / "kept.png")]


def test_the_table_has_accuracy_or_agreement_in_every_row_with_a_speedup(tmp_path: Path) -> None:
    unknown = {"kept": None, "kept_reason": "no torch", "baseline": None}
    documents = [bench(64, accuracy=True), bench(128), bench(192, agreement=unknown)]
    places = [write_bench(tmp_path / str(i), document) for i, document in enumerate(documents)]
    result = write_report(ReportSettings(tuple(places), tmp_path / "page.html"))
    console = Console(width=160, record=True, markup=False, highlight=False, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        reported(console, result)
    text = captured.get()
    rows = [line for line in text.splitlines() if line.strip().startswith(("64 ", "128 ", "192 "))]
    assert len(rows) == 3
    for row, cost, document in zip(rows, ("right 77.4%", "agree 75%", "not known"), documents, strict=True):
        assert cost in row
        for stage in ("vision", "prefill", "total"):
            assert f"{document['speedup'][stage]:.2f}x" in row
    assert "no torch" in text
    assert f"wrote {tmp_path / 'page.html'}" in " ".join(text.split())


def test_an_old_page_is_replaced_whole(tmp_path: Path) -> None:
    place, out = write_bench(tmp_path / "r", bench(64)), tmp_path / "page.html"
    out.write_text("old")
    write_report(ReportSettings((place,), out))
    assert out.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert {each.name for each in tmp_path.iterdir()} == {"r", "page.html"}


def test_a_broken_run_leaves_the_old_page(tmp_path: Path) -> None:
    good, out = write_bench(tmp_path / "good", bench(64)), tmp_path / "page.html"
    bad = write_bench(tmp_path / "bad", {"schema": 1})
    out.write_text("old")
    with pytest.raises(InputError):
        write_report(ReportSettings((good, bad), out))
    assert out.read_text() == "old"
    assert {each.name for each in tmp_path.iterdir()} == {"good", "bad", "page.html"}


def test_the_same_results_make_the_same_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.webpage.report.timestamp", lambda: "now")
    place = write_bench(tmp_path / "r", bench(64))
    pages = []
    for name in ("a.html", "b.htm"):
        write_report(ReportSettings((place,), tmp_path / name))
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("report", r"out must end with \.html, for a browser to open it, got '.*report'\."),
        ("engine/bench.json", r"out must end with \.html"),
        ("missing/report.html", r"out must be in an existing directory, got '.*'\. Create it first\."),
        ("folder.html", r"out must be a file, got the directory '.*'\. Name a file in it\."),
        ("engine/report.html", r"out must not be in an engine directory, which is sealed, got"),
    ],
)
def test_a_place_that_must_not_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, out: str, message: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        ReportSettings((tmp_path / "no results",), tmp_path / out)


def test_no_directories_are_refused() -> None:
    with pytest.raises(ConfigError, match="DIR must be at least one directory"):
        ReportSettings(())


def test_a_full_or_forbidden_disk_is_an_engine_error(tmp_path: Path) -> None:
    place = write_bench(tmp_path / "r", bench(64))
    with pytest.raises((EngineError, OSError)):
        write_report(ReportSettings((place,), Path("/proc/report.html")))
