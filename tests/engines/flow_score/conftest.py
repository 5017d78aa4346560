"""What tests of the TensorRT plugins share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nvidia_plugin
import pytest

from engines.flow_score import plugin


@pytest.fixture(scope="module")
def on_sm_86(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine with an sm_86 GPU and an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "gpu_sm", lambda: 86)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trt(on_sm_86: None) -> Iterator[Any]:
    """The module tensorrt, with FlowScore's plugins."""
    with nvidia_plugin.tensorrt() as module:
        plugin.register_plugin(module)
        yield module
