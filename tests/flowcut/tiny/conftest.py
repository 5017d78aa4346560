"""llava-tiny's files, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowcut.tiny.files import write_tiny


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all of llava-tiny but its weights."""
    directory = tmp_path_factory.mktemp("files") / "llava-tiny"
    write_tiny(directory)
    return directory
