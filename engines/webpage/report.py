"""`flowcut report`: directories of results to one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

import flowcut
from engines.webpage.groups import Group, grouped
from engines.webpage.page import render
from engines.webpage.results import Run, read_runs
from flowcut.artifacts import timestamp
from flowcut.atomic import write_file
from flowcut.errors import ConfigError
from flowcut.integrity import MANIFEST

OUT = Path("report.html")
ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class ReportSettings:
    """What to show, and where. directories: of `flowcut bench`, or engine directories with theirs beside them."""

    directories: tuple[Path, ...]
    out: Path = OUT

    def __post_init__(self) -> None:
        if not self.directories:
            raise ConfigError("DIR must be at least one directory that `flowcut bench` wrote, got none.")
        if self.out.suffix.lower() not in ENDINGS:
            raise ConfigError(f"out must end with .html, for a browser to open it, got {str(self.out)!r}.")
        if self.out.is_dir():
            raise ConfigError(f"out must be a file, got the directory {str(self.out)!r}. Name a file in it.")
        if not self.out.parent.is_dir():
            raise ConfigError(f"out must be in an existing directory, got {str(self.out)!r}. Create it first.")
        if (self.out.parent / MANIFEST).exists():
            raise ConfigError(
                f"out must not be in an engine directory, which is sealed, got {str(self.out)!r}. "
                "Name a file beside it."
            )


@dataclass(frozen=True)
class Report:
    """The page and what is on it."""

    path: Path
    bytes: int
    groups: tuple[Group, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Of all groups, as they are on the page."""
        return tuple(run for group in self.groups for run in group.runs)

    def to_dict(self) -> dict[str, Any]:
        """For the line of JSON."""
        missing = [str(run.directory / each.name) for run in self.runs for each in run.pictures if each.missing]
        return {
            "report": str(self.path),
            "bytes": self.bytes,
            "groups": [_group(group) for group in self.groups],
            "mismatch": _said(self.runs, "mismatch"),
            "warnings": _said(self.runs, "warnings"),
            "missing": missing,
        }


def write_report(settings: ReportSettings, progress: Progress | None = None) -> Report:
    """Read the directories, write the page.

    Raises:
        InputError: a directory without results, or with broken ones.
        EngineError: the disk refuses.
    """
    task = None if progress is None else progress.add_task("report", total=None)
    groups = grouped(read_runs(settings.directories))
    content = render(groups, flowcut.__version__, timestamp()).encode("utf-8")
    write_file(settings.out, content)
    if progress is not None and task is not None:
        progress.remove_task(task)
    return Report(settings.out, len(content), groups)


def _group(group: Group) -> dict[str, Any]:
    return {
        "title": group.title,
        "directories": [str(run.directory) for run in group.runs],
        "lines": [
            {"title": series.title, "tokens": [point.tokens for point in series.points]} for series in group.series
        ],
    }


def _said(runs: Sequence[Run], name: str) -> list[str]:
    return [f"{run.directory}: {line}" for run in runs for line in getattr(run.bench, name)]
