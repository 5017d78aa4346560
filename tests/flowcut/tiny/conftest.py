"""llava-tiny's files, written once a session, and the labels of some scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from flowcut.config import LlavaConfig
from flowcut.tiny.drawing import Labels, labels
from flowcut.tiny.files import write_tiny
from flowcut.tiny.scenes import Scene


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all of llava-tiny but its weights."""
    directory = tmp_path_factory.mktemp("files") / "llava-tiny"
    write_tiny(directory)
    return directory


@pytest.fixture(scope="session")
def config(tiny_files: Path) -> LlavaConfig:
    return LlavaConfig.from_file(tiny_files / "config.json")


@pytest.fixture(scope="session")
def stack_labels() -> Callable[[Iterable[Scene]], Labels]:
    """stack_labels(scenes) -> the labels of all, as `draw` gives them."""

    def stack(scenes: Iterable[Scene]) -> Labels:
        parts = [labels(scene) for scene in scenes]
        return Labels(*(np.stack([getattr(p, name) for p in parts]) for name in Labels.__dataclass_fields__))

    return stack
