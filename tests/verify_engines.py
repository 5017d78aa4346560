"""Engine directories for tests of `verify`, and what its report says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from engines.comparison import Report, Row
from engines.pipeline import BuildSettings, build_directory
from flowcut.artifacts import read_manifest, write_manifest

Build = Callable[..., Path]


def builder(tmp_path_factory: pytest.TempPathFactory, **usual: Any) -> Build:
    """build(precision, ..) -> engine directory as the pipeline publishes it, built once; copy it before changing it.

    usual: settings where a call does not say others.
    """
    built: dict[str, Path] = {}

    def build(precision: str = "fp32", **settings: Any) -> Path:
        key = repr((precision, sorted(settings.items())))
        if key not in built:
            out = tmp_path_factory.mktemp("engines") / "engine"
            chosen = {"precision": precision, "backend": "ort", **usual, **settings}
            built[key] = build_directory(BuildSettings(out=out, **chosen), Progress(disable=True)).directory
        return built[key]

    return build


def rehash(directory: Path, **changes: Any) -> Path:
    """Make the manifest agree with the files again, so that only their content can give them away."""
    if changes.get("backend") in ("rtx", "trt"):
        changes.setdefault("compute_capabilities", ("sm80 and later",))
    write_manifest(directory, replace(read_manifest(directory), **changes))
    return directory


def failed(report: Report) -> set[tuple[str, str]]:
    return {(r.graph, r.output) for r in report.rows if r.verdict == "FAILED"}


def row(report: Report, graph: str, runner: str, output: str) -> Row:
    (found,) = (r for r in report.rows if (r.graph, r.runner, r.output) == (graph, runner, output))
    return found
