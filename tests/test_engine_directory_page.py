"""docs/engine_directory.md says what there is: its fields, its files and its command are the code's."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_engine import write_engine

from flowcut.artifacts import SCHEMA, Manifest, read_manifest
from flowcut.integrity import MANIFEST

TEXT = (Path(__file__).parent.parent / "docs" / "engine_directory.md").read_text(encoding="utf-8")


def column(heading: str) -> list[str]:
    """What is in backticks in the first column of the table under a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return re.findall("`([^`]+)`", " ".join(rows))


def test_every_field_is_explained() -> None:
    assert sorted(column("The manifest")) == sorted(each.name for each in fields(Manifest))
    assert f"the form of this file, {SCHEMA}." in TEXT


@pytest.mark.parametrize("backend", ["ort", "rtx"])
def test_every_file_is_explained(tmp_path: Path, backend: str) -> None:
    names = {path.name for path in write_engine(tmp_path / "e", backend=backend).directory.iterdir()}
    assert names <= set(column("Files"))
    optional = {"calibration.safetensors", "chat_template.jinja"}
    optional |= {"vision.engine", "language.engine"} if backend == "ort" else set()
    assert set(column("Files")) - names <= optional


@pytest.mark.skipif(shutil.which("sed") is None or shutil.which("sha256sum") is None, reason="no sed or sha256sum")
def test_the_manifests_hash_needs_no_python(tmp_path: Path) -> None:
    (command,) = re.findall(r"^    (sed .*)$", TEXT, re.MULTILINE)
    directory = write_engine(tmp_path / "e").directory
    done = subprocess.run(["sh", "-c", command], cwd=directory, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == read_manifest(directory).sha256
    assert (directory / MANIFEST).is_file()
